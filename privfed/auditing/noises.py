"""Level 2 on a run: its clip, its noise, the independence of its sites, and what it books."""

import math
from collections.abc import Callable

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfed.privacy import noise, selftest
from privfed.privacy.audit import noise_test
from privfed.privacy.audit.result import Audit
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.oracle.together import Oracle, Query
from privfed.privacy.selftest import SelfTestFailed
from privfed.privacy.shared import ClientSum, RecordSum

from .. import doors, keyring
from ..architecture import build_model, first_states, parameter_count, update_size
from ..config import Config
from ..contribution import Contribution, contribute
from ..data.records import SiteData
from ..doors import Split
from ..errors import PrivfedError
from ..methods import State
from ..parameters import to_vector
from ..schedule import ahead
from ..terms import Update, count_sum, encoding_of, planned_charges
from ..wire import PURPOSES, Purpose
from .canaries import LOUD, door_of, everyone_drawn, records_of, stage
from .target import Target

_Floats = NDArray[np.float64]

SIZE = 4096  # numbers of noise that are looked at, of each site
RELEASES = 16  # at least, so that one coordinate without noise is seen
_FIGURES = 1024  # numbers of noise of the figures, of each site
MOST_SITES = 16


def audit_noise(target: Target, *, seed: int, progress: Callable[[int, int], None]) -> Audit:
    """Whether clip and noise are what is booked, and every site's noise is its own.

    On a simulated run the sites' own keys are tested, under a label that no release has: of a configuration, some that
    derive from ``seed``.

    Raises:
        ConfigError: there is no claim.
    """
    target.require_claim(2)
    config = target.config
    keys = _site_keys(target, seed)
    dim = min(SIZE, parameter_count(config, target.ready.schema))
    encoding = encoding_of(config, target.cohort, dim, target.noise_multiplier, b"audit")
    streams = _streams(target, encoding, keys)
    checks: dict[str, Callable[[], None]] = {
        "secrecy of the noise": lambda: _secret(target),
        "law of the noise": _law_of(target, encoding, streams),
        "independence of the sites": lambda: noise_test.check_streams([one.ravel() for one in streams.values()]),
        "clip": lambda: _clip(target, encoding),
        "what is booked": lambda: _booked(target),
    }
    if not isinstance(encoding, ClientSum):
        checks["what it is made of"] = lambda: _made_of_answers(target)
    sides = [one for one in PURPOSES if one != "update" and getattr(target.ready.side_noise, one) > 0]
    for purpose in sides:
        checks[f"noise of the {purpose}"] = lambda purpose=purpose: _side_law(target, purpose, keys)  # type: ignore[misc]
    followed = {
        name: _followed(check, number, len(checks), progress) for number, (name, check) in enumerate(checks.items(), 1)
    }
    figures = config.evaluation.release == "internal" and config.policy.release_figures
    return noise_test.audit(
        followed,
        name="noise, clip and booking",
        size=min([stream.size for stream in streams.values()] + [_FIGURES for _ in sides]),
        statistics=noise_test.STATISTICS * len(streams) * (1 + len(sides)) + 1,  # one more of all streams together
        claimed_epsilon=target.cost(ahead(config, target.cohort, dim, target.noise_multiplier, config.rounds)),
        delta=config.privacy.delta,
        seed=seed,
        note="The sites' exact figures are released beside the updates, and no ε covers them (evaluation.release)"
        if figures
        else "",
    )


def _followed(
    check: Callable[[], None], number: int, of: int, progress: Callable[[int, int], None]
) -> Callable[[], None]:
    def checked() -> None:
        check()
        progress(number, of)

    return checked


def _site_keys(target: Target, seed: int) -> dict[str, bytes]:
    """A key for this audit of each site's noise key."""
    names = list(target.ready.data.sites)[:MOST_SITES]
    known = target.config.privacy.insecure_seed
    if known is not None:
        roots = {name: noise.insecure_key(known, name.encode()) for name in names}
    elif target.home is not None and target.home.ledger().is_file():
        key = keyring.ledger_key(target.home.ledger())
        roots = {name: keyring.site_key(key, name, "noise") for name in names}
    else:
        roots = {name: noise.insecure_key(seed, b"audit", name.encode()) for name in names}
    return {name: noise.derive_key(root, b"audit") for name, root in roots.items()}


def _streams(target: Target, encoding: Update, keys: dict[str, bytes]) -> dict[str, _Floats]:
    """float64[≥ RELEASES, P], SIZE numbers or more, of each site: what its mechanism releases where there is no record,
    in units of the clip."""
    config = target.config
    found: dict[str, _Floats] = {}
    for name, key in keys.items():
        pieces: list[_Floats] = []
        if isinstance(encoding, ClientSum | RecordSum):
            while _too_few(pieces):
                mine = noise.derive_key(key, len(pieces).to_bytes(8, "big"))
                integers = encoding.encode_nothing(mine)
                pieces.append(encoding.add_noise(integers, noise.derive_key(mine, b"server")).astype(np.float64))
        else:
            empty = records_of(config, np.zeros((0, encoding.dim)), np.zeros(0, np.uint64), [])
            model = torch.zeros(1, encoding.dim)
            door = door_of(config, target.ready.schema, empty, noise_multiplier=target.noise_multiplier, key=key)
            scale = config.privacy.expected_batch_size / config.privacy.max_grad_norm
            while _too_few(pieces):
                pieces.append(door.gradient(model, door.draw())[0].double().numpy() * scale)
        found[name] = np.stack(pieces)
    return found


def _too_few(pieces: list[_Floats]) -> bool:
    return len(pieces) < RELEASES or sum(map(len, pieces)) < SIZE


def _law_of(target: Target, encoding: Update, streams: dict[str, _Floats]) -> Callable[[], None]:
    def law() -> None:
        for name, stream in streams.items():
            if isinstance(encoding, ClientSum | RecordSum):
                variance = encoding.noise.share_variance
                selftest.check_noise(stream.ravel().astype(np.int64), variance, what=f"the noise of {name}")
                deviation = math.sqrt(variance)
            else:
                deviation = target.noise_multiplier
                noise_test.check_gaussian(stream.ravel(), deviation, what=f"the noise of {name}")
            noise_test.check_coordinates(stream, deviation, what=f"the noise of {name}")

    return law


def _side_law(target: Target, purpose: Purpose, keys: dict[str, bytes]) -> None:
    """The sites' shares of the noise in what is released beside the updates."""
    config, strength = target.config, getattr(target.ready.side_noise, purpose)
    encoding = count_sum(config, target.cohort, purpose, target.ready.schema.features, strength)
    for name, key in keys.items():
        one = noise.derive_key(key, purpose.encode())
        pieces = [
            encoding.encode_nothing(noise.derive_key(one, number.to_bytes(8, "big")))
            for number in range(-(-_FIGURES // encoding.dim))
        ]
        selftest.check_noise(np.concatenate(pieces), encoding.share_variance, what=f"the noise of {name}")


def _secret(target: Target) -> None:
    if target.config.privacy.insecure_seed is not None:
        raise SelfTestFailed("privacy.insecure_seed is set: anyone can recompute the noise, which then hides nothing")


def _clip(target: Target, encoding: Update) -> None:
    """One unit of many times the clip, without noise."""
    config = target.config
    if isinstance(encoding, ClientSum):
        canary = np.eye(encoding.rotation.dim)[0] * LOUD * config.privacy.max_update_norm
        moved = encoding.rounding.encode(canary, np.random.default_rng(0))
        selftest.check_sensitivity([moved], [np.zeros_like(moved)], encoding.event())
        return
    dim, privacy = encoding.rotation.dim if isinstance(encoding, RecordSum) else encoding.dim, config.privacy
    state = config.method.init_server(torch.zeros(dim))
    scene = stage(config, target.ready.schema, state)
    with_unit, without = (_clipped_sum(target, scene.sides[included], dim) for included in (True, False))
    most = privacy.max_grad_norm
    if privacy.unit is PrivacyUnit.PATIENT and privacy.sampling == "record":
        most *= privacy.max_records or 1
    selftest.check_clip(with_unit, without, most)


def _clipped_sum(target: Target, records: Split, dim: int) -> _Floats:
    """float64[dim]: one clipped sum of all records, with noise a billionth of the clip."""
    config = everyone_drawn(target.config)
    door = door_of(config, target.ready.schema, records, noise_multiplier=1e-9, key=bytes(32))
    answer = door.gradient(torch.zeros(1, dim), door.draw())[0].double().numpy()
    return answer * config.privacy.expected_batch_size


def _booked(target: Target) -> None:
    """One contribution of a made-up site, by the run's own code: what it executes is what it declares."""
    config = target.config
    given, whole = _contribution(target, config, seed=0, key=bytes(32))
    declared = planned_charges(config, whole, target.noise_multiplier)
    executed = [(repr(charge.event), charge.count) for charge in given.charges]
    if sorted(executed) != sorted((repr(charge.event), charge.count) for charge in declared):
        raise SelfTestFailed("a contribution is booked under other charges than the run declares")


def _made_of_answers(target: Target) -> None:
    """Two sites of other records whose doors answer alike give the same: nothing gets past the noised answers.

    A head that is fitted to the records without noise, say, moves what leaves however well the body's steps are noised.
    """
    config = target.config
    if config.privacy.unit is PrivacyUnit.PATIENT:  # their doors ask nobody; the method's part in it is the same
        config = msgspec.structs.replace(
            config, privacy=msgspec.structs.replace(config.privacy, unit=PrivacyUnit.RECORD, max_records=None)
        )
    size = parameter_count(config, target.ready.schema)
    one, other = (
        _contribution(target, config, seed=seed, key=bytes(32), oracle=_SameAnswers(size))[0] for seed in (0, 1)
    )
    same = np.array_equal(one.vector, other.vector) and one.shared.keys() == other.shared.keys()
    if not same or any(not torch.equal(one.shared[name], other.shared[name]) for name in one.shared):
        raise SelfTestFailed("what leaves a site depends on its records in another way than by the noised answers")


class _SameAnswers:
    """An oracle that looks at no record: its answers are one sequence of made-up numbers."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters
        self._random = torch.Generator().manual_seed(0)

    def ask(self, query: Query) -> Tensor:
        answer = torch.randn(self.parameters, generator=self._random, dtype=torch.float64)
        return answer.float() if query.max_grad_norm is None else answer


def _contribution(
    target: Target, config: Config, *, seed: int, key: bytes, oracle: Oracle | None = None
) -> tuple[Contribution, Update]:
    """What a made-up site of eight records gives, and how it is encoded; other seeds make other records."""
    schema = target.ready.schema
    random = np.random.default_rng(seed)
    inputs = torch.from_numpy(random.normal(size=(8, schema.features))).float()
    classes = schema.classes
    targets = torch.from_numpy(random.integers(0, classes, 8)) if classes else torch.ones(8)
    ids = np.arange(8, dtype=np.uint64)
    records = doors.split(config, SiteData(ids, inputs, targets, ids), bytes(32))
    state: State = config.method.init_server(to_vector(build_model(config, schema)))
    shared, _ = first_states(config, schema)
    size = update_size(config, schema.features, parameter_count(config, schema))
    whole = encoding_of(config, target.cohort, size, target.noise_multiplier, b"contribution")
    strength = target.noise_multiplier
    try:
        given = contribute(
            config, schema, records, state, shared, whole, noise_multiplier=strength, key=key, oracle=oracle
        )
    except (PrivfedError, NoGuarantee) as refusal:
        raise SelfTestFailed(f"a contribution is refused: {refusal}") from None
    return given, whole
