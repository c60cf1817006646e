"""One hospital: what it does with one message.

Engines call `Site.handle` with bytes and carry back the bytes it returns. Everything a site promises happens here or
below: its policy and its budget are checked before anything is learned, records are reached only through the door, and
the ledger has the spend on disk before the vector that it paid for exists in any message.
"""

import hashlib
import logging
from collections.abc import Callable, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfed.crypto.aggregation import AggregationClient, among
from privfed.crypto.errors import AggregationError
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.journal import Journal
from privfed.crypto.keys import Verify, verify
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.packing import IntVector
from privfed.crypto.plain import PlainClient
from privfed.crypto.roster import Identity, Roster
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import BudgetExhausted, NoGuarantee, PrivacyError
from privfed.privacy.events import Charge, PrivacyUnit
from privfed.privacy.ledger import Ledger, utc_now
from privfed.privacy.oracle.door import Door
from privfed.privacy.oracle.together import Oracle
from privfed.privacy.releases import Standardisation
from privfed.privacy.selftest import SelfTest, SelfTestFailed
from privfed.privacy.shared import CountSum

from . import evaluation, figures, parameters, wire
from .architecture import Schema, build_model, first_states, parameter_count, start_vector, update_size
from .cohort import held_out
from .config import Config, Policy, SideNoise
from .contribution import Contribution, contribute
from .data.records import SiteData
from .doors import Network, Split, check_units, few, local_door, split
from .errors import PrivfedError
from .grid import Grid
from .interrupted import Interrupted
from .methods import Local, State
from .policy import OutsideHours, PolicyRefusal, check_hours, check_policy, check_size
from .site_book import Attempt, SiteBook
from .standardisation import DEVIATION, MEAN, check_standardisation, inputs_range, unit_means
from .terms import Summand, key_holder_of, plan_encoding, planned_charges, session_of, side_charge, side_encoding

logger = logging.getLogger(__name__)

MAX_PARAMETER = 1e4


@dataclass
class _Round(Attempt):
    """And how far it is."""

    client: AggregationClient | None = None
    in_shares: bool = False  # the final charge depends on who contributes


class _Replayable:
    """A journal whose sessions stay replayable until the next one begins.

    An answered round may have to be answered again, byte for byte, after a crash that lost the coordinator's last
    round. The next round's begin, or `forget`, erases the seed.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._last: dict[str, bytes] = {}  # run → its last session; a run's side sums are runs of their own

    def begin(self, sid: bytes, run: str, round: int, attempt: int) -> bytes:
        seed = self._journal.begin(sid, run, round, attempt)
        self._last[run] = sid
        return seed

    def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
        self._journal.answer(sid, step, request_digest, reply_digest)

    def finish(self, sid: bytes) -> None:
        """Not yet."""

    def forget(self) -> None:
        for sid in self._last.values():
            self._journal.finish(sid)
        self._last.clear()


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
        pool: `workers` that share the encryption of a long vector.
        clock: gives an aware datetime, for the dates on what it signs.
        self_test: of its noise; shared among simulated sites, which share the code.
        network: makes the model and the loss that gradients come from, instead of the run's own; for audits alone.
        oracle: computes gradients for simulated sites together; None at a real site, which computes its own.
        verify: of signatures; simulated sites share one that remembers, as they check the same ones.
        baselines: models of sites alone, by what they follow from; a study's runs share them. None at a real site.

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
        pool: Executor | None = None,
        clock: Callable[[], datetime] = utc_now,
        self_test: SelfTest | None = None,
        network: Callable[[], Network] | None = None,
        oracle: Oracle | None = None,
        verify: Verify = verify,
        baselines: MutableMapping[bytes, Tensor] | None = None,
    ) -> None:
        self.name = identity.name
        self._identity, self._roster = identity, roster
        self._index = roster.index_of(identity.member.secagg_key)
        self._data, self._schema = data, schema
        self._fingerprint = data.fingerprint(fingerprint_key)
        # One book for a site, whatever its table holds today: a record that was there last year is still in it after
        # another was added, and its ε must not start again.
        self.book = SiteBook(
            name=self.name,
            dataset=noise.derive_key(fingerprint_key, b"ledger", self.name.encode()).hex(),
            records=self._fingerprint,
            ledger=ledger,
            accountant=accountant,
            policy=policy,
            insecure=insecure,
        )
        self._begun: tuple[str, int] | None = None
        self._measured: tuple[str, int] | None = None
        self._journal, self._pool, self._clock = _Replayable(journal), pool, clock
        self._self_test, self._verify = self_test or SelfTest(), verify
        self._network, self._oracle = network, oracle
        self._noise_key, self._split_key = noise_key, split_key
        self._insecure, self._policy = insecure, policy
        self._run: tuple[str, tuple[Config, float | None, SideNoise]] | None = None
        self._split: Split | None = None
        self._private: State | None = None
        self._shared: State | None = None  # what the round in progress began with
        self._after: tuple[int, State] | None = None  # a round, and the shared state after it
        self._local_only: Tensor | None = None
        self._baselines = {} if baselines is None else baselines
        self._current: _Round | None = None

    @property
    def fingerprint(self) -> str:
        """Keyed hash of the records, in hex: a resumed run must find the same ones."""
        return self._fingerprint

    @property
    def private_state(self) -> State:
        """What this site keeps between rounds: its personal model and whatever else the method needs. Never leaves."""
        return self._private or {}

    @property
    def shared_state(self) -> State:
        """What the next round's update may depend on, beside the model: made of the door's answers, never of more."""
        return self._after[1] if self._after else self._shared or {}

    def restore(self, private: State, shared: State) -> None:
        """Go on with the states of an interrupted run, as they stood before the round that is next."""
        self._private, self._shared, self._after = private or None, shared or None, None

    def close(self) -> None:
        """The run is over: erase what could replay its last round."""
        self._journal.forget()

    def suspend(self) -> Interrupted | None:
        """What this site knows of the round that it began last, for a process that ends between two messages.

        None if it has begun none. States, books and spends are elsewhere.
        """
        if self._begun is None:
            return None
        client = self._current.client if self._current is not None else None
        return Interrupted(
            machine=client.suspend() if isinstance(client, MaskedClient) else b"",
            in_shares=self._current is not None and self._current.in_shares,
            contributed=self._after is not None and self._after[0] == self._begun[1],
        )

    def resume(self, begin: wire.Begin, left: Interrupted) -> None:
        """Go on in the round that ``begin`` began where `suspend` left it; the states are restored before.

        The plan is checked again: a policy that was made stricter since counts.

        Raises:
            PrivfedError, AggregationError: it can not be gone on with; nothing was done.
        """
        plan = wire.decode_plan(begin.plan)
        self._begun = (plan.run, plan.round)
        plan, state = self._accept(begin.plan, begin.state)
        if left.contributed:
            self._after = (plan.round, self._shared or {})
        if left.machine:
            current = self._attempt(begin, plan, state)
            current.in_shares = left.in_shares
            client = self._client(current, state)
            if not isinstance(client, MaskedClient):
                raise wire.WireError("only a masked round is gone on with in another process")
            client.resume(left.machine)
            current.client, self._current = client, current

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
            reply = wire.Refusal("policy", str(error), final=not isinstance(error, OutsideHours))
        except BudgetExhausted as error:
            reason = f"{error} (its limit is policy.max_epsilon, else privacy.target_epsilon)"
            reply = wire.Refusal("budget", reason, final=True)
        except NoGuarantee as error:
            reply = wire.Refusal("policy", str(error), final=True)
        except (AggregationError, wire.WireError) as error:
            reply = wire.Refusal("protocol", str(error), final=False)
        except (PrivfedError, ValueError) as error:
            reply = wire.Refusal("error", str(error), final=False)
        except SelfTestFailed as error:
            logger.error("%s: %s", self.name, error)
            reply = wire.Refusal("error", "the site's noise failed its self-test", final=True)
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

    # One round

    def _begin(self, message: wire.Begin) -> bytes:
        plan, state = self._accept(message.plan, message.state)
        config = plan.config
        if not config.method.sends:
            raise wire.WireError("the run's method sends nothing: there is no round to begin")
        reason = config.method.guarantee(config.privacy.unit, config.privacy.noise)
        if reason is not None:
            raise NoGuarantee(reason)
        check_units(config, self._data)
        current = self._attempt(message, plan, state)
        if config.privacy.unit is not PrivacyUnit.NONE and not self.book.has(current):
            self.book.require_affordable(current, self._planned(current))
            if message.purpose == "update" and config.privacy.schedule != "constant":
                size = update_size(config, plan.features, parameter_count(config, self._schema))
                self.book.require_pace(current, size)
        current.client = self._client(current, state)
        self._current, self._begun = current, (plan.run, plan.round)
        return current.client.receive(message.opening)

    def _attempt(self, message: wire.Begin, plan: wire.RoundPlan, state: State) -> "_Round":
        context = wire.context(message.plan, message.state)
        return _Round(plan, message.purpose, context, self._encoding(plan, state, message.purpose))

    def _encoding(self, plan: wire.RoundPlan, state: State, purpose: wire.Purpose) -> Summand:
        if purpose == "update":
            return plan_encoding(plan, len(state["theta"]))
        if plan.features != self._schema.features:
            raise wire.WireError(f"the plan is for {plan.features} inputs, this site's table has others")
        return side_encoding(plan, purpose)

    def _planned(self, current: "_Round") -> tuple[Charge, ...]:
        config, encoding = current.plan.config, current.encoding
        if isinstance(encoding, CountSum):
            return (side_charge(config, encoding, current.purpose),)
        return planned_charges(config, encoding, current.plan.noise_multiplier)

    def _client(self, current: "_Round", state: State) -> AggregationClient:
        """This site's machine in the plan's aggregation."""
        plan, config = current.plan, current.plan.config
        session = session_of(plan, current.context, current.encoding, current.purpose)

        def vector() -> IntVector:
            return self._contribute(current, state)

        if config.aggregation.kind == "plain":
            return PlainClient(session=session, index=self._index, vector=vector, journal=self._journal)
        if config.aggregation.kind == "masked":
            return MaskedClient(
                session=session,
                identity=self._identity,
                roster=self._roster,
                vector=vector,
                journal=self._journal,
                verify=self._verify,
            )
        # From this site's own roster: who holds the key is not for the plan to say.
        key_holder = key_holder_of(config, self._roster)
        if key_holder is None or key_holder != plan.key_holder:
            raise wire.WireError("the plan names another key holder than this site's roster and the configuration")
        return HomomorphicClient(
            session=session,
            key_holder=key_holder,
            identity=self._identity,
            roster=self._roster,
            vector=vector,
            journal=self._journal,
            pool=self._pool,
        )

    def _step(self, message: wire.Step) -> bytes:
        # Fail closed: without this round's state there is nothing that may be said, least of all an unmasked vector.
        current = self._current
        if current is None or current.client is None or current.plan.round != message.round:
            raise wire.WireError(f"{self.name} has no round {message.round} in progress")
        reply = current.client.receive(message.payload)
        if current.in_shares and isinstance(current.client, MaskedClient) and current.client.summed:
            (planned,) = self._planned(current)
            self.book.settle(current, planned, current.client.summed)
        return reply

    def _contribute(self, current: "_Round", state: State) -> IntVector:
        """int64[dim]: what the site adds to the sum, noised, charged and as integers."""
        self._test_noise(current.encoding)
        plan = current.plan
        labels: tuple[bytes, ...] = (plan.round.to_bytes(8, "big"), plan.attempt.to_bytes(8, "big"))
        if not self._insecure:  # a known seed is for comparing runs: it gives every run the same noise
            labels += (bytes.fromhex(self._fingerprint), plan.run.encode(), current.context)
        purpose = b"round" if current.purpose == "update" else current.purpose.encode()
        key = noise.derive_key(self._noise_key, purpose, *labels)
        try:
            given = self._given(current, state, key)
        except (PrivfedError, PrivacyError):
            raise  # about the plan and its method
        except Exception:
            # It may be about a record, and the refusal tells that it happened: that is not for nothing
            if planned := self._planned(current):
                self.book.book(current, planned, in_shares=False)
            raise
        current.in_shares = given.in_shares
        self.book.book(current, given.charges, in_shares=given.in_shares)
        if current.purpose == "update":
            self._after = (plan.round, given.shared)
        return given.vector

    def _shared_before(self, plan: wire.RoundPlan) -> State:
        """The shared state that ``plan``'s round begins with: the same one when a round is done again.

        Raises:
            WireError: the round lies before the last one, and what it began with is gone.
        """
        if self._after is not None and self._after[0] < plan.round:
            self._shared, self._after = self._after[1], None
        if self._after is not None and self._after[0] > plan.round and self._after[1]:
            raise wire.WireError(f"{self.name} is at round {self._after[0]}: it can not go back to {plan.round}")
        return self._states(plan.config)[0]

    def _states(self, config: Config) -> tuple[State, State]:
        """Shared and private state; those that a site begins a run with where it has none yet."""
        if self._shared is None or self._private is None:
            shared, private = first_states(config, self._schema)
            self._shared = shared if self._shared is None else self._shared
            self._private = private if self._private is None else self._private
        return self._shared, self._private

    def _test_noise(self, encoding: Summand) -> None:
        """Have this site's share of noise tested before it is relied on.

        Raises:
            SelfTestFailed: it is not what would be booked.
        """
        if isinstance(encoding, Grid) or (not isinstance(encoding, CountSum) and encoding.at_server):
            return  # no share
        variance = encoding.share_variance if isinstance(encoding, CountSum) else encoding.noise.share_variance
        self._self_test.ensure(type(encoding), encoding.encode_nothing, variance)

    def _given(self, current: "_Round", state: State, key: bytes) -> Contribution:
        config, encoding = current.plan.config, current.encoding
        records = self._records(config, state)
        if isinstance(encoding, CountSum):
            counts = self._counts(config, state, records, encoding)
            return Contribution(encoding.encode(counts, key), self._planned(current), in_shares=True)
        return contribute(
            config,
            self._schema,
            records,
            state,
            self._shared_before(current.plan),
            encoding,
            noise_multiplier=current.plan.noise_multiplier,
            key=key,
            network=self._network() if self._network is not None else None,
            oracle=self._oracle,
        )

    def _counts(self, config: Config, state: State, records: Split, encoding: CountSum) -> NDArray[np.int64]:
        """int64[dim]: counts of the model's figures, or moments of the inputs."""
        if isinstance(encoding.release, Standardisation):
            low, high = inputs_range(self._schema)
            moments = Standardisation(lower=low, upper=high, steps=encoding.release.steps)
            return moments.encode(unit_means(config, self._split_of(config).train))
        outputs = evaluation.outputs_of(build_model(config, self._schema), state["theta"], records.test.inputs)
        return figures.counted(config, records.test, outputs)

    def _evaluate(self, message: wire.Evaluate) -> wire.Measurement:
        plan, state = self._accept(message.plan, message.state, measuring=True)
        unseen = self._held_out(plan.config)
        if unseen and plan.round >= plan.config.rounds:
            # It spends nothing: without an end it would answer for ever
            raise wire.WireError(f"the plan is for round {plan.round} of a run of {plan.config.rounds}")
        if self._measured is not None and self._measured[0] == plan.run and plan.round <= self._measured[1]:
            # Exact figures on models of someone's choice would be an oracle for single records: one answer a round.
            raise wire.WireError(f"{self.name} has measured round {plan.round} already")
        if plan.config.method.sends and not unseen and self._begun != (plan.run, plan.round):
            raise wire.WireError(f"{self.name} measures the rounds that it took part in; it did not begin {plan.round}")
        self._measured = (plan.run, plan.round)
        self._current = None
        config, records = plan.config, self._records(plan.config, state)
        if unseen and config.evaluation.unseen_records is not None:
            records = few(config, records, config.evaluation.unseen_records, self._split_key)
        model = build_model(config, self._schema)
        _, private = self._states(config)
        door = local_door(config, self._schema, records, oracle=self._oracle)
        # A copy: exact steps must not get into what the next update is made of, by accident either
        shared = {name: tensor.clone() for name, tensor in self.shared_state.items()}
        self._private = config.method.personalize(state, shared, private, door)
        if self._local_only is None:
            self._local_only = self._alone(config, start_vector(config, self._schema), records, state, door)

        def outputs(theta: Tensor) -> Tensor:
            return evaluation.outputs_of(model, theta, records.test.inputs)

        def figure(given: Tensor) -> float | None:
            return config.task.score(given, records.test.targets, config.metric)

        spent = self.book.spent(config.privacy.delta)
        epsilon = None if config.privacy.unit is PrivacyUnit.NONE else spent.value
        word = self.book.sealed(plan, spent, time=self._clock(), private=self._identity.ledger_private)
        if not self._policy.release_figures or not self._shows_figures(config):
            return wire.Measurement(0, None, None, None, None, epsilon, word)
        common = outputs(state["theta"])
        loss = config.task.loss(common, records.test.targets)
        return wire.Measurement(
            records=len(records.test),
            loss=float(loss.mean()) if len(loss) else None,
            global_score=figure(common),
            personalized=figure(outputs(self._private["theta"])),
            local_only=figure(outputs(self._local_only)),
            epsilon=epsilon,
            seal=word,
        )

    def _alone(self, config: Config, start: Tensor, records: Split, state: State, door: Door) -> Tensor:
        """float32[P]: the model of this site without the others."""
        alone = Local(steps=config.evaluation.local_steps, lr=config.evaluation.local_lr)
        terms = msgspec.msgpack.encode((alone, config.model, config.transfer, config.task, config.simulation.engine))
        follows_from = hashlib.sha256(terms)
        for tensor in (start, records.train.inputs, records.train.targets):
            follows_from.update(repr((tensor.dtype, tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        name = follows_from.digest()
        if name not in self._baselines:
            self._baselines[name] = alone.personalize(state, {}, {"theta": start}, door)["theta"]
        return self._baselines[name]

    def _shows_figures(self, config: Config) -> bool:
        """Whether the run wants this site's own exact figures."""
        if config.evaluation.release == "public-cohort":
            return self.name in config.evaluation.public_sites
        return config.evaluation.release == "internal"

    # What a plan may ask for

    def _held_out(self, config: Config) -> bool:
        """Whether the configuration holds this site out of training."""
        members = enumerate(self._roster.members)
        return self.name in held_out(config, (member.name for index, member in members if index != self._aside(config)))

    def _aside(self, config: Config) -> int | None:
        """The roster index of a key holder that is no site."""
        return key_holder_of(config, self._roster) if config.aggregation.key_holder is None else None

    def _accept(
        self, plan_bytes: bytes, state_bytes: bytes, *, measuring: bool = False
    ) -> tuple[wire.RoundPlan, State]:
        """The plan and the model, if this site takes part in them at all."""
        plan = wire.decode_plan(plan_bytes)
        check_policy(plan, self._policy, insecure=self._insecure)
        if self._begun != (plan.run, plan.round):  # what was begun in time is done to its end
            check_hours(self._policy, self._clock().astimezone())
        self._hold_to(plan)
        if plan.roster_version != self._roster.version:
            raise PolicyRefusal(
                f"the plan is for roster version {plan.roster_version}, this site has accepted {self._roster.version}"
            )
        if self._held_out(plan.config):
            if not measuring:
                raise wire.WireError(f"{self.name} is held out of the training of this run")
        elif not among(plan.cohort, self._index):
            raise wire.WireError(f"{self.name} is not in the plan's cohort")
        size = check_size(plan.config, self._schema, self._policy)
        state = parameters.decode(state_bytes)
        theta = state.get("theta")
        if theta is None or theta.shape != (size,) or theta.dtype != torch.float32:
            raise wire.WireError(f"the model must be {size} float32 parameters for this site's table")
        for name, tensor in state.items():
            # What a method adds to a model, control variates or rates, leads as far away as the model itself
            if tensor.shape == theta.shape and float(tensor.abs().max()) > MAX_PARAMETER:
                raise wire.WireError(f"the model has {name} beyond ±{MAX_PARAMETER:g}: gradients lose their digits")
        check_standardisation(plan.config, self._schema, state)
        return plan, state

    def _hold_to(self, plan: wire.RoundPlan) -> None:
        """Hold the plan to what its run began with, also after a restart: the ledger remembers it."""
        # "spend" chooses the noise round by round; what it may come to is the budget's and the pace's to say
        fixed = plan.noise_multiplier if plan.config.privacy.schedule == "constant" else None
        promised = (plan.config, fixed, plan.side_noise)
        if self._run == (plan.run, promised):
            return
        self.book.begin_run(plan)
        if self._run is not None and self._run[0] != plan.run:
            self._split, self._private, self._local_only, self._measured = None, None, None, None
            self._shared, self._after = None, None
        self._run = (plan.run, promised)

    # The doors

    def _records(self, config: Config, state: State) -> Split:
        """The site's records as the run's model sees them."""
        records = self._split_of(config)
        if MEAN not in state:
            return records
        return records.standardised(state[MEAN], state[DEVIATION])

    def _split_of(self, config: Config) -> Split:
        if self._split is None:
            self._split = split(config, self._data, self._split_key)
        return self._split
