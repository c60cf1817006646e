"""What the report draws: ε, noise and accuracy over the rounds, δ over ε."""

import math
from collections.abc import Sequence

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import (
    Charge,
)
from privfed.privacy.ledger import Recorded
from privfed.verification import Spends

from .accounts import Account, bounded, key_of, multiplier, shares_of
from .evidence import Evidence, RunEvidence, base_run
from .model import (
    Curve,
    NoiseRound,
    Pair,
    Point,
)

_POINTS = 25  # of a curve over the rounds


def epsilon_curves(evidence: Evidence, accounts: Sequence[Account], accountant: Accountant) -> tuple[Curve, ...]:
    """ε after up to 25 of the rounds that the ledgers know, in the order in which they began; equal curves together."""
    curves: dict[tuple[str, tuple[float | None, ...]], list[str]] = {}
    across: tuple[int, ...] = ()
    numbers = _round_numbers(accounts)
    if numbers:
        total = max(numbers.values())
        across = tuple(sorted({max(1, round(total * part / _POINTS)) for part in range(1, _POINTS + 1)}))
    several = len({(account.site, account.audience) for account in accounts}) < len(accounts)
    for account in accounts:
        chain = account.book.chains[account.site]
        spends, values, reached = Spends(chain, account.dataset, account.audience), list[float | None](), 0
        last: dict[int, int] = {}
        for line in account.lines:
            last[numbers[account.book.name, base_run(line.entry.run), line.entry.round]] = line.sequence
        ends = sorted(last.items())
        place = 0
        for number in across:
            while place < len(ends) and ends[place][0] <= number:
                reached, place = max(reached, ends[place][1]), place + 1
            values.append(bounded(accountant.epsilon(spends.upto(reached), evidence.delta).value))
        name = f"{account.site} ({account.dataset[:6]})" if several else account.site
        curves.setdefault((account.audience, tuple(values)), []).append(name)
    return tuple(
        Curve(sites=tuple(sites), audience=audience, across=across, epsilon=values)
        for (audience, values), sites in curves.items()
    )


def _round_numbers(accounts: Sequence[Account]) -> dict[tuple[str, str, int], int]:
    """(ledger, run, round) → its number among all rounds on the ledgers, from 1, by when it was first booked."""
    first: dict[tuple[str, str, int], str] = {}
    for account in accounts:
        for line in account.lines:
            key = (account.book.name, base_run(line.entry.run), line.entry.round)
            first[key] = min(line.time, first.get(key, line.time))
    ordered = sorted(first, key=lambda key: (first[key], key))
    return {key: number for number, key in enumerate(ordered, start=1)}


def noise_rounds(accounts: Sequence[Account]) -> tuple[NoiseRound, ...]:
    """The realised noise of the updates' sums, round by round."""
    numbers = _round_numbers(accounts)
    lines: dict[tuple[str, str, int], list[Recorded]] = {}
    for account in accounts:
        for line in account.lines:
            if base_run(line.entry.run) == line.entry.run:
                lines.setdefault((account.book.name, line.entry.run, line.entry.round), []).append(line)
    found = []
    for key, booked in sorted(lines.items(), key=lambda item: numbers[item[0]]):
        settled = {(line.entry.site, key_of(line)) for line in booked if line.entry.kind == "settle"}
        final = [
            line for line in booked if line.entry.kind != "reserve" or (line.entry.site, key_of(line)) not in settled
        ]
        shares = [count for line in final for count in shares_of(line)]
        least = [count for line in booked if line.entry.kind == "reserve" for count in shares_of(line)]
        found.append(
            NoiseRound(
                number=numbers[key],
                run=key[1],
                round=key[2],
                shares=min(shares, default=None),
                least=min(least, default=None),
                sites=len({line.entry.site for line in final}),
                noise_multiplier=min(multiplier(charge.event) for line in final for charge in line.entry.charges),
            )
        )
    return tuple(found)


def accuracy_points(runs: Sequence[RunEvidence]) -> tuple[Point, ...]:
    """The mean score of a run's models after each measured round, beside the largest ε of any site then."""
    points = []
    for run in runs:
        names = {"personalized": "personalised", "global_score": "global"}
        tables = {model: run.history.curves(field) for field, model in names.items()}
        spent = run.history.curves("epsilon")
        for place, line in enumerate(run.history.evaluated):
            bounds = [curve[place] for curve in spent.values() if math.isfinite(curve[place])]
            for model, table in tables.items():
                scores = [curve[place] for curve in table.values() if math.isfinite(curve[place])]
                if model == "global" and line.released is not None and line.released.score is not None:
                    scores = [line.released.score]
                if bounds and scores:
                    mean = sum(scores) / len(scores)
                    points.append(Point(run=run.run, round=line.round, epsilon=max(bounds), model=model, score=mean))
    return tuple(points)


def delta_curve(charges: Sequence[Charge], accountant: Accountant) -> tuple[Pair, ...]:
    """ε of one chain at δ from 1e-10 to 0.1."""
    return tuple(
        Pair(delta=10.0**power, epsilon=bounded(accountant.epsilon(charges, 10.0**power).value))
        for power in range(-10, 0)
    )
