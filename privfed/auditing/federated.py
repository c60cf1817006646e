"""Level 3 on a run: one whole federated run, sites, rounds and aggregation, with canaries among the records."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from privfed.crypto.aggregation import AggregationResult
from privfed.crypto.packing import decode as to_signed
from privfed.crypto.packing import unpack
from privfed.crypto.plain import Submission
from privfed.crypto.wire import decode as decode_message
from privfed.privacy.audit import one_run
from privfed.privacy.audit.curves import curve_of
from privfed.privacy.audit.result import Audit
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit, Skellam
from privfed.privacy.oracle.door import ALL, group

from .. import doors, wire
from ..architecture import Schema, update_size
from ..cohort import cohort_of
from ..config import Aggregation, Config, Evaluation
from ..data.records import SiteData, Sites, keyed_fraction, public_split_key
from ..engines.contract import Engine
from ..errors import ConfigError
from ..federation import Federation
from ..parameters import decode as decode_state
from ..simulation.consortium import open_consortium
from ..terms import (
    Update,
    claimed_colluders,
    encoding_of,
    plan_encoding,
    planned_charges,
    session_of,
    split_id,
    whole_group,
)
from .canaries import LOUD, carrier, carriers, copies_of, exact_update, records_of
from .target import Target

_Floats = NDArray[np.float64]

CANARIES = 2000  # with half as many, four of ten sound runs at ε = 8 would go unsupported
_OTHERS = 4  # records of the first site besides, and of every other site


def audit_run(target: Target, *, canaries: int | None, seed: int, progress: Callable[[int, int], None]) -> Audit:
    """Whether one simulated run of all sites and rounds tells more of its records than is claimed.

    The run's method, rounds, sampling, clip, noise and sites, over records that carry gradients: each canary's is a
    direction of its own, orthogonal to all others, whatever the model has become. Each stands in the first site or not
    by its own coin. The auditor sees, under noise of each site's own, what that site uploads (plain aggregation in the
    simulation); under noise in shares, the sum that the server sees. The claim is what the simulated ledger books.

    Raises:
        ConfigError: there is no claim, or it is about whole sites, of which there are too few for one run.
    """
    target.require_claim(3)
    if target.config.privacy.unit is PrivacyUnit.CLIENT:
        raise ConfigError(
            "level 3 needs many units in one run, and with privacy.unit = 'client' the units are the sites themselves: "
            "use --level 1"
        )
    number = canaries or CANARIES
    config, schema = _simulated(target, seed), _room_for(number + _OTHERS)
    cast = _Cast(config, schema, number, seed)
    charges = _charges(target, config, schema, cast.part)
    local = config.privacy.noise is NoiseSite.LOCAL
    return one_run.audit(
        _scores_of_a_run(target, config, schema, cast, progress),
        name=f"one run of {config.rounds} rounds and {len(target.ready.training)} sites",
        number=number,
        claimed_epsilon=target.cost(charges),
        delta=config.privacy.delta,
        seed=seed,
        curve=curve_of(charges),
        note=f"{number} canaries in one site, each with a gradient of its own direction and {LOUD:g} times the clip "
        f"long; the run's own method, rounds, sampling, clip and noise in {schema_size(schema)} coordinates. The "
        f"auditor sees {'what that site uploads' if local else 'the sum that the server sees, as the server alone'}",
    )


def schema_size(schema: Schema) -> int:
    """Parameters of a network of one layer."""
    return (schema.features + 1) * schema.classes


def _room_for(directions: int) -> Schema:
    """A table whose logistic regression has at least so many parameters: what sites and server take the size from."""
    return Schema(features=-(-directions // 2), classes=2)


class _Cast:
    """The canaries: gradients float64[m, P], ids of their units that are for training, and where each shows."""

    def __init__(self, config: Config, schema: Schema, number: int, seed: int) -> None:
        random = np.random.default_rng([seed, number, 2])
        length, size = LOUD * config.privacy.max_grad_norm, schema_size(schema)
        directions = one_run.canaries(number + _OTHERS, size, norm=length, randomness=random)
        self.others, self.canaries = directions[:_OTHERS], directions[_OTHERS:]
        self.part, self.sign = _shows(config, schema, self.canaries[0])
        self.ids = training_ids(config, number + _OTHERS, self.part, random)
        self.copies = copies_of(config)

    def site(self, included: NDArray[np.bool_]) -> SiteData:
        """The site's table: others, and the canaries whose coin fell so."""
        units = np.concatenate([self.ids[:_OTHERS], self.ids[_OTHERS:][included]]).repeat(self.copies)
        gradients = np.concatenate([self.others, self.canaries[included]]).repeat(self.copies, axis=0)
        return carriers(gradients, units)

    def scores(self, releases: _Floats) -> _Floats:
        """float64[m]: how far the sum of releases float64[T, P] lies in each canary's direction."""
        return self.sign * one_run.white_box(releases[:, : self.canaries.shape[1]], self.canaries)


def training_ids(config: Config, number: int, part: str, random: np.random.Generator) -> NDArray[np.uint64]:
    """uint64[number]: ids of records that the public split puts among the training records, in ``part``."""
    key = public_split_key(config.seed)
    found: list[NDArray[np.uint64]] = []
    while sum(map(len, found)) < number:
        ids = random.integers(0, 2**63, 4 * number).astype(np.uint64)
        data = SiteData(ids, torch.zeros(len(ids), 1), torch.zeros(len(ids), dtype=torch.int64))
        ids = ids[keyed_fraction(ids, key=key, label="test") >= config.evaluation.test_fraction]
        rows = doors.split(config, data, key).parts[part]
        found.append(ids[rows.numpy()])
    return np.concatenate(found)[:number]


def _shows(config: Config, schema: Schema, canary: _Floats) -> tuple[str, float]:
    """The part in which a canary shows in the site's update, and whether along its direction or against it."""
    state = config.method.init_server(torch.zeros(schema_size(schema)))
    for part in config.method.parts or {ALL: 1.0}:
        records = records_of(config, canary[None], np.zeros(1, np.uint64), [part])
        update = exact_update(config, schema, records, state)[: len(canary)]
        along = float(update @ canary) / float(canary @ canary)
        if abs(along) > 1e-6:  # a part that does not show gives the noise of a door that adds next to none
            return part, float(np.sign(along))
    raise ConfigError(f"no canary shows in what method {type(config.method).__name__} sends: it can not be audited")


def _simulated(target: Target, seed: int) -> Config:
    """The run as it is simulated: its mechanism, on another table, with reproducible noise and without figures."""
    config, privacy = target.config, target.config.privacy
    method = config.method
    if "personal_steps" in method.__struct_fields__:  # nobody looks at the personal models
        method = msgspec.structs.replace(method, personal_steps=1)
    colluders = None
    aggregation = config.aggregation
    if privacy.noise is NoiseSite.LOCAL:
        aggregation = Aggregation(kind="plain", fraction_bits=aggregation.fraction_bits, limit=aggregation.limit)
    else:
        colluders = claimed_colluders(config, target.cohort)
        if aggregation.kind == "homomorphic":  # the same sum, sooner
            aggregation = Aggregation(minimum_cohort=aggregation.minimum_cohort)
    return Config(
        name="audit",
        rounds=config.rounds,
        seed=config.seed,
        method=method,
        privacy=msgspec.structs.replace(
            privacy,
            noise_multiplier=target.noise_multiplier,
            target_epsilon=float("inf"),
            colluders=colluders,
            standardise_epsilon=None,
            insecure_seed=seed,
        ),
        aggregation=aggregation,
        evaluation=Evaluation(every=config.rounds, local_steps=1, test_fraction=config.evaluation.test_fraction),
    )


def _charges(target: Target, config: Config, schema: Schema, part: str) -> tuple[Charge, ...]:
    """What the simulated run costs a canary, against the server alone and with every site in each sum."""
    sites = len(target.ready.training)
    size = update_size(config, schema.features, schema_size(schema))
    encoding = encoding_of(config, cohort_of(config, sites), size, target.noise_multiplier)
    planned = planned_charges(config, encoding, target.noise_multiplier, config.rounds)
    touched = {whole_group(config), group(split_id(config), part, whole_group(config))}
    return tuple(
        msgspec.structs.replace(charge, event=msgspec.structs.replace(charge.event, shares=sites, colluders=0))
        if isinstance(charge.event, Skellam)
        else charge
        for charge in planned
        if charge.group in touched
    )


def _scores_of_a_run(
    target: Target, config: Config, schema: Schema, cast: _Cast, progress: Callable[[int, int], None]
) -> one_run.Run:
    """The simulation, as the audit asks for it."""
    names = list(target.ready.training)

    def run(included: NDArray[np.bool_]) -> _Floats:
        nobody = np.zeros(len(included), dtype=bool)
        sites = {name: cast.site(nobody if number else included) for number, name in enumerate(names)}
        data = Sites(sites, inputs=(), classes=("0", "1"), simulated=True, description="canaries")
        with (
            tempfile.TemporaryDirectory(prefix="privfed-audit-") as folder,
            open_consortium(
                config,
                data,
                schema,
                ledger=Path(folder) / "ledger.db",
                journal=Path(folder) / "journal.db",
                accountant=target.ready.accountant,
                network=lambda: carrier(schema_size(schema)),
            ) as consortium,
        ):
            tap = _Tap(consortium.engine, names[0])
            federation = _Federation(
                config=config,
                run="audit",
                roster=consortium.roster,
                engine=tap,
                noise_multiplier=target.noise_multiplier,
                state=config.method.init_server(torch.zeros(schema_size(schema))),
                schema=schema,
                server_key=bytes(32),
            )
            for report in federation.rounds():
                if report.aborted is not None or names[0] not in report.contributed:
                    reason = report.aborted or next(iter(report.refused.values()), "a site is missing")
                    raise ConfigError(f"the simulated run released nothing in round {report.round + 1}: {reason}")
                progress(report.round + 1, config.rounds)
        return cast.scores(np.stack(tap.uploads if config.aggregation.kind == "plain" else federation.sums))

    return run


class _Federation(Federation):
    """A coordinator that keeps the sums it is given, up to a constant factor, and asks for no figures."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sums: list[_Floats] = []

    def _serve(self, result: AggregationResult, encoding: Update, plan: wire.RoundPlan) -> None:
        self.sums.append(encoding.decode(result.total, summands=len(result.contributors)))
        super()._serve(result, encoding, plan)

    def _evaluate(self, *_: object) -> dict[str, wire.Measurement]:
        return {}  # there is nothing to be good at: the records are gradients


class _Tap:
    """An engine between the coordinator and the sites that reads what one of them uploads in the clear."""

    def __init__(self, engine: Engine, site: str) -> None:
        self._engine, self._site = engine, site
        self.uploads: list[_Floats] = []

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        replies = self._engine.exchange(requests, deadline_seconds)
        request = wire.decode_request(requests[self._site]) if self._site in requests else None
        if isinstance(request, wire.Begin) and self._site in replies:
            plan, reply = wire.decode_plan(request.plan), wire.decode_reply(replies[self._site])
            if plan.config.aggregation.kind == "plain" and isinstance(reply, wire.Answer):
                self.uploads.append(_submitted(plan, request, reply))
        return replies


def _submitted(plan: wire.RoundPlan, request: wire.Begin, reply: wire.Answer) -> _Floats:
    """float64[P]: a site's upload of a plain round."""
    encoding = plan_encoding(plan, len(decode_state(request.state)["theta"]))
    session = session_of(plan, wire.context(request.plan, request.state), encoding)
    submission = decode_message(reply.payload, Submission, most=len(reply.payload))
    words = unpack(submission.vector, dim=session.dim, bits=session.bits)
    return encoding.decode(to_signed(words, session.bits), summands=1)
