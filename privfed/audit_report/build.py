"""From evidence to the report: the one place where all parts come together."""

import math
from collections.abc import Sequence
from pathlib import Path

from privfed import __version__
from privfed.privacy.accountant import Accountant
from privfed.report.words import metric_name
from privfed.summary import UnseenSummary, UtilitySummary

from . import verdicts, words
from .accounts import accounts_of, bounded, run_lines, site_losses, totals
from .curves import accuracy_points, delta_curve, epsilon_curves, noise_rounds
from .events import event_groups
from .evidence import BookEvidence, Evidence, RunEvidence, Statement, gather
from .exposures import adversary_lines, thresholds
from .model import About, Accounting, AuditReport, Composition, Curves, Fact, Figure, Verification
from .rules.bounds import budget_of
from .second_opinion import second_opinions, versions


def build(
    targets: Sequence[Path],
    *,
    keys: Path | None = None,
    delta: float | None = None,
    statement: Statement | None = None,
    baseline: Path | None = None,
    accountant: Accountant | None = None,
) -> AuditReport:
    """The audit report about ledgers and runs. The same files give the same report: it reads no clock.

    Args:
        targets: ledger files and folders of runs that have ended.
        keys: a JSON file, name: public key in hex, got from the sites by another way.
        delta: at which ε is given; by default the runs' own, else 1e-5.
        statement: what the curator states.
        baseline: the folder of a run without privacy, for its figures.

    Raises:
        RunFolderError, ConfigError: a target can not be read as what it is given as.

    Guarantees:
        Every ε is recomputed from the ledgers' events. A ledger that does not verify gives a report that says so, with
        the verdict UNSOUND-CLAIM.
    """
    accountant = accountant or Accountant()
    evidence = gather(targets, keys=keys, delta=delta, statement=statement, baseline=baseline, accountant=accountant)
    return assemble(evidence, accountant)


def assemble(evidence: Evidence, accountant: Accountant) -> AuditReport:
    """The report on what was read."""
    accounts = accounts_of(evidence, accountant)
    spent = totals(accounts, evidence.delta, accountant)
    top = max(spent, key=lambda site: spent[site].value, default=None)
    cost = spent[top] if top is not None else accountant.epsilon((), evidence.delta)
    charges = [charge for account in accounts if account.site == top for charge in account.charges]
    second = second_opinions(charges, evidence.delta, accountant)
    findings = verdicts.judge(evidence, accounts, spent, second, accountant)
    budget = budget_of(evidence)
    runs = run_lines(evidence)
    audits = evidence.audits
    broken = {finding.verdict for finding in findings} & {"UNSOUND-CLAIM", "AUDIT-VIOLATION"}
    return AuditReport(
        privfed=__version__,
        verdict=verdicts.overall(findings),
        findings=findings,
        about=_about(evidence.statement),
        claim=words.claim(
            evidence,
            accounts,
            epsilon=bounded(cost.value) if accounts else None,
            void=bool(broken),
            budget=(budget.epsilon, budget.delta) if budget else None,
        ),
        scope=words.scope(evidence),
        composition=Composition(rule=words.RULE, ledgers=tuple(book.name for book in evidence.books), runs=runs),
        sites=site_losses(accounts),
        adversaries=adversary_lines(evidence, accounts, accountant),
        thresholds=thresholds(evidence),
        mechanism=words.mechanism(evidence, accounts),
        events=event_groups(accounts),
        accounting=Accounting(
            accountant=cost.accountant,
            versions=tuple(Fact(term=name, value=number) for name, number in versions().items()),
            tolerance=cost.tolerance,
            notes=cost.notes,
            second=second,
        ),
        execution=words.execution(evidence, accounts, audits),
        audits=audits,
        lineage=words.lineage(evidence, runs, accounts),
        utility=_utility(evidence),
        subgroup_gap=_subgroup_gap(evidence),
        verification=tuple(_verification(book) for book in evidence.books),
        hazards=words.hazards(evidence),
        non_claims=words.NON_CLAIMS,
        curves=Curves(
            epsilon=epsilon_curves(evidence, accounts, accountant),
            accuracy=accuracy_points([run for run in evidence.runs if run.private]),
            metric=next((metric_name(run.history.summary.utility.metric) for run in evidence.runs), ""),
            lower_is_better=any(run.history.lower_is_better for run in evidence.runs),
            delta=delta_curve(charges, accountant) if charges and math.isfinite(cost.value) else (),
            noise=noise_rounds(accounts),
        ),
    )


def _about(statement: Statement) -> About:
    return About(
        curator=statement.curator,
        purpose=statement.purpose,
        data_product=statement.data_product,
        date=statement.date,
    )


def _utility(evidence: Evidence) -> tuple[Figure, ...]:
    lines = [figure for run in evidence.runs for figure in _figures(run, run.private)]
    if evidence.baseline is not None:
        lines += _figures(evidence.baseline, evidence.baseline.private)
    return tuple(lines)


def _figures(run: RunEvidence, private: bool) -> list[Figure]:
    utility = run.history.summary.utility
    suffix = "" if private else " of the non-private baseline"
    names = {
        "global_": f"global model{suffix}",
        "personalized": f"personalised models{suffix}",
        "local_only": "local only: each site alone, without noise",
    }
    groups: list[tuple[UtilitySummary | UnseenSummary, str]] = [(utility, "")]
    if utility.unseen is not None:
        groups.append((utility.unseen, f", {utility.unseen.sites} sites held out of training"))
    lines = []
    for figures, whose in groups:
        for field, model in names.items():
            figure = getattr(figures, field)
            if not private and field == "local_only":
                continue
            lines.append(
                Figure(
                    run=run.run,
                    model=model + whose,
                    metric=metric_name(utility.metric),
                    mean=figure.mean,
                    worst_decile=figure.worst_decile,
                    sd=figure.sd,
                    status=utility.status if figure.mean is not None else "not released",
                )
            )
    return lines


def _subgroup_gap(evidence: Evidence) -> str:
    """Between sites, by the last figures of their personalised models; classes and columns are for level 4."""
    said = []
    for run in (run for run in evidence.runs if run.private):
        rows = [(row.figures.personalized, row.name) for row in run.history.rows() if row.figures is not None]
        found = sorted((score, name) for score, name in rows if score is not None)
        if len(found) > 1:
            (low, first), (high, last) = found[0], found[-1]
            metric = metric_name(run.history.summary.utility.metric)
            said.append(
                f"between sites, run {run.run}: {high - low:.3f} in {metric} of the personalised models, "
                f"from {low:.3f} ({first}) to {high:.3f} ({last}), not DP"
            )
    attacked = any(audit.groups for audit in evidence.audits)
    where = "see the attacks by site, class and input above" if attacked else "privfed audit RUN --level 4 --by COLUMN"
    said.append(f"in what personal models give away: {where}")
    return "; ".join(said)


def _verification(book: BookEvidence) -> Verification:
    found = book.verified
    return Verification(
        ledger=book.name,
        path=str(book.path),
        verified=found is not None,
        reason="everything was recomputed and holds" if found else book.failure,
        bad_entry=book.bad_entry,
        entries=sum(map(len, book.chains.values())),
        signed=sum(site.signed for site in found.sites) if found else 0,
        rounds_witnessed=found.rounds if found else 0,
        keys=book.keys,
        notes=found.notes if found else (),
    )
