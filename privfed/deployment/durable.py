"""A site whose process may be killed at any instant: what it knows between two rounds stands on its own disk."""

import hashlib
import logging
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load, save

from privfed import wire
from privfed.config import Target
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.data.tables import Table
from privfed.interrupted import Interrupted
from privfed.key_holder import KeyHolder
from privfed.methods import State
from privfed.site import Site

from . import files, papers

logger = logging.getLogger(__name__)


class _Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a run stands at this site.

    Args:
        run: its id.
        round: the last one that this site began or measured.
        measured: digest of the last question for figures, and of what round; None if there was none.
    """

    run: str
    round: int
    measured: str | None = None
    measured_round: int = -1


class DurableSite:
    """`Site`, with its states kept from job to job.

    A round that was cut short is done again with the states that it began with; the next round begins with those after
    it. Both stand on disk before a reply leaves that rests on them.

    Args:
        key_holder: this site in its second role, for runs that name it; it has no states.
        states: folder for them; personal models are in it, for their owner alone.
        data, task: what this site agreed to read; a run over another table is refused.

    Guarantees:
        Whatever `Site` guarantees, also over restarts of its process. The same question for figures gets the same
        answer, and no second one about a round is answered: a restart is no new chance to ask. A run whose states were
        lost is not gone on with.
    """

    def __init__(self, site: Site, key_holder: KeyHolder, states: Path, *, data: Table, task: Target) -> None:
        self.site, self._key_holder = site, key_holder
        self._states, self._data, self._task = states, papers.agreed(data), task
        self._facts: _Facts | None = None
        self._kept: tuple[State, State] | None = None

    def resume(self, begin: bytes, left: Interrupted) -> None:
        """Go on in another process in the round that ``begin`` began, where `Site.suspend` left it.

        Raises:
            PrivfedError, AggregationError: it can not be gone on with, and nothing was done. Then make a new one.
        """
        message = wire.decode_request(begin)
        if not isinstance(message, wire.Begin):
            raise wire.WireError("a round is begun by another message")
        plan = wire.decode_plan(message.plan)
        self._name = _name(plan.run)
        facts = self._read_facts()
        if facts is None or (facts.run, facts.round) != (plan.run, plan.round) or self._refusal(plan) is not None:
            raise wire.WireError("the site's own notes are of another round")
        self._facts = facts
        self._restore("after" if left.contributed else "before")
        self.site.resume(message, left)

    def handle(self, request: bytes) -> bytes:
        try:
            return self._handle(request)
        except (files.DeploymentError, OSError) as error:  # a disk that is full: nothing leaves that rests on it
            logger.error("%s: %s", self.site.name, error)  # its own log: the message names local files
            return wire.encode(wire.Refusal("error", "the site can not use its own disk", final=False))

    def _handle(self, request: bytes) -> bytes:
        try:
            message = wire.decode_request(request)
            plan = None if isinstance(message, wire.Step) else wire.decode_plan(message.plan)
        except wire.WireError:
            return self.site.handle(request)  # it says what is wrong
        if plan is not None:
            if (reason := self._refusal(plan)) is not None:
                return wire.encode(wire.Refusal("policy", reason, final=True))
        if message.step in KEY_HOLDER_STEPS:
            return self._key_holder.handle(request)
        if plan is not None:
            if (stale := self._enter(plan)) is not None:
                return wire.encode(wire.Refusal("protocol", stale, final=False))
        if not isinstance(message, wire.Evaluate):
            reply = self.site.handle(request)
            self._keep()
            return reply
        return self._measure(request, message.round)

    def _measure(self, request: bytes, round: int) -> bytes:
        assert self._facts is not None  # an Evaluate has a plan, and was entered
        question = hashlib.sha256(request).hexdigest()
        answer = self._path("answer")
        if self._facts.measured == question and answer.exists():
            # The round was done again: its personal model is learnt already
            self._restore("measured")
            self._write("after")
            return files.read(answer, private=True)
        if round <= self._facts.measured_round:
            return wire.encode(
                wire.Refusal("protocol", f"{self.site.name} has measured round {round} already", final=False)
            )
        # First that it was asked: a kill in between may cost this round's figures, and never gives two answers
        self._note(msgspec.structs.replace(self._facts, measured=question, measured_round=round))
        reply = self.site.handle(request)
        self._write("measured")
        self._keep()
        files.write(answer, reply, private=True)
        return reply

    def _refusal(self, plan: wire.RoundPlan) -> str | None:
        config = plan.config
        if not isinstance(config.data, Table) or papers.agreed(config.data) != self._data:
            return "the run reads other columns, ranges or classes than this site agreed to: see its consortium.toml"
        if config.task != self._task:
            return "the run has another task than this site agreed to: see its consortium.toml"
        return None

    def _enter(self, plan: wire.RoundPlan) -> str | None:
        """Have the states in place that the plan's round begins with; or the reason why that can not be."""
        if self._facts is None:
            self._name = _name(plan.run)
            found = self._read_facts()
            if found is None and self.site.book.knows(plan.run):
                # With its old states gone a round done again would be another update under the same noise
                return f"{self.site.name} has lost its working memory of this run: begin a new run"
            self._facts = found or _Facts(plan.run, -1)
            # The round that was under way is done again as it began; a later one begins after it
            self._restore("before" if plan.round == self._facts.round else "after")
        if self._facts.run != plan.run:
            return f"{self.site.name} works on another run in this job"
        if plan.round < self._facts.round:
            return f"{self.site.name} is at round {self._facts.round}: it can not go back to {plan.round}"
        if plan.round > self._facts.round:
            self._write("before")
            self._note(msgspec.structs.replace(self._facts, round=plan.round))
        return None

    def _keep(self) -> None:
        """Have the states on disk if they have changed: before the reply leaves that they belong to."""
        now = (self.site.private_state, self.site.shared_state)
        if self._facts is None or (
            self._kept is not None and all(old is new for old, new in zip(self._kept, now, strict=True))
        ):
            return
        self._write("after")
        self._kept = now

    def _note(self, facts: _Facts) -> None:
        files.write(self._path("json"), msgspec.json.encode(facts), private=True)
        self._facts = facts

    def _read_facts(self) -> _Facts | None:
        path = self._path("json")
        return msgspec.json.decode(files.read(path, private=True), type=_Facts) if path.exists() else None

    def _write(self, when: str) -> None:
        tensors = {f"private/{name}": tensor.contiguous() for name, tensor in self.site.private_state.items()}
        tensors |= {f"shared/{name}": tensor.contiguous() for name, tensor in self.site.shared_state.items()}
        files.write(self._path(when), save(tensors), private=True)

    def _restore(self, when: str) -> None:
        path = self._path(when)
        if not path.exists():
            return
        try:
            tensors = load(files.read(path, private=True))
        except SafetensorError:
            raise files.DeploymentError(f"{path} is damaged: restore it from your copy") from None
        owned: dict[str, dict[str, object]] = {"private": {}, "shared": {}}
        for key, tensor in tensors.items():
            owner, _, name = key.partition("/")
            owned[owner][name] = tensor
        self.site.restore(owned["private"], owned["shared"])  # type: ignore[arg-type]  # tensors, all of them
        self._kept = (self.site.private_state, self.site.shared_state)

    def _path(self, what: str) -> Path:
        return self._states / f"{self._name}.{what}"


def forget(states: Path, run: str) -> None:
    """Have a run not gone on with; its personal model stays. What a site kept of it is of another history."""
    (states / f"{_name(run)}.json").unlink(missing_ok=True)


def _name(run: str) -> str:
    """What a run's files are called."""
    return hashlib.sha256(run.encode()).hexdigest()[:32]
