"""What each adversary sees, and what ε holds against it."""

from collections.abc import Sequence

import msgspec

from privfed.cohort import cohort_of
from privfed.errors import ConfigError
from privfed.privacy.accountant import Accountant
from privfed.privacy.adversaries import Adversary, Deployment, Exposure, exposures
from privfed.privacy.errors import PrivacyError
from privfed.privacy.events import (
    Charge,
    NoiseSite,
    Skellam,
    from_canonical_json,
)
from privfed.privacy.ledger import Recorded
from privfed.summary import worst
from privfed.terms import worthwhile_colluders

from .accounts import Account, bounded, counted
from .evidence import Evidence
from .model import (
    AdversaryLine,
    Thresholds,
)

_UNTOLD = "the ledger does not say whether the server saw sums or single vectors"


def adversary_lines(
    evidence: Evidence, accounts: Sequence[Account], accountant: Accountant
) -> tuple[AdversaryLine, ...]:
    """ε against each adversary, recomputed from the events; the largest of any site.

    Each release counts as its entry says that it was made. Where an entry does not say what the server saw, there is no
    ε against the server.
    """
    colluders = _colluders(evidence, accounts)
    lines, untold = list[tuple[Exposure, ...]](), False
    for account in accounts:
        made: dict[Deployment, list[Charge]] = {}
        for line in counted(account.lines):
            how = deployment_in(line)
            untold = untold or how is None
            made.setdefault(how or _supposed(line), []).extend(line.entry.charges)
        (first, charges), *others = made.items()
        try:
            lines.append(exposures(first, charges, evidence.delta, accountant, colluders=colluders, others=others))
        except PrivacyError as refusal:
            return (AdversaryLine(adversary="anybody", colluders=0, epsilon=None, reason=str(refusal)),)
    table = []
    for worst_line in worst(lines):
        hidden = untold and worst_line.adversary in (Adversary.SERVER.value, Adversary.COALITION.value)
        value = None if hidden or worst_line.epsilon is None else bounded(worst_line.epsilon)
        table.append(
            AdversaryLine(
                adversary=worst_line.adversary,
                colluders=worst_line.colluders,
                epsilon=value,
                reason=_UNTOLD if hidden else worst_line.reason,
            )
        )
    return tuple(table)


def deployment_in(line: Recorded) -> Deployment | None:
    """Who saw what of a release, as its entry has it; None where it does not say and it matters."""
    text = line.entry.metadata.get("deployment")
    if text is not None:
        try:
            return from_canonical_json(text.encode(), Deployment)
        except (ValueError, TypeError, msgspec.MsgspecError):
            return None
    return _supposed(line) if line.entry.noise is NoiseSite.LOCAL else None


def _supposed(line: Recorded) -> Deployment:
    """For adversaries who see no more than the sum in any case."""
    return Deployment(unit=line.entry.unit, noise=line.entry.noise, secure_sum=True, threshold=None)


def _colluders(evidence: Evidence, accounts: Sequence[Account]) -> tuple[int, ...]:
    """Numbers of sites that stand by the server and are worth a line of their own."""
    numbers = set[int]()
    for account in accounts:
        numbers |= {charge.event.colluders for charge in account.charges if isinstance(charge.event, Skellam)}
        for line in account.lines:
            how = deployment_in(line)
            if how is not None and how.noise is NoiseSite.DISTRIBUTED:
                numbers.add(how.threshold or 0)
    for run in evidence.runs:
        for cohort in run.history.cohorts if run.private else ():
            numbers |= set(worthwhile_colluders(run.history.config, cohort))
    return tuple(sorted(numbers - {0}))


def thresholds(evidence: Evidence) -> tuple[Thresholds, ...]:
    """The aggregation's numbers, run by run."""
    lines = []
    for run in evidence.runs:
        config, sizes = run.history.config, [len(line.invited) for line in run.history.rounds if line.invited]
        if not config.method.sends:
            continue
        try:
            cohort = cohort_of(config, min(sizes, default=run.history.summary.sites))
        except ConfigError:
            continue
        masked = config.aggregation.kind == "masked"
        lines.append(
            Thresholds(
                run=run.run,
                sites=cohort.size,
                threshold=cohort.threshold if masked else None,
                minimum_cohort=cohort.minimum_cohort,
                colluders=cohort.colluders,
                dropouts=cohort.tolerated_dropouts,
                smallest_sum=min(
                    (len(line.contributed) for line in run.history.rounds if line.contributed), default=None
                ),
            )
        )
    return tuple(lines)
