"""What an audit says: one type for all of them, and the rule behind its verdict."""

import hashlib
from typing import Literal

import msgspec

from ..events import to_canonical_json

Verdict = Literal["violation", "supported", "inconclusive"]

LEAST_SUPPORTED_EPSILON = 2.0
LEAST_POWER = 0.95


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Membership inference on some of the records, with one threshold for each group.

    Attributes:
        by: what the records are grouped by: "site", "class", or an input's name.
        name: which group.
        members, others: how many records of each kind.
        auc, auc_low, auc_high, tpr, tpr_low, tpr_high: as of `membership.Attack`.
    """

    by: str
    name: str
    members: int
    others: int
    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


class Audit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One audit.

    Attributes:
        level: 1 mechanism, 2 noise self-test, 3 one federated run, 4 membership inference.
        name: what was audited.
        claimed_epsilon: the claim, at `delta`; None where nothing is claimed.
        delta: δ of the claim and of the bound.
        epsilon_lower: what the data show ε to be at least, with `confidence`.
        confidence: probability that a mechanism which keeps its claim is not called a violation; at least.
        trials: what the bound rests on: releases of each kind, coordinates of noise, canaries, or records.
        verdict: see `verdict_of`.
        note: what was done, assumed and not shown, in words.
        seeds: from which the audit can be done again.
        power: computed probability that this audit would have said "violation" if the noise were half of what is
            claimed, with canaries that show as much as these did; None where it has not been computed.
        figures: further numbers, for the report: error rates, areas, intervals.
        roc: (false-positive rate, true-positive rate) of membership inference, both rising.
        groups: the same attack on subgroups, of those large enough to tell.
    """

    level: Literal[1, 2, 3, 4]
    name: str
    claimed_epsilon: float | None
    delta: float | None
    epsilon_lower: float
    confidence: float
    trials: int
    verdict: Verdict
    note: str
    seeds: tuple[int, ...]
    power: float | None = None
    figures: dict[str, float] = {}
    roc: tuple[tuple[float, float], ...] = ()
    groups: tuple[Group, ...] = ()


def headline(audit: Audit) -> Audit:
    """The audit without its note, figures, curve and groups, some of which are exact figures of records.

    A ledger is there to be shown to others, and holds this; `digest` says which whole audit it belongs to.
    """
    return _as_read(msgspec.structs.replace(audit, note="", figures={}, roc=(), groups=()))


def digest(audit: Audit) -> str:
    """Hex SHA-256 of the whole audit's canonical JSON, the same before it is written and after it is read."""
    return hashlib.sha256(to_canonical_json(_as_read(audit))).hexdigest()


def _as_read(audit: Audit) -> Audit:
    """A count among the figures, written as 5, is read as 5.0."""
    return msgspec.json.decode(to_canonical_json(audit), type=Audit)


def verdict_of(*, rejected: bool, claimed_epsilon: float | None, power: float | None) -> Verdict:
    """The verdict.

    **Guarantees.** "violation" only if the data reject the claim at the audit's confidence. "supported" only if they do
    not, *and* the claim is ε ≥ 2, *and* the same audit, by computation on an ideal mechanism, would have rejected it
    with a probability of at least 95 % had the noise been half of it. Everything else is "inconclusive". Supported is
    not proved: an audit knows only the attack that it made.

    Below ε = 2 a mechanism's outputs differ so little that half of its noise and a slip in the analysis look alike to
    audits of any size in use; a clean result there would comfort more than it shows.
    """
    if rejected:
        return "violation"
    if claimed_epsilon is None or claimed_epsilon < LEAST_SUPPORTED_EPSILON:
        return "inconclusive"
    return "supported" if power is not None and power >= LEAST_POWER else "inconclusive"
