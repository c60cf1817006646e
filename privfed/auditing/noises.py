"""Level 2 on a run: its clip, its noise, the independence of its sites, and what it books."""

import secrets
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from privfed.privacy import noise, selftest
from privfed.privacy.audit import noise_test
from privfed.privacy.audit.result import Audit
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.selftest import SelfTestFailed
from privfed.privacy.shared import ClientSum, RecordSum

from .. import doors, keyring
from ..contribution import contribute
from ..data.records import SiteData
from ..doors import Split
from ..errors import PrivfedError
from ..methods import State
from ..parameters import to_vector
from ..schedule import ahead
from ..terms import Update, build_model, encoding_of, first_states, parameter_count, planned_charges, update_size
from .canaries import LOUD, door_of, everyone_drawn, records_of, stage
from .target import Target

_Floats = NDArray[np.float64]

SIZE = 4096  # numbers of noise that are looked at, of each site
MOST_SITES = 16


def audit_noise(target: Target, *, seed: int, progress: Callable[[int, int], None]) -> Audit:
    """Whether clip and noise are what is booked, and every site's noise is its own.

    On a simulated run the sites' own keys are tested, under a label that no release has: of a configuration, new ones.

    Raises:
        ConfigError: there is no claim.
    """
    target.require_claim(2)
    config = target.config
    keys = _site_keys(target)
    dim = min(SIZE, parameter_count(config, target.ready.schema))
    encoding = encoding_of(config, target.cohort, dim, target.noise_multiplier, b"audit")
    streams = _streams(target, encoding, keys)
    law = _law_of(target, encoding, streams)
    checks: dict[str, Callable[[], None]] = {
        "secrecy of the noise": lambda: _secret(target),
        "law of the noise": law,
        "independence of the sites": lambda: noise_test.check_streams(list(streams.values())),
        "clip": lambda: _clip(target, encoding),
        "what is booked": lambda: _booked(target, encoding),
    }
    followed = {
        name: _followed(check, number, len(checks), progress) for number, (name, check) in enumerate(checks.items(), 1)
    }
    figures = config.evaluation.release == "internal" and config.policy.release_figures
    return noise_test.audit(
        followed,
        name="noise, clip and booking",
        size=min(len(stream) for stream in streams.values()),
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


def _site_keys(target: Target) -> dict[str, bytes]:
    """A key for this audit of each site's noise key."""
    names = list(target.ready.data.sites)[:MOST_SITES]
    known = target.config.privacy.insecure_seed
    if known is not None:
        roots = {name: noise.insecure_key(known, name.encode()) for name in names}
    elif target.home is not None and target.home.ledger().is_file():
        key = keyring.ledger_key(target.home.ledger())
        roots = {name: keyring.site_key(key, name, "noise") for name in names}
    else:
        roots = {name: noise.new_key() for name in names}
    return {name: noise.derive_key(root, b"audit") for name, root in roots.items()}


def _streams(target: Target, encoding: Update, keys: dict[str, bytes]) -> dict[str, _Floats]:
    """float64[≥ SIZE] of each site: what its mechanism releases where there is no record, in units of the clip."""
    config = target.config
    found: dict[str, _Floats] = {}
    for name, key in keys.items():
        pieces: list[_Floats] = []
        if isinstance(encoding, ClientSum | RecordSum):
            while sum(map(len, pieces)) < SIZE:
                mine = noise.derive_key(key, len(pieces).to_bytes(8, "big"))
                integers = encoding.encode_nothing(mine)
                pieces.append(encoding.add_noise(integers, noise.derive_key(mine, b"server")).astype(np.float64))
        else:
            empty = records_of(config, np.zeros((0, encoding.dim)), np.zeros(0, np.uint64), [])
            model = torch.zeros(1, encoding.dim)
            door = door_of(config, target.ready.schema, empty, noise_multiplier=target.noise_multiplier, key=key)
            scale = config.privacy.expected_batch_size / config.privacy.max_grad_norm
            while sum(map(len, pieces)) < SIZE:
                pieces.append(door.gradient(model, door.draw())[0].double().numpy() * scale)
        found[name] = np.concatenate(pieces)
    return found


def _law_of(target: Target, encoding: Update, streams: dict[str, _Floats]) -> Callable[[], None]:
    def law() -> None:
        for name, stream in streams.items():
            if isinstance(encoding, ClientSum | RecordSum):
                variance = encoding.noise.share_variance
                selftest.check_noise(stream.astype(np.int64), variance, what=f"the noise of {name}")
            else:
                noise_test.check_gaussian(stream, target.noise_multiplier, what=f"the noise of {name}")

    return law


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


def _booked(target: Target, encoding: Update) -> None:
    """One contribution of a made-up site, by the run's own code: what it executes is what it declares."""
    config, schema = target.config, target.ready.schema
    random = np.random.default_rng(0)
    inputs = torch.from_numpy(random.normal(size=(8, schema.features))).float()
    classes = schema.classes
    targets = torch.from_numpy(random.integers(0, classes, 8)) if classes else torch.ones(8)
    ids = np.arange(8, dtype=np.uint64)
    records = doors.split(config, SiteData(ids, inputs, targets, ids), bytes(32))
    state: State = config.method.init_server(to_vector(build_model(config, schema)))
    shared, _ = first_states(config, schema)
    size = update_size(config, schema.features, parameter_count(config, schema))
    whole = encoding_of(config, target.cohort, size, target.noise_multiplier, secrets.token_bytes(8))
    try:
        given = contribute(
            config, schema, records, state, shared, whole, noise_multiplier=target.noise_multiplier, key=noise.new_key()
        )
    except (PrivfedError, NoGuarantee) as refusal:
        raise SelfTestFailed(f"a contribution is refused: {refusal}") from None
    declared = planned_charges(config, whole, target.noise_multiplier)
    executed = [(repr(charge.event), charge.count) for charge in given.charges]
    if sorted(executed) != sorted((repr(charge.event), charge.count) for charge in declared):
        raise SelfTestFailed("a contribution is booked under other charges than the run declares")
