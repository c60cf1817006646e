"""The round loop: broadcast, learn, aggregate, account, evaluate."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace

from privfed.crypto.aggregation import AggregationResult, AggregationServer, run_round
from privfed.crypto.errors import AggregationError, FaultyDealer, RemoteProtocolError
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.journal import Journal
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.plain import PlainServer
from privfed.crypto.roster import Roster
from privfed.privacy import noise
from privfed.privacy.clipping import AdaptiveSum
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import NoiseSite
from privfed.privacy.releases import Standardisation

from . import figures, wire
from .architecture import Schema, sent
from .cohort import Cohort, cohort_of, held_out
from .config import Config, SideNoise
from .engines.contract import Engine
from .errors import ConfigError
from .evaluation import Spread, fraction_hurt, spread
from .figures import Released
from .methods import State
from .methods.server import KEEPS, optimized
from .parameters import encode
from .schedule import Spending
from .standardisation import DEVIATION, MEAN, standardisation
from .terms import (
    Encoding,
    Update,
    checked_encoding,
    clip_rule,
    cohort_in,
    count_sum,
    key_holder_of,
    plan_encoding,
    session_of,
    side_encoding,
)

logger = logging.getLogger(__name__)

_CLIP = KEEPS + "clip"  # in the state: C of the next round, where it adapts


@dataclass(frozen=True)
class RoundReport:
    """What one round did.

    Attributes:
        round: its number, from 0.
        invited, contributed: names of sites.
        dropped: step → sites that did not answer it.
        refused: site → reason.
        aborted: why no sum was released; None when one was.
        bytes_up: aggregation bytes each contributing site sent, mean.
        measurements: what the sites measured on the new model; empty when this round was not evaluated.
        released: what all sites' noised counts say of the new model; None where they are not released.
        unseen: what the held-out sites measured.
        words: what the sites signed about their ledgers, by name; see seals.py.
        seconds: wall clock.
        noise_multiplier: σ/C of its updates; 0 without a claim.
        clip: C of its updates, where it adapts.
    """

    round: int
    invited: tuple[str, ...]
    contributed: tuple[str, ...]
    dropped: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]
    aborted: str | None
    bytes_up: float
    measurements: Mapping[str, wire.Measurement]
    seconds: float
    noise_multiplier: float = 0.0
    clip: float | None = None
    released: Released | None = None
    unseen: Mapping[str, wire.Measurement] = field(default_factory=dict)
    words: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def figures(self, name: str) -> Spread | None:
        """The spread over sites of ``loss``, ``global_score``, ``personalized`` or ``local_only``."""
        return spread([getattr(measured, name) for measured in self.measurements.values()])

    @property
    def epsilon(self) -> float | None:
        """The largest ε of any site, all its runs together."""
        spent = [m.epsilon for m in self.measurements.values() if m.epsilon is not None]
        return max(spent, default=None)

    def hurt(self, versus: str, *, lower_is_better: bool = False) -> float | None:
        """Share of sites whose personalised figure is worse than their ``local_only`` or ``global_score``."""
        ours = {site: measured.personalized for site, measured in self.measurements.items()}
        theirs = {site: getattr(measured, versus) for site, measured in self.measurements.items()}
        return fraction_hurt(ours, theirs, lower_is_better=lower_is_better)


@dataclass
class _Tally:
    """What the exchanges of one round brought up."""

    bytes_up: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class Federation:
    """The coordinator of one run: it sees sums, refusals and figures, never a record or (when masked) an update.

    Args:
        config: the run's configuration.
        run: its id.
        roster: the sites, by index; with homomorphic aggregation the key holder too.
        engine: carries bytes to them by name.
        noise_multiplier: σ/C, calibrated or given; 0 without a claim.
        spending: chooses it anew for each round; default none.
        side_noise: σ/C of what is released beside the updates.
        schema: what is public about every site's table; needed for standardised inputs alone.
        state: the server's state to start from.
        server_key: bytes[32], secret; a coordinator restarted with the same one goes on with a round that was cut
            short. Default fresh.
        journal: the homomorphic aggregator's own durable memory, and that of a server that adds the noise, for the
            same; default none beyond a round.
        done: the rounds before, where an interrupted run goes on.
        retired: sites that left it before, with their reasons.
        on_step: told of each message to sites, before it goes out: round, step, names.
        clock: monotonic seconds, for the report alone.
    """

    def __init__(
        self,
        *,
        config: Config,
        run: str,
        roster: Roster,
        engine: Engine,
        noise_multiplier: float,
        state: State,
        side_noise: SideNoise = SideNoise(),  # noqa: B008  # frozen
        schema: Schema | None = None,
        spending: Spending | None = None,
        done: Sequence[RoundReport] = (),
        server_key: bytes | None = None,
        journal: Journal | None = None,
        retired: Mapping[str, str] | None = None,
        on_step: Callable[[int, str, Sequence[str]], None] = lambda round, step, sites: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.run, self.state, self.next_round = config, run, state, len(done)
        self._roster, self._engine, self._noise_multiplier, self._clock = roster, engine, noise_multiplier, clock
        self._side_noise, self._schema = side_noise, schema
        self._spending, self._done, self._on_step = spending, list(done), on_step
        self._names = {index: member.name for index, member in enumerate(roster.members)}
        self.retired = dict(retired or {})
        self._server_key = server_key or noise.new_key()
        self._journal = journal
        try:
            self._key_holder = key_holder_of(config, roster)
        except ValueError as error:
            raise ConfigError(f"aggregation.key_holder: {error}") from None
        # A key holder that is no site is in the roster, but in no cohort.
        alone = self._key_holder if config.aggregation.key_holder is None else None
        everyone = {index: name for index, name in self._names.items() if index != alone}
        unseen = held_out(config, list(everyone.values()))
        self._sites = [index for index, name in everyone.items() if name not in unseen]
        self._unseen = [index for index, name in everyone.items() if name in unseen]
        self._features = schema.features if schema else 1
        self._sent = sent(config, self._features, len(state["theta"]))
        checked_encoding(config, cohort_of(config, len(self._sites)), int(self._sent.sum()), noise_multiplier)

    def rounds(self) -> Iterator[RoundReport]:
        """Run the rounds one by one, until all are done or too few sites are left. The state is current at each."""
        while self.next_round < self.config.rounds:
            if self._key_holder is not None and self._names[self._key_holder] in self.retired:
                logger.warning("the run ends before round %d: its key holder has left it", self.next_round + 1)
                return
            active = tuple(index for index in self._sites if self._names[index] not in self.retired)
            try:
                cohort = cohort_of(self.config, len(active))
                if self._spending is not None:
                    names = [self._names[index] for index in active]
                    self._noise_multiplier = self._spending.level(cohort, self._done, names)
                self._check_sums(cohort)
            except (ConfigError, NoGuarantee) as error:
                logger.warning(
                    "the run ends before round %d: %d of %d sites are left, too few for a sum (%s)",
                    self.next_round + 1,
                    len(active),
                    len(self._sites),
                    error,
                )
                return
            self._done.append(self._round(self.next_round, active, cohort))
            yield self._done[-1]

    def _check_sums(self, cohort: Cohort) -> None:
        """Return if all that the run adds up has a guarantee with this cohort: fewer sites carry more noise each.

        Raises:
            ConfigError, NoGuarantee: the reason.
        """
        checked_encoding(self.config, cohort, int(self._sent.sum()), self._noise_multiplier)
        sides: dict[wire.Purpose, float] = {"figures": self._side_noise.figures, "inputs": self._side_noise.inputs}
        for purpose, noise_multiplier in sides.items():
            if noise_multiplier and self.config.method.sends:
                count_sum(self.config, cohort, purpose, self._features, noise_multiplier)

    def _round(self, number: int, active: tuple[int, ...], cohort: Cohort) -> RoundReport:
        started = self._clock()
        plan = wire.RoundPlan(
            run=self.run,
            round=number,
            attempt=0,
            cohort=active,
            threshold=cohort.threshold,
            minimum_cohort=cohort.minimum_cohort,
            colluders=cohort.colluders,
            degree=cohort.degree,
            noise_multiplier=self._noise_multiplier,
            clip=self._clip,
            side_noise=self._side_noise,
            features=self._features,
            config=self.config,
            roster_version=self._roster.version,
            key_holder=self._key_holder,
        )
        tally, invited = _Tally(), active
        result: AggregationResult | None = None
        aborted: str | None = None
        if self.config.method.sends:
            try:
                if self.config.privacy.standardise_epsilon is not None and MEAN not in self.state:
                    self._standardise(plan, tally)
                encoding = plan_encoding(plan, len(self.state["theta"]))
                result = self._aggregate(plan, encoding, "update", tally)
                self._serve(result, encoding, plan)
            except AggregationError as error:
                result, aborted = None, str(error)
                if isinstance(error, FaultyDealer):
                    for index, by in error.accusers.items():
                        if not by:  # proved by the dealer's own signature; a bare complaint proves nothing
                            self.retired[self._names[index]] = "dealt shares that its own commitments disprove"
        self.next_round = number + 1
        last = self.next_round == self.config.rounds
        measurements: dict[str, wire.Measurement] = {}
        unseen: dict[str, wire.Measurement] = {}
        released: Released | None = None
        # A method that sends nothing trains where it evaluates: every round is one.
        active = tuple(index for index in active if self._names[index] not in self.retired)
        if last or not self.config.method.sends or self.next_round % self.config.evaluation.every == 0:
            released = self._figures(plan, tally) if result is not None else None
            measurements = self._evaluate(plan, active, tally)
            if self._unseen:
                unseen = self._evaluate(plan, tuple(self._unseen), _Tally())  # their refusals are no one's retirement
        contributors = result.contributors if result else ()
        names = tuple(self._names[index] for index in contributors)
        return RoundReport(
            round=number,
            invited=tuple(self._names[index] for index in invited),
            contributed=names,
            dropped={
                phase: tuple(self._names[index] for index in gone)
                for phase, gone in (result.dropped if result else {}).items()
                if gone
            },
            refused=dict(tally.refused),
            aborted=aborted,
            noise_multiplier=self._noise_multiplier,
            clip=plan.clip,
            bytes_up=math.fsum(tally.bytes_up.get(name, 0) for name in names) / len(names) if names else 0.0,
            measurements={name: replace(measured, seal=b"") for name, measured in measurements.items()},
            words={name: measured.seal for name, measured in measurements.items() if measured.seal},
            released=released,
            unseen={name: replace(measured, seal=b"") for name, measured in unseen.items()},
            seconds=self._clock() - started,
        )

    def _aggregate(
        self, plan: wire.RoundPlan, encoding: Encoding, purpose: wire.Purpose, tally: _Tally
    ) -> AggregationResult:
        """The integer sum of one attempt, over the engine."""
        number, plan_bytes, state = plan.round, wire.encode_plan(plan), encode(self._broadcast)
        session = session_of(plan, wire.context(plan_bytes, state), encoding, purpose)
        server: AggregationServer
        if self.config.aggregation.kind == "plain":
            server = PlainServer(session=session)
        elif self._key_holder is not None:
            server = HomomorphicServer(
                session=session, key_holder=self._key_holder, roster=self._roster, journal=self._journal
            )
        else:
            # A restarted coordinator must send what it sent before: sites answer each step of a round once.
            labels = (b"server", session.run.encode(), session.round.to_bytes(8, "big"), session.context)
            key = noise.derive_key(self._server_key, *labels)
            server = MaskedServer(session=session, roster=self._roster, entropy=lambda size: key[:size])
        begun: set[tuple[int, bool]] = set()  # a site that holds the key has two roles, and begins both

        def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
            holds_key = server.phase in KEY_HOLDER_STEPS
            messages: dict[int, wire.Request] = {
                index: wire.Step(number, server.phase, payload)
                if (index, holds_key) in begun
                else wire.Begin(number, server.phase, plan_bytes, state, payload, purpose)
                for index, payload in requests.items()
            }
            begun.update((index, holds_key) for index in requests)
            answers = self._ask(messages, tally)
            payloads = {index: reply.payload for index, reply in answers.items() if isinstance(reply, wire.Answer)}
            for index, payload in payloads.items() if not holds_key else ():
                name = self._names[index]
                tally.bytes_up[name] = tally.bytes_up.get(name, 0) + len(payload)
            return payloads

        def on_bad(index: int, error: RemoteProtocolError) -> None:
            tally.refused[self._names[index]] = f"sent an invalid message: {error}"

        return run_round(server, exchange, on_bad)

    @property
    def _clip(self) -> float | None:
        """C of the next round, where it adapts."""
        if self.config.privacy.clip == "fixed":
            return None
        return float(self.state[_CLIP]) if _CLIP in self.state else self.config.privacy.max_update_norm

    def _serve(self, result: AggregationResult, encoding: Update, plan: wire.RoundPlan) -> None:
        number = plan.round
        # Noise of this very sum: a restart repeats it, and another sum in its place would not share it
        digest = hashlib.sha256(result.total.tobytes()).digest()
        labels = (self.run.encode(), number.to_bytes(8, "big"), digest)
        if self.config.privacy.noise is NoiseSite.CENTRAL and self._journal is not None:
            # Nor may there be another one: sites that were late before a crash would make it a second release
            sid = hashlib.sha256(b"central noise" + b"".join(labels[:2])).digest()
            self._journal.begin(sid, f"{self.run}/central noise", number, 0)
            self._journal.answer(sid, "sum", digest, digest)
        total = encoding.add_noise(result.total, noise.derive_key(self._server_key, b"noise", *labels))
        mean = torch.zeros(len(self._sent))
        mean[self._sent] = torch.from_numpy(encoding.decode(total, summands=len(result.contributors))).float()
        progress = number / self.config.rounds
        beside = {name: self.state[name] for name in (MEAN, DEVIATION) if name in self.state}
        step, kept = optimized(self.config.server, self.state, mean)
        rule = clip_rule(self.config, cohort_in(plan), plan.noise_multiplier)
        if rule is not None and isinstance(encoding, AdaptiveSum):
            clip = rule.next_clip(encoding.clip, encoding.count(total), len(result.contributors))
            kept = {**kept, _CLIP: torch.tensor(clip, dtype=torch.float64)}
        self.state = {**self.config.method.serve(self.state, step, progress), **beside, **kept}

    @property
    def _broadcast(self) -> State:
        """What sites are sent of the state."""
        return {name: tensor for name, tensor in self.state.items() if not name.startswith(KEEPS)}

    def _standardise(self, plan: wire.RoundPlan, tally: _Tally) -> None:
        """Have the sites' noised moments in the state, before the first model is trained on them."""
        assert self._schema is not None  # api gives it
        encoding = side_encoding(plan, "inputs")
        result = self._aggregate(plan, encoding, "inputs", tally)
        assert isinstance(encoding.release, Standardisation)
        self.state = {**self.state, **standardisation(self._schema, encoding.release, result.total)}

    def _figures(self, plan: wire.RoundPlan, tally: _Tally) -> Released | None:
        """What the sites' noised counts say of the new model."""
        if self.config.evaluation.release != "private":
            return None
        encoding = side_encoding(plan, "figures")
        try:
            result = self._aggregate(plan, encoding, "figures", tally)
        except AggregationError as error:
            logger.warning("round %d has no figures: %s", plan.round + 1, error)
            return None
        return figures.read(self.config, result.total, encoding.share_variance * len(result.contributors))

    def _evaluate(self, plan: wire.RoundPlan, active: tuple[int, ...], tally: _Tally) -> dict[str, wire.Measurement]:
        # Sites that gave up contributing still measure: they get the model like the others.
        state, plan_bytes = encode(self._broadcast), wire.encode_plan(plan)
        messages: dict[int, wire.Request] = {
            index: wire.Evaluate(plan.round, "evaluate", plan_bytes, state) for index in active
        }
        replies = self._ask(messages, tally)
        return {self._names[index]: reply for index, reply in replies.items() if isinstance(reply, wire.Measurement)}

    def _ask(self, messages: Mapping[int, wire.Request], tally: _Tally) -> dict[int, wire.Reply]:
        """The sites' replies, by index. A refusal is noted; a reply that is none of ours counts as no reply."""
        requests = wire.Requests({self._names[index]: message for index, message in messages.items()})
        for message in list(messages.values())[:1]:  # all are of one step
            self._on_step(message.round, message.step, tuple(requests))
        raw = self._engine.exchange(requests, self.config.simulation.deadline_seconds)
        replies: dict[int, wire.Reply] = {}
        for index in messages:
            name = self._names[index]
            if name not in raw:
                continue
            try:
                reply = wire.decode_reply(raw[name])
            except wire.WireError as error:
                tally.refused[name] = str(error)
                continue
            if isinstance(reply, wire.Refusal):
                tally.refused.setdefault(name, reply.reason)
                if reply.final:
                    self.retired[name] = reply.reason
                logger.info("%s refuses: %s", name, reply.reason)
            else:
                replies[index] = reply
        return replies
