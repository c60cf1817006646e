"""Is it within bounds: the budget, a second accountant, and attacks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from privfed.privacy.events import PrivacyUnit
from privfed.privacy.ledger import Recorded

from ..evidence import Evidence, base_run
from ..model import AuditResult, Finding, Opinion
from .finding import AGREES, OVER, ROUNDING, SUPPORTED, UNDECIDED, UNSOUND, VIOLATED, finding


@dataclass(frozen=True)
class Budget:
    """What no site may pass, and who says so."""

    epsilon: float
    delta: float
    source: str


def budget_of(evidence: Evidence) -> Budget | None:
    """What the curator stated, else what the last private run held its sites to; None where nothing says."""
    stated = evidence.statement
    if stated.budget_epsilon is not None:
        return Budget(stated.budget_epsilon, stated.budget_delta or evidence.delta, "stated by the curator")
    for run in reversed([run for run in evidence.runs if run.private]):
        config = run.history.config
        if config.policy.max_epsilon is not None:
            return Budget(config.policy.max_epsilon, config.policy.delta, f"policy.max_epsilon of run {run.run}")
        if math.isfinite(config.privacy.target_epsilon):
            return Budget(config.privacy.target_epsilon, config.privacy.delta, f"target_epsilon of run {run.run}")
    return None


def budget_is_kept(budget: Budget | None, spent: Mapping[str, float]) -> Finding:
    """
    Args:
        spent: site → ε at the budget's δ.
    """
    if budget is None:
        return finding(
            "budget is kept",
            UNDECIDED,
            "No budget is known, so nobody can say whether ε is too large.",
            remedy="State it with --budget, or give the folder of the run, whose configuration has it.",
        )
    over = {site: value for site, value in spent.items() if value > budget.epsilon * (1 + ROUNDING)}
    limit = f"budget ε = {budget.epsilon:g} at δ = {budget.delta:g}, {budget.source}"
    if over:
        return finding(
            "budget is kept",
            OVER,
            "A site has spent more than its budget.",
            [limit, *(f"{site}: ε = {value:.4g}" for site, value in sorted(over.items()))],
            "Release nothing more from these records.",
        )
    if not spent:
        return finding("budget is kept", UNDECIDED, "No spend could be read.", [limit])
    return finding("budget is kept", SUPPORTED, "No site has spent more than its budget.", [limit])


def accountants_agree(epsilon: float, second: Sequence[Opinion]) -> Finding:
    """Every figure is a bound, so at least the true ε: ours must not be far below all others."""
    others = [(line.accountant, line.epsilon) for line in second if line.epsilon is not None]
    shown = [f"this report: ε = {epsilon:.5g}", *(f"{name}: {value:.5g}" for name, value in others)]
    if not math.isfinite(epsilon):
        return finding("accountants agree", UNDECIDED, "ε is infinite: there is no figure to compare.")
    theirs = [value for name, value in others if not name.endswith("privfed")]
    if theirs and epsilon < min(theirs) * (1 - 2 * AGREES):
        return finding(
            "accountants agree",
            UNSOUND,
            "Every other accountant finds a larger ε than this report.",
            shown,
            "Use the larger figure until it is clear who is wrong.",
        )
    if not theirs:
        return finding(
            "accountants agree",
            UNDECIDED,
            "No second accountant could check the figure.",
            [f"{line.accountant}: {line.note}" for line in second if line.note],
        )
    return finding("accountants agree", SUPPORTED, "A second accountant finds no larger ε.", shown)


def claiming(evidence: Evidence, lines: Sequence[Recorded]) -> set[str]:
    """The runs that claim something: by their entries, and by their folders."""
    booked = {base_run(line.entry.run) for line in lines if line.entry.unit is not PrivacyUnit.NONE}
    return booked | {run.run for run in evidence.runs if run.private}


def audits_agree(audits: Sequence[AuditResult], runs: Iterable[str], epsilon: float, delta: float) -> Finding:
    """What attacks found. An attack that finds nothing shows little; one that finds more than the claim ends it.

    Every attack counts, however often it was made again afterwards.

    Args:
        runs: those that claim something.
    """
    broken = [_shown(audit) for audit in audits if _violates(audit, epsilon, delta)]
    if broken:
        return finding(
            "attacks stay below the claim",
            VIOLATED,
            f"{len(broken)} of {len(audits)} attacks learned more than the claim allows. The claim is false, or the "
            "mechanism is not as booked.",
            broken,
            "Stop releasing. Find the fault with privfed audit, level by level.",
        )
    by_run = {run: [audit for audit in audits if audit.run == run and audit.level != 4] for run in sorted(runs)}
    missing = [f"run {run}: no audit" for run, own in by_run.items() if not own]
    if missing or not by_run:
        return finding(
            "attacks stay below the claim",
            UNDECIDED,
            "Nobody attacked the mechanism. Hashes and signatures do not show that noise was added.",
            missing or ["no run that claims anything was given"],
            "Run privfed audit RUN, then make this report again.",
        )
    clean = [_shown(audit) for audit in audits if audit.verdict == "supported"]
    if not all(any(audit.verdict == "supported" for audit in own) for own in by_run.values()):
        return finding(
            "attacks stay below the claim",
            UNDECIDED,
            "The attacks found nothing, but they were too weak to tell: below ε ≈ 2 no attack can pass a mechanism.",
            [_shown(audit) for audit in audits],
        )
    return finding(
        "attacks stay below the claim",
        SUPPORTED,
        "Attacks strong enough to notice half of the noise found nothing above the claim.",
        clean,
    )


def _violates(audit: AuditResult, epsilon: float, delta: float) -> bool:
    if audit.verdict == "violation":
        return True
    if audit.claimed_epsilon is None:
        return False
    # (ε, δ) implies (ε, δ') for any δ' ≥ δ: what refutes the latter refutes the former
    refutes_ours = audit.delta is not None and audit.delta >= delta and audit.epsilon_lower > epsilon
    return refutes_ours or audit.epsilon_lower > audit.claimed_epsilon


def _shown(audit: AuditResult) -> str:
    claimed = "no claim" if audit.claimed_epsilon is None else f"claimed ε = {audit.claimed_epsilon:.4g}"
    sure = f"at {100 * audit.confidence:g} % confidence"
    if audit.level == 2:  # it tests the noise's law, and bounds nothing
        return f"level 2, {audit.name}: {audit.verdict}, {claimed}"
    return f"level {audit.level}, {audit.name}: ε ≥ {audit.epsilon_lower:.4g} {sure}, {claimed}: {audit.verdict}"
