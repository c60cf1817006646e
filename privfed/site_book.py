"""What one site may spend, and what it writes down of it: its budget, its policy's limits, its chain in the ledger."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.adversaries import Deployment, Exposure, exposures
from privfed.privacy.budget import Budget
from privfed.privacy.errors import BudgetExhausted, ChargeConflict
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit, from_canonical_json, to_canonical_json
from privfed.privacy.ledger import Entry, Ledger

from . import wire
from .config import Config, Policy, SideNoise
from .errors import LedgerKeyError
from .grid import Grid
from .policy import PolicyRefusal
from .schedule import check_schedule, keeps_pace
from .seals import seal
from .terms import Summand, cohort_in, deployment_of, run_of


@dataclass
class Attempt:
    """An attempt at one of a round's sums: what an entry is about."""

    plan: wire.RoundPlan
    purpose: wire.Purpose
    context: bytes
    encoding: Summand

    @property
    def key(self) -> tuple[str, int, int]:
        """Run, round and attempt, as the ledger has them."""
        return run_of(self.plan.run, self.purpose), self.plan.round, self.plan.attempt


def terms_digest(config: Config, noise_multiplier: float, side_noise: SideNoise) -> str:
    """Hex SHA-256 of what a run promises, as a site's ledger has it from the run's first round on.

    With `privacy.schedule = "spend"` σ/C changes from round to round, and is no part of it.
    """
    fixed = noise_multiplier if config.privacy.schedule == "constant" else None
    return hashlib.sha256(msgspec.msgpack.encode((config, fixed, side_noise))).hexdigest()


class SiteBook:
    """A site's side of its ledger.

    Args:
        name: the site's.
        dataset: keyed hash under which all its records stand in the ledger, whatever its table holds today.
        records: keyed hash of the records as they are today.
        ledger: it may hold the chains of other simulated sites too.
        insecure: the site's noise comes from a fixed seed that others know.

    Guarantees:
        A spend is durable when `book` returns, and refused when it is beyond the site's budget, over all runs on the
        ledger, or beyond what its policy allows one run. The same attempt again is paid once.

    Raises:
        LedgerKeyError: the site's chain was written under another key.
    """

    def __init__(
        self,
        *,
        name: str,
        dataset: str,
        records: str,
        ledger: Ledger,
        accountant: Accountant,
        policy: Policy,
        insecure: bool,
    ) -> None:
        self.name, self.dataset = name, dataset
        self._records, self._ledger, self._accountant = records, ledger, accountant
        self._policy, self._insecure = policy, insecure
        if any(line.entry.dataset != dataset for line in ledger.entries(name)):
            raise LedgerKeyError(
                f"the ledger of {name} was written under another key: its spends would be forgotten. "
                "Restore the key file from your copy"
            )

    def spent(self, delta: float) -> Epsilon:
        """ε of everything that the ledger holds for this site's records, all runs together."""
        return self._accountant.epsilon(self._ledger.charges(self.name, self.dataset), delta)

    def exposures(self, deployment: Deployment, delta: float, colluders: Sequence[int]) -> tuple[Exposure, ...]:
        """The same ε against each adversary; empty without a claim. Each release counts as it was made, in its run."""
        if deployment.unit is PrivacyUnit.NONE:
            return ()
        spends: dict[tuple[object, ...], Entry] = {}
        for line in self._ledger.entries(self.name):
            entry = line.entry
            if entry.charges:  # a settlement takes the place of its reserve
                spends[entry.kind == "charge", entry.run, entry.round, entry.attempt] = entry
        made: dict[Deployment, list[Charge]] = {deployment: []}
        for entry in spends.values():
            how = from_canonical_json(entry.metadata["deployment"].encode(), Deployment)
            made.setdefault(how, []).extend(entry.charges)
        charges = made.pop(deployment)
        return exposures(deployment, charges, delta, self._accountant, colluders=colluders, others=made.items())

    @property
    def insecure_spends(self) -> bool:
        """Whether some release of this site, in whatever run, had noise that others can recompute: its ε is void."""
        return any(line.entry.insecure_seed for line in self._ledger.entries(self.name) if line.entry.charges)

    def begin_run(self, plan: wire.RoundPlan) -> None:
        """Have what a run promises on disk before its first round, and hold it to that ever after.

        Raises:
            PolicyRefusal: it began with something else.
        """
        config = plan.config
        entry = Entry(
            kind="run",
            site=self.name,
            dataset=self.dataset,
            run=plan.run,
            round=0,
            unit=config.privacy.unit,
            noise=config.privacy.noise,
            insecure_seed=self._insecure,
            metadata={
                "terms": terms_digest(config, plan.noise_multiplier, plan.side_noise),
                "method": str(type(config.method).__struct_config__.tag),
            },
        )
        try:
            self._ledger.begin_run(entry)
        except ChargeConflict:
            raise PolicyRefusal(
                "the configuration of a run must not change between its rounds: start a new run, or, if privfed was "
                "updated since it began, go on with the version that began it"
            ) from None

    def has(self, attempt: Attempt) -> bool:
        """Whether this very attempt stands in the ledger: a process killed in it does it again, and pays once."""
        recorded = (line.entry for line in self._ledger.entries(self.name) if line.entry.kind in ("charge", "reserve"))
        return any((entry.run, entry.round, entry.attempt) == attempt.key for entry in recorded)

    def knows(self, run: str) -> bool:
        """Whether a run has begun at this site."""
        return any(line.entry.run == run for line in self._ledger.entries(self.name))

    def require_affordable(self, attempt: Attempt, charges: tuple[Charge, ...]) -> None:
        """Return if an attempt that is not in the ledger fits beside what is.

        Raises:
            BudgetExhausted, PolicyRefusal: it does not.
        """
        self._afford(attempt.plan.config, self._ledger.charges(self.name, self.dataset), charges)
        self._afford_in_run(attempt, charges)

    def require_pace(self, attempt: Attempt, size: int) -> None:
        """Return unless a plan that chooses its noise spends more now than leaves enough for the rounds after it.

        Args:
            size: coordinates of an update.

        Raises:
            PolicyRefusal: it does.
        """
        plan, config = attempt.plan, attempt.plan.config
        check_schedule(config)
        before, rounds = self._spent_in(plan), config.rounds - plan.round
        if rounds < 1 or not keeps_pace(
            config, cohort_in(plan), size, plan.noise_multiplier, before, rounds, self._accountant
        ):
            raise PolicyRefusal(
                f"the plan has noise_multiplier = {plan.noise_multiplier:g} in round {plan.round}, which leaves too "
                f"little of privacy.target_epsilon = {config.privacy.target_epsilon:g} for the rounds after it"
            )

    def book(self, attempt: Attempt, charges: tuple[Charge, ...], *, in_shares: bool) -> None:
        """Have the spend on disk; refuse it if it is beyond the budget."""
        config = attempt.plan.config
        entry = self._entry(attempt, charges)
        claimed = config.privacy.unit is not PrivacyUnit.NONE
        check = (lambda prior, new: self._afford(config, prior, new)) if claimed else None
        if claimed:
            self._afford_in_run(attempt, charges)
        if in_shares:
            self._ledger.reserve(msgspec.structs.replace(entry, kind="reserve"), check)
        else:
            self._ledger.charge(entry, check)

    def settle(self, attempt: Attempt, planned: Charge, summed: tuple[int, ...]) -> None:
        """Book the noise that the sum really carries: the site has checked who is in it, by their signatures."""
        assert not isinstance(attempt.encoding, Grid)  # noise in shares
        event = attempt.encoding.event(len(summed))
        entry = self._entry(attempt, (msgspec.structs.replace(planned, event=event),))
        who = ",".join(map(str, summed))
        metadata = {**entry.metadata, "summed": hashlib.sha256(who.encode()).hexdigest()}
        self._ledger.settle(msgspec.structs.replace(entry, kind="settle", metadata=metadata))

    def sealed(self, plan: wire.RoundPlan, spent: Epsilon, *, time: datetime, private: bytes) -> bytes:
        """The site's signed word on its chain as it stands.

        Args:
            private: the site's Ed25519 key for its ledger.
        """
        chain = self._ledger.entries(self.name)
        return seal(
            ledger=self._ledger.id,
            site=self.name,
            dataset=self.dataset,
            last=chain[-1] if chain else None,
            genesis=self._ledger.head(self.name),
            run=plan.run,
            round=plan.round,
            spent=spent,
            time=time,
            private=private,
        )

    def _entry(self, attempt: Attempt, charges: tuple[Charge, ...]) -> Entry:
        plan, config = attempt.plan, attempt.plan.config
        noise_site = config.privacy.noise if attempt.purpose == "update" else NoiseSite.DISTRIBUTED
        deployment = deployment_of(config, cohort_in(plan), noise_site)
        run, round, number = attempt.key
        return Entry(
            site=self.name,
            dataset=self.dataset,
            run=run,
            round=round,
            attempt=number,
            unit=config.privacy.unit,
            noise=noise_site,
            charges=charges,
            insecure_seed=self._insecure,
            metadata={
                "context": attempt.context.hex(),
                "records": self._records,
                "deployment": to_canonical_json(deployment).decode(),
            },
        )

    def _afford(self, config: Config, prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        """Raise `BudgetExhausted` unless the site's own budget allows ``new``; without one, the run's target holds."""
        budget = Budget(epsilon=config.privacy.target_epsilon, delta=config.privacy.delta)
        if self._policy.max_epsilon is not None:
            budget = Budget(epsilon=self._policy.max_epsilon, delta=self._policy.delta)
        budget.ensure(self._accountant, prior, new, site=self.name)

    def _afford_in_run(self, attempt: Attempt, new: tuple[Charge, ...]) -> None:
        """Raise `PolicyRefusal` unless the site's policy allows one run ``new`` beside what it has spent."""
        limit = self._policy.max_epsilon_per_run
        if limit is None:
            return
        try:
            budget = Budget(epsilon=limit, delta=self._policy.delta)
            budget.ensure(self._accountant, self._spent_in(attempt.plan, but=attempt), new, site=self.name)
        except BudgetExhausted as error:
            raise PolicyRefusal(
                f"policy.max_epsilon_per_run = {limit:g}, round {attempt.plan.round} would bring the run to "
                f"{error.would_be:.4g} (δ = {self._policy.delta:g})"
            ) from None

    def _spent_in(self, plan: wire.RoundPlan, but: Attempt | None = None) -> tuple[Charge, ...]:
        """What one run has spent here, with all that it adds up; ``but`` a sum that is done again."""
        sums = {run_of(plan.run, purpose) for purpose in wire.PURPOSES}
        again = None if but is None else but.key
        spends: dict[tuple[str, int, int], tuple[Charge, ...]] = {}
        for line in self._ledger.entries(self.name):
            entry = line.entry
            key = (entry.run, entry.round, entry.attempt)
            if entry.run in sums and entry.charges and key != again:  # a settlement takes the place of its reserve
                spends[key] = entry.charges
        return tuple(charge for charges in spends.values() for charge in charges)
