"""The rules behind the verdict: all of them asked, and the gravest answer.

**Guarantees.** Fail closed: a report says CLAIM-SUPPORTED only if every rule that applies could be decided and holds.
What is missing, unknown or unreadable is INCONCLUSIVE, never supported. Supported is not proved: the rules know the
evidence that they were given.
"""

from collections.abc import Iterable, Mapping, Sequence

from privfed.privacy.accountant import Accountant, Epsilon

from .accounts import Account, totals
from .evidence import Evidence
from .model import ORDER, Finding, Opinion, Verdict
from .rules import bounds, claim, conduct, record, releases
from .rules.finding import UNDECIDED


def overall(findings: Iterable[Finding]) -> Verdict:
    """The gravest of all; INCONCLUSIVE if no rule was asked."""
    given = {finding.verdict for finding in findings}
    return next((verdict for verdict in ORDER if verdict in given), UNDECIDED)


def judge(
    evidence: Evidence,
    accounts: Sequence[Account],
    spent: Mapping[str, Epsilon],
    second: Sequence[Opinion],
    accountant: Accountant,
) -> tuple[Finding, ...]:
    """Every rule that applies, the gravest finding first."""
    lines = [line for account in accounts for line in account.lines]
    budget = bounds.budget_of(evidence)
    worst = max((cost.value for cost in spent.values()), default=0.0)
    at_budget = {}
    if budget is not None:
        at_budget = {site: cost.value for site, cost in totals(accounts, budget.delta, accountant).items()}
    asked = [
        record.ledger_verifies(evidence.books),
        record.signatures_are_held_against_known_keys(evidence.books),
        record.every_entry_is_signed(evidence.books),
        record.files_are_as_left(evidence),
        claim.something_is_claimed(lines),
        claim.delta_is_small(evidence.delta),
        claim.seed_is_secret(lines, evidence.runs),
        claim.every_release_has_noise(lines),
        claim.one_unit_is_claimed(accounts),
        claim.combination_has_a_guarantee(lines),
        claim.amplification_is_earned(lines),
        conduct.folders_are_given(lines, evidence.runs),
        conduct.secure_sum_stood(lines, evidence.runs),
        conduct.booked_as_configured(lines, evidence.runs),
        conduct.contributions_are_booked(lines, evidence.runs),
        conduct.summary_agrees(accounts, evidence.runs, accountant),
        releases.figures_are_covered(evidence.runs, evidence.statement),
        releases.personal_models_stay(evidence.runs, evidence.statement),
        bounds.budget_is_kept(budget, at_budget),
        bounds.accountants_agree(worst, second),
        bounds.audits_agree(evidence.audits, bounds.claiming(evidence, lines), worst, evidence.delta),
    ]
    found = [finding for finding in asked if finding is not None]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.verdict)))
