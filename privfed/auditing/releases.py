"""Level 1 on a run: the releases of one site over all rounds, with and without a canary."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from privfed.privacy import noise
from privfed.privacy.audit import mechanism
from privfed.privacy.audit.curves import curve_of
from privfed.privacy.audit.result import Audit
from privfed.privacy.oracle.door import ALL, NoisedDoor, group
from privfed.privacy.oracle.shares import ShareDoor
from privfed.privacy.shared import ClientSum, RecordSum

from ..architecture import parameter_count
from ..doors import Split
from ..errors import PrivfedError
from ..grid import Grid
from ..methods import SingleQuery, State
from ..schedule import ahead
from ..terms import encoding_of, split_id, whole_group
from .canaries import LOUD, at_first, door_of, stage
from .target import Target

_Floats = NDArray[np.float64]
_Releases = Callable[[bytes], _Floats]
"""float64[dim] of one key: a trial's releases of all rounds, added up."""

MOST_DIM = 64  # of the audited vector: clip, noise and encoding treat every coordinate alike
_QUERIES = 40_000  # of all trials together, unless asked for more: about a minute


def audit_releases(target: Target, *, trials: int | None, seed: int, progress: Callable[[int, int], None]) -> Audit:
    """Whether the run's own door and encoding hold to what one site's ledger would be charged for the whole run.

    Every trial makes the releases of all rounds at the start model and adds them up: a sufficient statistic for a
    canary that is the same in each. Under noise in shares the auditor is the server together with as many sites as the
    claim allows for: of the smallest sum that may be released, only the others' noise is unknown to it.

    Args:
        trials: of each kind; default as many as take about a minute.

    Raises:
        ConfigError: there is no claim, or no canary shows.
    """
    target.require_claim(1)
    config = target.config
    dim = min(MOST_DIM, parameter_count(config, target.ready.schema))
    size = dim * config.method.blocks
    encoding = encoding_of(config, target.cohort, size, target.noise_multiplier, b"audit")
    state = config.method.init_server(torch.zeros(dim))
    planned = ahead(config, target.cohort, size, target.noise_multiplier, config.rounds)
    if isinstance(encoding, ClientSum):
        direction, part = np.eye(size)[0], ALL
        makers = {included: _client_sums(target, encoding, included) for included in (True, False)}
    else:
        scene = stage(config, target.ready.schema, state)
        direction, part = scene.direction, scene.part
        makers = {
            included: _record_sums(target, encoding, state, records)
            if isinstance(encoding, RecordSum)
            else _updates(target, encoding, state, records)
            for included, records in scene.sides.items()
        }
    touched = {whole_group(config), group(split_id(config), part, whole_group(config))}
    charges = tuple(charge for charge in planned if charge.group in touched)
    number = trials or max(mechanism.LEAST_TRIALS, min(10_000, _QUERIES // (2 * sum(c.count for c in planned))))
    done = itertools.count(1)

    def release(with_canary: bool, key: bytes) -> _Floats:
        progress(next(done), 2 * number)
        return makers[with_canary](key)

    return mechanism.audit(
        mechanism.scores_of(release, direction),
        name=f"releases of one site over {config.rounds} rounds",
        trials=number,
        claimed_epsilon=target.cost(charges),
        delta=config.privacy.delta,
        seed=seed,
        curve=curve_of(charges),
        note=f"{number} times with a canary of {LOUD:g} times the clip and {number} times without: "
        f"{config.privacy.unit.value} unit, {config.privacy.noise.value} noise, the run's own sampling, clip, noise "
        f"and integers in {dim} coordinates. At the start model throughout: level 3 goes through the rounds",
    )


class _Door:
    """One door for all trials, made with the first one's key: its stream of draws and noise goes on."""

    def __init__(self, target: Target, records: Split) -> None:
        self._target, self._records = target, records
        self._door: NoisedDoor | None = None

    def of(self, trial: bytes) -> NoisedDoor:
        if self._door is None:
            self._door = door_of(
                self._target.config,
                self._target.ready.schema,
                self._records,
                noise_multiplier=self._target.noise_multiplier,
                key=noise.derive_key(trial, b"door"),
            )
        return self._door


def _updates(target: Target, encoding: Grid, state: State, records: Split) -> _Releases:
    """What a site uploads with noise of its own."""
    config, door = target.config, _Door(target, records)
    shared = at_first(config, len(state["theta"]))

    def releases(trial: bytes) -> _Floats:
        total = np.zeros(encoding.dim)
        for _ in range(config.rounds):
            update, _ = config.method.contribute(state, shared, door.of(trial))
            total += encoding.decode(encoding.grid.encode(update[0].numpy()), summands=1)
        return total

    return releases


def _record_sums(target: Target, encoding: RecordSum, state: State, records: Split) -> _Releases:
    """What is left of the smallest secure sum when the colluders' shares are taken away; the others hold no records."""
    method, door = target.config.method, _Door(target, records)
    if not isinstance(method, SingleQuery):
        raise PrivfedError(f"method {type(method).__name__} asks for more than one gradient: it would not be released")
    nobody = np.zeros(encoding.rotation.dim)

    def releases(trial: bytes) -> _Floats:
        total = np.zeros(encoding.rotation.dim)
        for number in range(target.config.rounds):
            mine, *theirs = _keys(trial, number, encoding.noise.minimum_cohort - encoding.noise.colluders)
            summed = ShareDoor(door.of(trial), encoding, mine).noised_sum(method.point(state))
            for other in theirs:
                summed = summed + encoding.encode(nobody, other)
            total += encoding.decode(summed, summands=1)
        return total

    return releases


def _client_sums(target: Target, encoding: ClientSum, included: bool) -> _Releases:
    """The same, where the canary is a whole site's update."""
    dim = encoding.rotation.dim
    nobody, canary = np.zeros(dim), np.eye(dim)[0] * LOUD * target.config.privacy.max_update_norm

    def releases(trial: bytes) -> _Floats:
        total = np.zeros(dim)
        for number in range(target.config.rounds):
            mine, *theirs = _keys(trial, number, encoding.noise.minimum_cohort - encoding.noise.colluders)
            summed = encoding.encode(canary if included else nobody, mine)
            for other in theirs:
                summed = summed + encoding.encode(nobody, other)
            server = noise.derive_key(trial, b"server", number.to_bytes(8, "big"))
            total += encoding.decode(encoding.add_noise(summed, server), summands=1)
        return total

    return releases


def _keys(trial: bytes, number: int, sites: int) -> list[bytes]:
    return [noise.derive_key(trial, number.to_bytes(8, "big"), site.to_bytes(8, "big")) for site in range(sites)]
