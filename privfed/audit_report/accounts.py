"""Who spent what: the books of each site as accounts, and their losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.events import (
    Charge,
    Event,
    Skellam,
)
from privfed.privacy.ledger import Recorded
from privfed.verification import Spends

from .evidence import BookEvidence, Evidence, base_run
from .model import (
    RunLine,
    SiteLoss,
)


@dataclass(frozen=True)
class Account:
    """One data set of a site towards one audience: all its spends, and what they cost."""

    book: BookEvidence
    site: str
    dataset: str
    audience: str
    lines: tuple[Recorded, ...]
    charges: tuple[Charge, ...]
    cost: Epsilon

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(sorted({line.entry.unit.value for line in self.lines}))

    @property
    def noise(self) -> tuple[str, ...]:
        return tuple(sorted({line.entry.noise.value for line in self.lines}))


def accounts_of(evidence: Evidence, accountant: Accountant) -> tuple[Account, ...]:
    """Every data set of every site, towards every audience, in order. Units that do not compose cost ∞."""
    found = []
    for book in evidence.books:
        for site in book.sites:
            chain = book.chains[site]
            spends = [line for line in chain if line.entry.charges]
            for dataset, audience in sorted({(line.entry.dataset, line.entry.audience) for line in spends}):
                own = tuple(line for line in spends if (line.entry.dataset, line.entry.audience) == (dataset, audience))
                charges = Spends(chain, dataset, audience).upto(len(chain))
                cost = accountant.epsilon(charges, evidence.delta)
                if len({line.entry.unit for line in own}) > 1:
                    cost = msgspec.structs.replace(cost, value=math.inf)
                found.append(Account(book, site, dataset, audience, own, charges, cost))
    return tuple(found)


def totals(accounts: Sequence[Account], delta: float, accountant: Accountant) -> dict[str, Epsilon]:
    """Site → ε of all its data sets, audiences and ledgers together, as if the same people were in all of them."""
    by_site: dict[str, list[Account]] = {}
    for account in accounts:
        by_site.setdefault(account.site, []).append(account)
    found = {}
    for site, own in by_site.items():
        cost = accountant.epsilon([charge for account in own for charge in account.charges], delta)
        if len({unit for account in own for unit in account.units}) > 1:  # they do not compose
            cost = msgspec.structs.replace(cost, value=math.inf)
        found[site] = cost
    return found


def site_losses(accounts: Sequence[Account]) -> tuple[SiteLoss, ...]:
    lines = []
    for account in accounts:
        verified = account.book.verified
        signed = {site.name: site.signed for site in verified.sites} if verified else {}
        lines.append(
            SiteLoss(
                ledger=account.book.name,
                site=account.site,
                dataset=account.dataset,
                audience=account.audience,
                unit=", ".join(account.units),
                noise=", ".join(account.noise),
                epsilon=bounded(account.cost.value),
                accountant=account.cost.accountant,
                tolerance=account.cost.tolerance,
                entries=len(account.book.chains[account.site]),
                signed=signed.get(account.site, 0),
                known_seed=any(line.entry.insecure_seed for line in account.lines),
            )
        )
    return tuple(lines)


def bounded(value: float) -> float | None:
    """None for no bound: JSON has no infinity."""
    return value if math.isfinite(value) else None


def run_lines(evidence: Evidence) -> tuple[RunLine, ...]:
    """The runs on the ledgers, the first to spend first."""
    runs: dict[tuple[str, str], list[Recorded]] = {}
    for book, line in evidence.spends():
        runs.setdefault((book.name, base_run(line.entry.run)), []).append(line)
    lines = []
    for (ledger, run), spends in runs.items():
        times = [line.time for line in spends]
        lines.append(
            RunLine(
                ledger=ledger,
                run=run,
                sites=len({line.entry.site for line in spends}),
                rounds=len({line.entry.round for line in spends}),
                entries=len(spends),
                first=min(times),
                last=max(times),
                given=evidence.run_of(run) is not None,
            )
        )
    return tuple(sorted(lines, key=lambda line: line.first))


def counted(lines: Sequence[Recorded]) -> list[Recorded]:
    """The spends that count: a settlement takes the place of its reserve."""
    found: dict[tuple[object, ...], Recorded] = {}
    for line in lines:
        found[line.entry.kind == "charge", *key_of(line)] = line
    return list(found.values())


def key_of(line: Recorded) -> tuple[str, int, int]:
    """Which release an entry is of: its reserve and its settlement have the same."""
    return line.entry.run, line.entry.round, line.entry.attempt


def shares_of(line: Recorded) -> list[int]:
    """How many sites' noise an entry counts on, for each of its charges with noise in shares."""
    return [charge.event.shares for charge in line.entry.charges if isinstance(charge.event, Skellam)]


def multiplier(event: Event) -> float:
    """Standard deviation of the whole noise over the most that one unit can move the sum, unitless."""
    if isinstance(event, Skellam):
        return math.sqrt(event.share_variance * event.shares / event.l2_squared)
    return event.noise_multiplier
