"""The events of the books, gathered into groups that read alike."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from privfed.privacy.events import (
    Charge,
    Gaussian,
    PatientMixture,
    Skellam,
)
from privfed.privacy.ledger import Recorded

from .accounts import Account, key_of, shares_of
from .model import (
    EventGroup,
)


class _Same(NamedTuple):
    """What entries have in common that are counted together."""

    ledger: str
    site: str
    dataset: str
    audience: str
    run: str
    kind: Literal["charge", "settled", "unsettled"]
    known_seed: bool
    events: tuple[str, ...]


_KINDS: dict[str, Literal["charge", "settled", "unsettled"]] = {"settle": "settled", "reserve": "unsettled"}


def event_groups(accounts: Sequence[Account]) -> tuple[EventGroup, ...]:
    """The whole event ledger, equal entries counted together. A settled release counts once, as it was settled."""
    groups: dict[_Same, list[Recorded]] = {}
    for account in accounts:
        settled = {key_of(line) for line in account.lines if line.entry.kind == "settle"}
        for line in account.lines:
            entry = line.entry
            if entry.kind == "reserve" and key_of(line) in settled:
                continue
            same = _Same(
                ledger=account.book.name,
                site=account.site,
                dataset=account.dataset,
                audience=account.audience,
                run=entry.run,
                kind=_KINDS.get(entry.kind, "charge"),
                known_seed=entry.insecure_seed,
                events=tuple(_describe(charge) for charge in entry.charges),
            )
            groups.setdefault(same, []).append(line)
    found = []
    for same, lines in groups.items():
        rounds = [line.entry.round for line in lines]
        counts = [count for line in lines for count in shares_of(line)]
        found.append(
            EventGroup(
                ledger=same.ledger,
                site=same.site,
                audience=same.audience,
                run=same.run,
                kind=same.kind,
                first_round=min(rounds),
                last_round=max(rounds),
                entries=len(lines),
                events=same.events,
                shares=(min(counts), max(counts)) if counts else None,
                known_seed=same.known_seed,
            )
        )
    return tuple(found)


def _describe(charge: Charge) -> str:
    """An event in public constants; shares of noise stand beside it."""
    event, times = charge.event, f"{charge.count} × " if charge.count > 1 else ""
    where = "" if charge.group == "all" else f", part {charge.group.partition('/')[2]} of a split"
    if isinstance(event, Skellam):
        rate = "" if event.sample_rate == 1 else f", sample rate {event.sample_rate:g}"
        return (
            f"{times}Skellam sum: share variance {event.share_variance}, {event.colluders} colluders assumed, "
            f"dimension {event.dim}, Δ₂² {event.l2_squared}, Δ₁ {event.l1}{rate}{where}"
        )
    if isinstance(event, Gaussian):
        return f"{times}Gaussian sum: noise multiplier {event.noise_multiplier:g}{where}"
    if isinstance(event, PatientMixture):
        return (
            f"{times}Gaussian sum of sampled records of patients: sample rate {event.sample_rate:g}, at most "
            f"{event.max_records} records a patient, noise multiplier {event.noise_multiplier:g}{where}"
        )
    return (
        f"{times}Gaussian sum of a Poisson sample: sample rate {event.sample_rate:g}, noise multiplier "
        f"{event.noise_multiplier:g}{where}"
    )
