"""One hospital: what it does with one message.

Engines call `Site.handle` with bytes and carry back the bytes it returns. Everything a site promises happens here or
below: its policy and its budget are checked before anything is learned, records are reached only through the door, and
the ledger has the spend on disk before the vector that it paid for exists in any message.
"""

import hashlib
import itertools
import logging
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from privfed.crypto.aggregation import AggregationClient, Session
from privfed.crypto.errors import AggregationError
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.journal import Journal
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.packing import IntVector
from privfed.crypto.plain import PlainClient
from privfed.crypto.roster import Identity, Roster
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.budget import Budget
from privfed.privacy.discretize import FixedPoint
from privfed.privacy.errors import BudgetExhausted, ChargeConflict, NoGuarantee, PrivacyError
from privfed.privacy.events import Charge, Gaussian, PrivacyUnit
from privfed.privacy.ledger import Entry, Ledger
from privfed.privacy.oracle.door import ALL, Door, DoorSettings, Records, charge, group
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.plain import PlainDoor

from . import evaluation, parameters, wire
from .config import Config, Policy
from .data.records import SiteData, keyed_fraction
from .errors import LedgerKeyError, PrivfedError
from .methods import Local, State
from .models import classification_loss, mlp
from .policy import PolicyRefusal, check_policy

logger = logging.getLogger(__name__)

MAX_PARAMETER = 1e4


@dataclass(frozen=True)
class Schema:
    """What is public about every site's table."""

    features: int
    classes: int


def build_model(config: Config, schema: Schema) -> nn.Module:
    """The run's network at its public start parameters."""
    return mlp(schema.features, config.model.hidden, schema.classes, seed=config.seed)


def parameter_count(config: Config, schema: Schema) -> int:
    """How many parameters the run's network has, without building it."""
    widths = [schema.features, *config.model.hidden, schema.classes]
    return sum((above + 1) * below for above, below in itertools.pairwise(widths))


def session_of(plan: wire.RoundPlan, context: bytes, dim: int) -> Session:
    """The aggregation session that a party derives from the plan and model it holds."""
    return Session(
        run=plan.run,
        round=plan.round,
        attempt=plan.attempt,
        cohort=plan.cohort,
        dim=dim,
        bound=grid_of(plan.config).bound,
        threshold=plan.threshold,
        minimum_cohort=plan.minimum_cohort,
        colluders=plan.colluders,
        degree=plan.degree,
        context=context,
    )


KEY_HOLDER = "key-holder"
"""The name in the roster of a key holder that is no site."""


def needs_key_holder(config: Config) -> bool:
    """Whether the run encrypts what the sites send."""
    return config.aggregation.kind == "homomorphic" and config.method.sends


def key_holder_of(config: Config, roster: Roster) -> int | None:
    """The roster index of the party that decrypts, None where nothing is encrypted.

    Raises:
        ValueError: the roster has no such member.
    """
    if not needs_key_holder(config):
        return None
    name = config.aggregation.key_holder or KEY_HOLDER
    for index, member in enumerate(roster.members):
        if member.name == name:
            return index
    raise ValueError(f"homomorphic aggregation needs a key holder; the roster has no member named {name!r}")


def grid_of(config: Config) -> FixedPoint:
    """The integer grid that every site of the run encodes to."""
    return FixedPoint(fraction_bits=config.aggregation.fraction_bits, limit=config.aggregation.limit)


def split_id(config: Config) -> str:
    """Names the keyed-hash split of a run's training records, for the ledger.

    Parts compose in parallel under one name only. So the name changes with whatever could move a record to another
    part: the seed, how records get their ids, where the parts' borders are.
    """
    terms = (config.seed, config.data, sorted(config.method.parts.items()))
    return f"hash-{hashlib.sha256(msgspec.msgpack.encode(terms)).hexdigest()[:12]}"


def planned_charges(config: Config, noise_multiplier: float, participations: int = 1) -> tuple[Charge, ...]:
    """What ``participations`` rounds of the run will cost one site, known before any record is touched."""
    if config.privacy.unit is PrivacyUnit.NONE:
        return ()
    return tuple(
        charge(
            group(split_id(config), queries.part),
            config.privacy.sample_rate,
            noise_multiplier,
            queries.count * participations,
        )
        for queries in config.method.queries()
    )


@dataclass(frozen=True)
class _Split:
    """A site's records by purpose."""

    train: SiteData = field(repr=False)
    test: SiteData = field(repr=False)
    parts: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class _Round:
    """An attempt in progress."""

    round: int
    client: AggregationClient


class _Replayable:
    """A journal whose sessions stay replayable until the next one begins.

    An answered round may have to be answered again, byte for byte, after a crash that lost the coordinator's last
    round. The next round's begin, or `forget`, erases the seed.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._last = journal, b""

    def begin(self, sid: bytes, run: str, round: int, attempt: int) -> bytes:
        return self._journal.begin(sid, run, round, attempt)

    def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
        self._journal.answer(sid, step, request_digest, reply_digest)

    def finish(self, sid: bytes) -> None:
        self._last = sid

    def forget(self) -> None:
        if self._last:
            self._journal.finish(self._last)


class Site:
    """A site's side of every round.

    Args:
        identity: its private keys; their public side stands in ``roster``.
        roster: the roster this site has accepted.
        data: its records.
        schema: what is public about every site's table.
        ledger: where its spends are written. It may hold the chains of other simulated sites too.
        journal: the aggregation's durable memory.
        fingerprint_key: bytes[32]; the ledger names the site's records by keyed hashes under it.
        noise_key: bytes[32]; every random number of a release derives from it and from what the release is bound to,
            so that a round replayed after a crash is the same release, and any other round has independent noise.
        policy: what this site demands, whatever a plan says.
        split_key: bytes[32]; decides which records are for testing and which part the others fall into. A site's own
            secret; the simulation derives it from the public seed, so that methods are compared on the same split.
        insecure: ``noise_key`` comes from a fixed seed that others know.
        accountant: shared among simulated sites for its cache.

    Guarantees:
        What leaves is an aggregation message, a refusal, or evaluation figures. A refused plan touches no record. The
        charge is durable before the update is given to the aggregation. A budget is never exceeded, over all runs on
        the ledger. A configuration that changes in the middle of a run is refused.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        roster: Roster,
        data: SiteData,
        schema: Schema,
        ledger: Ledger,
        journal: Journal,
        fingerprint_key: bytes,
        noise_key: bytes,
        split_key: bytes,
        insecure: bool,
        policy: Policy,
        accountant: Accountant,
    ) -> None:
        self.name = identity.name
        self._identity, self._roster = identity, roster
        self._index = roster.index_of(identity.member.secagg_key)
        self._data, self._schema = data, schema
        self._fingerprint = data.fingerprint(fingerprint_key)
        # One book for a site, whatever its table holds today: a record that was there last year is still in it after
        # another was added, and its ε must not start again.
        self._dataset = noise.derive_key(fingerprint_key, b"ledger", self.name.encode()).hex()
        self._begun: tuple[str, int] | None = None
        self._measured: tuple[str, int] | None = None
        if any(line.entry.dataset != self._dataset for line in ledger.entries(self.name)):
            raise LedgerKeyError(
                f"the ledger of {self.name} was written under another key: its spends would be forgotten. "
                "Restore the key file from your copy"
            )
        self._ledger, self._accountant = ledger, accountant
        self._journal = _Replayable(journal)
        self._noise_key, self._split_key = noise_key, split_key
        self._insecure, self._policy = insecure, policy
        self._run: tuple[str, Config, float] | None = None
        self._split: _Split | None = None
        self._private: State | None = None
        self._local_only: Tensor | None = None
        self._current: _Round | None = None

    @property
    def fingerprint(self) -> str:
        """Keyed hash of the records, in hex: a resumed run must find the same ones."""
        return self._fingerprint

    @property
    def private_state(self) -> State:
        """What this site keeps between rounds: its personal model and whatever else the method needs. Never leaves."""
        return self._private or {}

    def restore(self, private: State) -> None:
        """Go on with the private state of an interrupted run."""
        self._private = private or None

    def close(self) -> None:
        """The run is over: erase what could replay its last round."""
        self._journal.forget()

    def handle(self, request: bytes) -> bytes:
        """The answer to one request. Never raises for what a peer sent: a refusal is an answer with its reason."""
        try:
            match wire.decode_request(request):
                case wire.Begin() as begin:
                    reply: wire.Reply = wire.Answer(self._begin(begin))
                case wire.Step() as step:
                    reply = wire.Answer(self._step(step))
                case wire.Evaluate() as evaluate:
                    reply = self._evaluate(evaluate)
        except PolicyRefusal as error:
            reply = wire.Refusal("policy", str(error), final=True)
        except BudgetExhausted as error:
            reason = f"{error} (its limit is policy.max_epsilon, else privacy.target_epsilon)"
            reply = wire.Refusal("budget", reason, final=True)
        except NoGuarantee as error:
            reply = wire.Refusal("policy", str(error), final=True)
        except (AggregationError, wire.WireError) as error:
            reply = wire.Refusal("protocol", str(error), final=False)
        except (PrivfedError, ValueError) as error:
            reply = wire.Refusal("error", str(error), final=False)
        except PrivacyError as error:
            logger.error("%s: %s", self.name, error)  # its own log: the message names local files
            reply = wire.Refusal("error", "the site can not use its ledger", final=False)
        except Exception as error:
            # Whatever a peer's bytes set off, the site answers and goes on; what it was may hold records
            logger.error("%s: unexpected %s", self.name, type(error).__name__)
            reply = wire.Refusal("error", f"unexpected {type(error).__name__} at the site", final=False)
        if isinstance(reply, wire.Refusal):
            self._current = None
            logger.info("%s refuses: %s", self.name, reply.reason)
        return wire.encode(reply)

    def spent(self, delta: float) -> Epsilon:
        """ε of everything that the ledger holds for this site's records, all runs together."""
        return self._accountant.epsilon(self._ledger.charges(self.name, self._dataset), delta)

    @property
    def insecure_spends(self) -> bool:
        """Whether some release of this site, in whatever run, had noise that others can recompute: its ε is void."""
        return any(line.entry.insecure_seed for line in self._ledger.entries(self.name) if line.entry.kind == "charge")

    # One round

    def _begin(self, message: wire.Begin) -> bytes:
        plan, state = self._accept(message.plan, message.state)
        config = plan.config
        if not config.method.sends:
            raise wire.WireError("the run's method sends nothing: there is no round to begin")
        reason = config.method.guarantee(config.privacy.unit, config.privacy.noise)
        if reason is not None:
            raise NoGuarantee(reason)
        if config.privacy.unit is not PrivacyUnit.NONE and not self._charged(plan):
            prior = self._ledger.charges(self.name, self._dataset)
            expected = planned_charges(config, plan.noise_multiplier)
            self._afford(config, prior, expected)
        context = wire.context(message.plan, message.state)
        session = session_of(plan, context, len(state["theta"]))

        def vector() -> IntVector:
            return self._contribute(plan, state, context)

        if config.aggregation.kind == "plain":
            client: AggregationClient = PlainClient(
                session=session, index=self._index, vector=vector, journal=self._journal
            )
        elif config.aggregation.kind == "homomorphic":
            # From this site's own roster: who holds the key is not for the plan to say.
            key_holder = key_holder_of(config, self._roster)
            if key_holder is None or key_holder != plan.key_holder:
                raise wire.WireError("the plan names another key holder than this site's roster and the configuration")
            client = HomomorphicClient(
                session=session,
                key_holder=key_holder,
                identity=self._identity,
                roster=self._roster,
                vector=vector,
                journal=self._journal,
            )
        else:
            client = MaskedClient(
                session=session, identity=self._identity, roster=self._roster, vector=vector, journal=self._journal
            )
        self._current, self._begun = _Round(plan.round, client), (plan.run, plan.round)
        return client.receive(message.opening)

    def _step(self, message: wire.Step) -> bytes:
        # Fail closed: without this round's state there is nothing that may be said, least of all an unmasked vector.
        if self._current is None or self._current.round != message.round:
            raise wire.WireError(f"{self.name} has no round {message.round} in progress")
        return self._current.client.receive(message.payload)

    def _contribute(self, plan: wire.RoundPlan, state: State, context: bytes) -> IntVector:
        """int64[P]: the site's update, noised, charged and on the integer grid."""
        config = plan.config
        labels: tuple[bytes, ...] = (plan.round.to_bytes(8, "big"), plan.attempt.to_bytes(8, "big"))
        if not self._insecure:  # a known seed is for comparing runs: it gives every run the same noise
            labels += (bytes.fromhex(self._fingerprint), plan.run.encode(), context)
        key = noise.derive_key(self._noise_key, b"round", *labels)
        door = self._door(plan, noise.generator(key))
        update = config.method.contribute(state, door)
        expected = planned_charges(config, plan.noise_multiplier)
        if sorted(door.charges, key=repr) != sorted(expected, key=repr):
            raise PrivfedError(
                f"method {type(config.method).__name__} executed {door.charges}, declared {expected}: not released"
            )
        # An update without noise is booked as what it is: ε of these records is infinite from now on.
        charges = door.charges or (Charge(event=Gaussian(noise_multiplier=0.0)),)
        entry = Entry(
            site=self.name,
            dataset=self._dataset,
            run=plan.run,
            round=plan.round,
            attempt=plan.attempt,
            unit=config.privacy.unit,
            noise=config.privacy.noise,
            charges=charges,
            insecure_seed=self._insecure,
            metadata={"context": context.hex(), "records": self._fingerprint},
        )
        self._ledger.charge(entry, (lambda prior, new: self._afford(config, prior, new)) if door.charges else None)
        return grid_of(config).encode(update[0].numpy())

    def _evaluate(self, message: wire.Evaluate) -> wire.Measurement:
        plan, state = self._accept(message.plan, message.state)
        if self._measured is not None and self._measured[0] == plan.run and plan.round <= self._measured[1]:
            # Exact figures on models of someone's choice would be an oracle for single records: one answer a round.
            raise wire.WireError(f"{self.name} has measured round {plan.round} already")
        if plan.config.method.sends and self._begun != (plan.run, plan.round):
            raise wire.WireError(f"{self.name} measures the rounds that it took part in; it did not begin {plan.round}")
        self._measured = (plan.run, plan.round)
        self._current = None
        config, split = plan.config, self._split_of(plan.config)
        model = build_model(config, self._schema)
        if self._private is None:
            self._private = config.method.init_site(parameters.to_vector(model))
        local_door = self._local_door(config)
        self._private = config.method.personalize(state, self._private, local_door)
        if self._local_only is None:
            start = parameters.to_vector(model)
            alone = Local(steps=config.evaluation.local_steps, lr=config.evaluation.local_lr)
            self._local_only = alone.personalize(state, alone.init_site(start), local_door)["theta"]

        def outputs(theta: Tensor) -> Tensor:
            return evaluation.outputs_of(model, theta, split.test.inputs)

        def figure(theta: Tensor) -> float | None:
            return evaluation.score(outputs(theta), split.test.targets, config.evaluation.metric)

        epsilon = None if config.privacy.unit is PrivacyUnit.NONE else self.spent(config.privacy.delta).value
        if not self._policy.release_figures:
            return wire.Measurement(0, None, None, None, None, epsilon)
        loss = classification_loss(outputs(state["theta"]), split.test.targets)
        return wire.Measurement(
            records=len(split.test),
            loss=float(loss.mean()) if len(loss) else None,
            global_score=figure(state["theta"]),
            personalized=figure(self._private["theta"]),
            local_only=figure(self._local_only),
            epsilon=epsilon,
        )

    # What a plan may ask for

    def _accept(self, plan_bytes: bytes, state_bytes: bytes) -> tuple[wire.RoundPlan, State]:
        """The plan and the model, if this site takes part in them at all."""
        plan = wire.decode_plan(plan_bytes)
        check_policy(plan, self._policy, insecure=self._insecure)
        self._hold_to(plan)
        if plan.roster_version != self._roster.version:
            raise PolicyRefusal(
                f"the plan is for roster version {plan.roster_version}, this site has accepted {self._roster.version}"
            )
        if self._index not in plan.cohort:
            raise wire.WireError(f"{self.name} is not in the plan's cohort")
        size = parameter_count(plan.config, self._schema)
        if size > self._policy.max_parameters:
            raise PolicyRefusal(f"policy.max_parameters = {self._policy.max_parameters}, the plan's model has {size}")
        state = parameters.decode(state_bytes)
        theta = state.get("theta")
        if theta is None or theta.shape != (size,) or theta.dtype != torch.float32:
            raise wire.WireError(f"the model must be {size} float32 parameters for this site's table")
        if float(theta.abs().max()) > MAX_PARAMETER:
            raise wire.WireError(f"the model has parameters beyond ±{MAX_PARAMETER:g}: gradients lose their digits")
        return plan, state

    def _hold_to(self, plan: wire.RoundPlan) -> None:
        """Hold the plan to what its run began with, also after a restart: the ledger remembers it."""
        if self._run == (plan.run, plan.config, plan.noise_multiplier):
            return
        config = plan.config
        terms = hashlib.sha256(msgspec.msgpack.encode((config, plan.noise_multiplier))).hexdigest()
        entry = Entry(
            kind="run",
            site=self.name,
            dataset=self._dataset,
            run=plan.run,
            round=0,
            unit=config.privacy.unit,
            noise=config.privacy.noise,
            insecure_seed=self._insecure,
            metadata={"terms": terms, "method": str(type(config.method).__struct_config__.tag)},
        )
        try:
            self._ledger.begin_run(entry)
        except ChargeConflict:
            raise PolicyRefusal("the configuration of a run must not change between its rounds") from None
        if self._run is not None and self._run[0] != plan.run:
            self._split, self._private, self._local_only, self._measured = None, None, None, None
        self._run = (plan.run, config, plan.noise_multiplier)

    def _charged(self, plan: wire.RoundPlan) -> bool:
        """Whether this very attempt stands in the ledger: a process killed in it does it again, and pays once."""
        key = (plan.run, plan.round, plan.attempt)
        recorded = (line.entry for line in self._ledger.entries(self.name) if line.entry.kind == "charge")
        return any((entry.run, entry.round, entry.attempt) == key for entry in recorded)

    def _afford(self, config: Config, prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        """Raise `BudgetExhausted` unless the site's own budget allows ``new``; without one, the run's target holds."""
        budget = Budget(epsilon=config.privacy.target_epsilon, delta=config.privacy.delta)
        if self._policy.max_epsilon is not None:
            budget = Budget(epsilon=self._policy.max_epsilon, delta=self._policy.delta)
        budget.ensure(self._accountant, prior, new, site=self.name)

    # The doors

    def _split_of(self, config: Config) -> _Split:
        if self._split is None:
            data = self._data
            test = keyed_fraction(data.ids, key=self._split_key, label="test") < config.evaluation.test_fraction
            train = data.rows(~test)
            where = keyed_fraction(train.ids, key=self._split_key, label="parts")
            parts = {ALL: np.ones(len(train), dtype=bool)}
            low = 0.0
            for name, fraction in config.method.parts.items():
                parts[name] = (where >= low) & (where < low + fraction)
                low += fraction
            rows = {name: _tensor_rows(mask) for name, mask in parts.items()}
            self._split = _Split(train, data.rows(test), rows)
        return self._split

    def _records(self, config: Config) -> Records:
        split = self._split_of(config)
        return Records(split.train.inputs, split.train.targets, split.parts, split_id(config))

    def _door(self, plan: wire.RoundPlan, randomness: np.random.Generator) -> Door:
        """The door that the run's claim demands."""
        config = plan.config
        model = build_model(config, self._schema)
        if config.privacy.unit is PrivacyUnit.NONE:
            return PlainDoor(
                model=model,
                loss=classification_loss,
                records=self._records(config),
                sample_rate=config.privacy.sample_rate,
                randomness=randomness,
            )
        settings = DoorSettings(
            sample_rate=config.privacy.sample_rate,
            expected_batch_size=config.privacy.expected_batch_size,
            max_grad_norm=config.privacy.max_grad_norm,
            noise_multiplier=plan.noise_multiplier,
            part_fractions=config.method.parts,
        )
        return OpacusDoor(
            model=model,
            loss=classification_loss,
            records=self._records(config),
            settings=settings,
            randomness=randomness,
        )

    def _local_door(self, config: Config) -> Door:
        """Exact and full-batch, for models that never leave this site."""
        return PlainDoor(
            model=build_model(config, self._schema),
            loss=classification_loss,
            records=self._records(config),
            sample_rate=1.0,
            randomness=np.random.default_rng(0),
        )


def _tensor_rows(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask))
