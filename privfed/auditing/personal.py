"""Level 4 on a run: whose records do the personal models give away?"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from privfed.privacy.audit import membership
from privfed.privacy.audit.result import Audit

from .. import doors, folder
from ..architecture import build_model, first_states
from ..data.records import SiteData, public_split_key
from ..doors import Split
from ..errors import ConfigError, RunFolderError
from ..evaluation import outputs_of
from ..methods import State
from ..standardisation import DEVIATION, MEAN
from .target import Target

_Floats = NDArray[np.float64]

SHADOWS = 32  # of every site
_FEWEST = 4


def audit_personal(
    target: Target,
    *,
    shadows: int | None,
    by: Sequence[str] = (),
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[Audit, ...]:
    """Membership inference on the personal models of a finished run, by loss and by LiRA.

    The members are each site's training records, the others its test records. Shadow models start from the run's own
    global model and are personalised by its method's own rule on random halves of a site's records. A personal model is
    trained without noise and stays at its site, so nothing is claimed of it: the figures say what it would give away to
    whoever may query it. They are given for all records, for each site and each class, and for the groups of chosen
    columns.

    Args:
        by: columns among the model's inputs.

    Raises:
        ConfigError: not a finished run, it has too few records, or there is no such column.
        RunFolderError: its files are damaged or of other records.
    """
    if target.home is None or not target.finished:
        raise ConfigError("level 4 attacks the personal models of a finished run: give the folder of one")
    number = shadows or SHADOWS
    if number < _FEWEST:
        raise ConfigError(f"level 4 needs at least {_FEWEST} shadow models, got --trials {number}")
    columns = {column: _column(target, column) for column in by}
    personal, _ = target.home.load_tensors(folder.PERSONAL)
    state = _global_state(target)
    key, random = public_split_key(target.config.seed), np.random.default_rng(seed)
    losses, ratios, inside, pools = [], [], [], []
    names = [name for name in target.ready.data.sites if name in personal]
    for done, name in enumerate(names):
        records = doors.split(target.config, target.ready.data.sites[name], key)
        pool, members = _pool(records)
        included = np.argsort(random.random((number, len(pool))), axis=0) < number // 2
        shadow = np.stack(
            [_shadow_losses(target, state, pool, half) for half in _counted(included, done, names, progress)]
        )
        seen = _losses(target, personal[name], pool)
        losses.append(membership.loss_scores(seen))
        ratios.append(membership.lira_scores(seen, shadow, included))
        inside.append(members)
        pools.append(pool)
    members = np.concatenate(inside) if inside else np.zeros(0, dtype=bool)
    note = (
        f"{len(names)} personal models, {int(members.sum())} members, {int((~members).sum())} others. A personal model "
        "carries no claim, and its scores are not independent: figures, no verdict. It must not leave its site"
    )
    delta = target.config.privacy.delta
    classes = target.ready.data.classes
    groups = {
        "site": [name for name, pool in zip(names, pools, strict=True) for _ in range(len(pool))],
        "class": [classes[int(target_)] for pool in pools for target_ in pool.targets],
        **{column: _groups(torch.cat([pool.inputs for pool in pools]), *found) for column, found in columns.items()},
    }
    try:
        return tuple(
            membership.audit(
                np.concatenate(scores), members, name=name, delta=delta, seed=seed, note=said, groups=groups
            )
            for name, scores, said in (
                ("personal models, loss threshold", losses, note),
                ("personal models, LiRA", ratios, f"{number} shadow models a site; {note}"),
            )
        )
    except ValueError as error:
        raise ConfigError(f"level 4: {error}") from None


def _column(target: Target, name: str) -> tuple[list[int], list[str]]:
    """Which inputs a column became, and their names: one of numbers, or one of 0 or 1 for each of its values."""
    inputs = target.ready.data.inputs
    if name in inputs:
        return [inputs.index(name)], []
    values = [number for number, given in enumerate(inputs) if given.startswith(f"{name}=")]
    if not values:
        known = ", ".join(dict.fromkeys(given.partition("=")[0] for given in inputs))
        raise ConfigError(f"--by {name}: the model has no such input; it has {known}")
    return values, [inputs[number].partition("=")[2] for number in values]


def _groups(inputs: torch.Tensor, places: list[int], values: list[str]) -> list[str]:
    """The group of each record of float32[n, F]: a column's value, or the half of its numbers."""
    if values:
        chosen = inputs[:, places]
        return [values[int(row.argmax())] if bool(row.any()) else "no listed value" for row in chosen]
    numbers = inputs[:, places[0]]
    return ["upper half" if bool(number > numbers.median()) else "lower half" for number in numbers]


def _counted(
    included: NDArray[np.bool_], done: int, names: list[str], progress: Callable[[int, int], None]
) -> "list[NDArray[np.bool_]]":
    progress(done, len(names))
    return list(included)


def _global_state(target: Target) -> State:
    """What the server last sent: the shadows' start."""
    assert target.home is not None
    checkpoint = target.home.load_checkpoint()
    if checkpoint is None:
        raise RunFolderError(f"{target.home.path} has no {folder.CHECKPOINT}: restore it from your copy")
    return checkpoint.kept or checkpoint.server


def _pool(records: Split) -> tuple[SiteData, NDArray[np.bool_]]:
    """All records of a site, and which of them its personal model was trained on."""
    train, test = records.train, records.test
    patients = None
    if train.patients is not None and test.patients is not None:
        patients = np.concatenate([train.patients, test.patients])
    together = SiteData(
        np.concatenate([train.ids, test.ids]),
        torch.cat([train.inputs, test.inputs]),
        torch.cat([train.targets, test.targets]),
        patients,
    )
    return together, np.r_[np.ones(len(train), dtype=bool), np.zeros(len(test), dtype=bool)]


def _shadow_losses(target: Target, state: State, pool: SiteData, included: NDArray[np.bool_]) -> _Floats:
    """float64[n]: losses of all of a site's records under a model personalised on half of them."""
    config, schema = target.config, target.ready.schema
    half = pool.rows(included)
    rows = {name: torch.arange(len(half)) for name in ("all", *config.method.parts)}
    records = Split(half, pool.rows(np.zeros(len(pool), dtype=bool)), rows)
    scaled = pool
    if MEAN in state:
        records, scaled = (
            records.standardised(state[MEAN], state[DEVIATION]),
            pool.scaled(state[MEAN], state[DEVIATION]),
        )
    shared, private = first_states(config, schema)
    door = doors.local_door(config, schema, records)
    for _ in range(1 if config.method.sends else config.rounds):  # a method that sends nothing trains in every round
        private = config.method.personalize(state, shared, private, door)
    return _losses(target, private["theta"], scaled)


def _losses(target: Target, theta: torch.Tensor, records: SiteData) -> _Floats:
    outputs = outputs_of(build_model(target.config, target.ready.schema), theta, records.inputs)
    return target.config.task.loss(outputs.double(), records.targets).numpy()
