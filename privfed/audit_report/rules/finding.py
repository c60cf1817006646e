"""What every rule answers with."""

from collections.abc import Sequence

from privfed.privacy.ledger import Recorded

from ..model import Finding, Verdict

_SHOWN = 5  # pieces of evidence that are named one by one
AGREES = 0.01  # relative; as in verification.py
ROUNDING = 1e-6  # relative; as a site's own budget

SUPPORTED: Verdict = "CLAIM-SUPPORTED"
UNSOUND: Verdict = "UNSOUND-CLAIM"
UNDECIDED: Verdict = "INCONCLUSIVE"
OVER: Verdict = "BUDGET-EXCEEDED"
VIOLATED: Verdict = "AUDIT-VIOLATION"


def finding(rule: str, verdict: Verdict, reason: str, evidence: Sequence[str] = (), remedy: str = "") -> Finding:
    """A rule's answer, with the first pieces of evidence named one by one."""
    shown = list(evidence[:_SHOWN])
    if len(evidence) > _SHOWN:
        shown.append(f"and {len(evidence) - _SHOWN} more")
    return Finding(rule=rule, verdict=verdict, reason=reason, evidence=tuple(shown), remedy=remedy)


def named(line: Recorded) -> str:
    """An entry of a ledger, for people."""
    entry = line.entry
    return f"{entry.site}, entry {line.sequence} (run {entry.run}, round {entry.round})"
