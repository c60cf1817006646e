"""The rules behind the verdict: small functions of what was read, each with its reason and its evidence.

**Guarantees.** Fail closed: a report says CLAIM-SUPPORTED only if every rule that applies could be decided and holds.
What is missing, unknown or unreadable is INCONCLUSIVE, never supported. Supported is not proved: the rules know the
evidence that they were given.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.adversaries import check_supported
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import NoiseSite, PoissonGaussian, PrivacyUnit, Skellam, is_noiseless
from privfed.privacy.ledger import Recorded
from privfed.verification import Spends

from .compose import Account, deployment_in, totals
from .evidence import BookEvidence, Evidence, RunEvidence, Statement, base_run
from .model import FILES_AS_LEFT, LEDGER_VERIFIES, ORDER, AuditResult, Finding, Opinion, Verdict

_SHOWN = 5  # pieces of evidence that are named one by one
_MOST_DELTA = 1e-3  # as a site's policy.max_delta by default
_AGREES = 0.01  # relative; as in verification.py
_ROUNDING = 1e-6  # relative; as a site's own budget

SUPPORTED: Verdict = "CLAIM-SUPPORTED"
UNSOUND: Verdict = "UNSOUND-CLAIM"
UNDECIDED: Verdict = "INCONCLUSIVE"
OVER: Verdict = "BUDGET-EXCEEDED"
VIOLATED: Verdict = "AUDIT-VIOLATION"


@dataclass(frozen=True)
class Budget:
    """What no site may pass, and who says so."""

    epsilon: float
    delta: float
    source: str


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
    budget = budget_of(evidence)
    worst = max((cost.value for cost in spent.values()), default=0.0)
    at_budget = {}
    if budget is not None:
        at_budget = {site: cost.value for site, cost in totals(accounts, budget.delta, accountant).items()}
    asked = [
        ledger_verifies(evidence.books),
        signatures_are_held_against_known_keys(evidence.books),
        every_entry_is_signed(evidence.books),
        files_are_as_left(evidence),
        something_is_claimed(lines),
        delta_is_small(evidence.delta),
        seed_is_secret(lines, evidence.runs),
        every_release_has_noise(lines),
        one_unit_is_claimed(accounts),
        combination_has_a_guarantee(lines),
        amplification_is_earned(lines),
        folders_are_given(lines, evidence.runs),
        secure_sum_stood(lines, evidence.runs),
        booked_as_configured(lines, evidence.runs),
        contributions_are_booked(lines, evidence.runs),
        summary_agrees(accounts, evidence.runs, accountant),
        figures_are_covered(evidence.runs, evidence.statement),
        personal_models_stay(evidence.runs, evidence.statement),
        budget_is_kept(budget, at_budget),
        accountants_agree(worst, second),
        audits_agree(evidence.audits, _claiming(evidence, lines), worst, evidence.delta),
    ]
    found = [finding for finding in asked if finding is not None]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.verdict)))


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


# Is the record whole?


def ledger_verifies(books: Sequence[BookEvidence]) -> Finding:
    bad = [book for book in books if book.verified is None]
    if bad:
        return _finding(
            LEDGER_VERIFIES,
            UNSOUND,
            "A ledger does not verify: it is not what was written, so nothing in it supports a claim.",
            [f"{book.path}: {book.bad_entry}: {book.failure}" for book in bad],
            "Find out who changed the file, and restore it from a copy whose last hash was kept elsewhere.",
        )
    return _finding(
        LEDGER_VERIFIES,
        SUPPORTED,
        "Every hash, signature and root was recomputed and holds, and so does every ε that a site signed.",
        [f"{book.path}: {sum(map(len, book.chains.values()))} entries" for book in books],
    )


def signatures_are_held_against_known_keys(books: Sequence[BookEvidence]) -> Finding:
    unknown = [book for book in books if book.keys != "elsewhere"]
    if unknown:
        return _finding(
            "keys come from the sites",
            UNDECIDED,
            "The signatures agree with each other, but the public keys were not got from the sites: whoever could "
            "rewrite the ledger could have made them all.",
            [
                f"{book.path}: " + ("keys from the run's own folder" if book.keys == "beside" else "no keys")
                for book in unknown
            ],
            "Get the public keys from the sites, by another way than this folder, and give them with --keys FILE.",
        )
    strangers = [f"{book.path}: no key of {name}" for book in books for name in book.strangers]
    if strangers:
        return _finding(
            "keys come from the sites",
            UNDECIDED,
            "Some chains are signed with keys that were not given: whoever wrote them may have made the key too.",
            strangers,
            "Get the missing public keys from their sites, and the coordinator's, and give them all with --keys FILE.",
        )
    return _finding(
        "keys come from the sites", SUPPORTED, "The signatures were held against keys that were given separately."
    )


def every_entry_is_signed(books: Sequence[BookEvidence]) -> Finding | None:
    open_ends = [
        f"{site.name}: {site.entries - site.signed} of {site.entries} entries"
        for book in books
        if book.verified is not None
        for site in book.verified.sites
        if site.entries > site.signed
    ]
    if open_ends:
        return _finding(
            "every entry is signed",
            UNDECIDED,
            "Some entries are not covered by any signed word: their writer could have left others out after them.",
            open_ends,
            "Have every site sign its chain; privfed run does so after each round that is measured.",
        )
    if not all(book.verified for book in books):
        return None
    return _finding("every entry is signed", SUPPORTED, "Signed words cover every entry of every chain.")


def files_are_as_left(evidence: Evidence) -> Finding | None:
    runs = [*evidence.runs, *([evidence.baseline] if evidence.baseline is not None else [])]
    changed = [run.changed for run in runs if run.changed]
    if changed:
        return _finding(
            FILES_AS_LEFT,
            UNSOUND,
            "A file of a run was changed, or is of another run: what it says supports nothing.",
            changed,
            "Restore the folder from a copy, and find out who changed it.",
        )
    if not runs or not all(book.verified for book in evidence.books):
        return None
    return _finding(
        FILES_AS_LEFT,
        SUPPORTED,
        "The runs' configurations, rounds, summaries and audits are those that the coordinator signed at their end.",
        [f"run {run.run}: {note}" for run in runs for note in run.missing],
    )


# Is the claim sound?


def something_is_claimed(lines: Sequence[Recorded]) -> Finding | None:
    if lines:
        return None
    return _finding(
        "something is claimed",
        UNDECIDED,
        "No spend could be read: there is no claim to support.",
        remedy="Give the ledger, or the folder, of a run that released something.",
    )


def delta_is_small(delta: float) -> Finding | None:
    """ε falls as δ rises: at a large δ any mechanism has a small ε, and so has giving whole records away at random."""
    if delta <= _MOST_DELTA:
        return None
    return _finding(
        "δ is small",
        UNSOUND,
        "δ is the chance that the promise fails altogether. At this size some records may be given away outright.",
        [f"δ = {delta:g}, and at most {_MOST_DELTA:g} is sensible"],
        "State ε at a δ far below one over the number of records.",
    )


def seed_is_secret(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding:
    known = [_name(line) for line in lines if line.entry.insecure_seed]
    known += [f"run {run.run}: privacy.insecure_seed" for run in runs if run.history.summary.privacy.insecure_seed]
    if known:
        return _finding(
            "seed is secret",
            UNSOUND,
            "The noise was made from a known seed: whoever knows it takes the noise away. Every ε is void.",
            known,
            "Run again without privacy.insecure_seed, on records that were never released this way.",
        )
    return _finding("seed is secret", SUPPORTED, "No entry says that its noise came from a known seed.")


def every_release_has_noise(lines: Sequence[Recorded]) -> Finding:
    bare = [_name(line) for line in lines if any(is_noiseless(charge.event) for charge in line.entry.charges)]
    if bare:
        return _finding(
            "every release has noise",
            UNSOUND,
            "Something was released without noise: ε of these records is infinite, whatever else was done.",
            bare,
            "Nothing takes a release back. Do not state an ε for these records.",
        )
    return _finding("every release has noise", SUPPORTED, "Every release in the ledger is booked with noise.")


def one_unit_is_claimed(accounts: Sequence[Account]) -> Finding | None:
    mixed = [f"{account.site}: {', '.join(account.units)}" for account in accounts if len(account.units) > 1]
    if not mixed:
        return None
    return _finding(
        "one unit is claimed",
        UNSOUND,
        "One data set was charged for different units, and the costs of different units do not add up.",
        mixed,
        "Keep to one unit for a data set and audience.",
    )


def combination_has_a_guarantee(lines: Sequence[Recorded]) -> Finding | None:
    refused: dict[str, str] = {}
    for line in lines:
        entry = line.entry
        if entry.unit is PrivacyUnit.NONE:
            continue
        try:
            check_supported(entry.unit, entry.noise)
        except NoGuarantee as refusal:
            refused.setdefault(str(refusal), _name(line))
    if not refused:
        return None
    return _finding(
        "unit and noise have a guarantee",
        UNSOUND,
        "The unit claimed and the place where the noise is added go with no guarantee.",
        [f"{where}: {why}" for why, where in refused.items()],
        "Use a combination that the toolkit supports.",
    )


def amplification_is_earned(lines: Sequence[Recorded]) -> Finding | None:
    """Selection of sites hides a site only from whoever can not see who took part, and here everybody inside can."""
    claimed = [
        _name(line)
        for line in lines
        if line.entry.unit is PrivacyUnit.CLIENT
        for charge in line.entry.charges
        if isinstance(charge.event, PoissonGaussian | Skellam) and charge.event.sample_rate < 1
    ]
    if not claimed:
        return None
    return _finding(
        "amplification is earned",
        UNSOUND,
        "ε counts on a secret choice of sites, but the cohort of every round is exposed to the server and the sites.",
        claimed,
        "Book every participation at its full price.",
    )


# Was it done as it was booked?


def folders_are_given(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    given = {run.run: {line.round for line in run.history.rounds} for run in runs}
    missing = [f"run {name}" for name in sorted({base_run(line.entry.run) for line in lines} - given.keys())]
    booked = {(line.entry.run, line.entry.round) for line in lines if line.entry.run in given}
    missing += [f"run {run}, round {number}" for run, number in sorted(booked) if number not in given[run]]
    if not missing:
        return None
    return _finding(
        "folders of all runs are given",
        UNDECIDED,
        "A ledger does not say what else was released: figures, personal models, or who saw which sums.",
        missing,
        "Give the folder of every run on the ledger too.",
    )


def secure_sum_stood(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    shared = {base_run(line.entry.run) for line in lines if line.entry.noise is NoiseSite.DISTRIBUTED}
    plain = [
        f"run {run.run}: aggregation.kind = {run.history.config.aggregation.kind!r}"
        for run in runs
        if run.run in shared and run.history.config.aggregation.kind == "plain"
    ]
    for line in lines:
        how = deployment_in(line)
        if line.entry.noise is NoiseSite.DISTRIBUTED and how is not None and not how.secure_sum:
            plain.append(f"{_name(line)}: booked without a secure sum")
    if plain:
        return _finding(
            "noise in shares has a secure sum",
            UNSOUND,
            "The noise is in shares, but the server saw every site's vector under that site's share alone.",
            plain,
            "Use aggregation.kind = 'masked' or 'homomorphic'.",
        )
    return None


def booked_as_configured(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    """No event with more noise, a smaller sample or more shares than the run had."""
    if not any(run.private for run in runs):
        return None
    contributed = {
        (run.run, line.round): len(line.contributed) for run in runs for line in run.history.rounds if line.contributed
    }
    facts = {run.run: run for run in runs}
    levels = {
        (run.run, line.round): line.noise_multiplier
        for run in runs
        for line in run.history.rounds
        if run.history.config.privacy.schedule == "spend"
    }
    wrong = []
    for line in lines:
        entry = line.entry
        run = facts.get(entry.run)
        if run is None:  # figures and moments have noise of their own
            continue
        rate = run.history.config.privacy.rate
        noise = levels.get((entry.run, entry.round), run.facts.noise_multiplier)
        for charge in entry.charges:
            event = charge.event
            if isinstance(event, Skellam):
                most = contributed.get((entry.run, entry.round))
                if entry.kind == "settle" and most is not None and event.shares > most:
                    wrong.append(f"{_name(line)}: {event.shares} shares of noise booked, {most} sites in the sum")
                booked = math.sqrt(event.variance / event.l2_squared) if entry.kind != "settle" else 0.0
            else:
                booked = event.noise_multiplier
                if isinstance(event, PoissonGaussian) and event.sample_rate < rate * (1 - _ROUNDING):
                    wrong.append(f"{_name(line)}: sample rate {event.sample_rate:g} booked, {rate:g} configured")
            if booked > noise * (1 + _AGREES):
                wrong.append(f"{_name(line)}: noise multiplier {booked:.4g} booked, {noise:.4g} configured")
    if wrong:
        return _finding(
            "booked as configured",
            UNSOUND,
            "The ledger books more protection than the run was configured to give.",
            wrong,
            "Correct what writes the ledger; the true ε is larger.",
        )
    return _finding(
        "booked as configured",
        SUPPORTED,
        "No entry books more noise, a smaller sample or more shares of noise than its run was configured with.",
    )


def contributions_are_booked(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    if not any(run.private for run in runs):
        return None
    booked = {(line.entry.run, line.entry.site, line.entry.round) for line in lines}
    missing = [
        f"{site}, run {run.run}, round {line.round}"
        for run in runs
        if run.private
        for line in run.history.rounds
        for site in line.contributed
        if (run.run, site, line.round) not in booked
    ]
    if missing:
        return _finding(
            "every contribution is booked",
            UNSOUND,
            "The run's record of its rounds names contributions that no ledger entry pays for.",
            missing,
            "Give the ledger that the run used. If this is it, entries are missing.",
        )
    return _finding(
        "every contribution is booked", SUPPORTED, "Every contribution that the runs report is paid for in the ledger."
    )


def summary_agrees(accounts: Sequence[Account], runs: Sequence[RunEvidence], accountant: Accountant) -> Finding | None:
    """What a run says it cost, against its ledger as far as its own last entry."""
    wrong, asked = [], False
    for run in runs:
        if not run.private:
            continue
        privacy = run.history.summary.privacy
        for account in accounts:
            said = privacy.epsilon.per_site.get(account.site)
            own = [line.sequence for line in account.lines if base_run(line.entry.run) == run.run]
            if not own or account.book.path.resolve() != run.ledger.resolve():
                continue
            chain = account.book.chains[account.site]
            charges = Spends(chain, account.dataset, account.audience).upto(max(own))
            found, asked = accountant.epsilon(charges, privacy.delta).value, True
            if said is None or said < found * (1 - _AGREES):
                shown = "no ε" if said is None else f"ε = {said:.4g}"
                wrong.append(f"{account.site}, run {run.run}: the summary says {shown}, its events give {found:.4g}")
    if wrong:
        return _finding(
            "summary agrees with the ledger",
            UNSOUND,
            "A run's own summary states a smaller ε than the events in its ledger cost.",
            wrong,
            "State the ε of this report instead.",
        )
    if not asked:
        return None
    return _finding(
        "summary agrees with the ledger", SUPPORTED, "No run states a smaller ε than the events in its ledger cost."
    )


# What was released beside the model?


def figures_are_covered(runs: Sequence[RunEvidence], statement: Statement) -> Finding | None:
    exact, leaks = [], []
    for run in runs:
        if not run.private:
            continue
        evaluation = run.history.config.evaluation
        measured = {
            site
            for line in run.history.rounds
            for site, figures in (*line.sites.items(), *line.unseen.items())
            if (figures.global_score, figures.personalized, figures.local_only) != (None, None, None)
        }
        if not measured:
            continue
        if evaluation.release == "internal":
            exact.append(f"run {run.run}: exact figures of {len(measured)} sites, evaluation.release = 'internal'")
        elif evaluation.release == "private":
            leaks.append(f"run {run.run}: exact figures of {len(measured)} sites beside the noised ones")
        elif not measured <= set(evaluation.public_sites):
            hidden = sorted(measured - set(evaluation.public_sites))
            leaks.append(f"run {run.run}: exact figures of {', '.join(hidden[:3])}, not among evaluation.public_sites")
    if leaks or (exact and "metrics" in statement.released):
        return _finding(
            "figures are covered",
            UNSOUND,
            "Figures of accuracy were released without noise. They come from the records, and no ε covers them.",
            leaks or exact,
            "Release figures with evaluation.release = 'private', or not at all.",
        )
    if exact:
        return _finding(
            "figures are covered",
            UNDECIDED,
            "The sites gave exact figures of accuracy to the coordinator. ε covers the updates and the model, not "
            "these figures. Whether anybody outside saw them can not be told from here.",
            exact,
            "Use evaluation.release = 'private', or policy.release_figures = false, so that no exact figure leaves.",
        )
    if not any(run.private for run in runs):
        return None
    return _finding("figures are covered", SUPPORTED, "No figure left a site but through noise that ε counts.")


def personal_models_stay(runs: Sequence[RunEvidence], statement: Statement) -> Finding | None:
    if "personal-models" in statement.released:
        return _finding(
            "personal models stay",
            UNSOUND,
            "The curator states that personal models were released. They are trained on the records without noise.",
            ["the curator's statement: released = personal-models"],
            "Give out the global model alone.",
        )
    readable = [f"{run.path / name}" for run in runs if run.private for name in run.readable_by_others]
    if readable:
        return _finding(
            "personal models stay",
            UNSOUND,
            "Personal models or exact figures lie where other users of the machine can read them.",
            readable,
            "Make the run's folder readable for its owner alone (chmod 700).",
        )
    if not any(run.private for run in runs):
        return None
    return _finding(
        "personal models stay",
        SUPPORTED,
        "The files with personal models are for their owner alone, and the curator states no release of them.",
    )


# Is it within bounds?


def budget_is_kept(budget: Budget | None, spent: Mapping[str, float]) -> Finding:
    """
    Args:
        spent: site → ε at the budget's δ.
    """
    if budget is None:
        return _finding(
            "budget is kept",
            UNDECIDED,
            "No budget is known, so nobody can say whether ε is too large.",
            remedy="State it with --budget, or give the folder of the run, whose configuration has it.",
        )
    over = {site: value for site, value in spent.items() if value > budget.epsilon * (1 + _ROUNDING)}
    limit = f"budget ε = {budget.epsilon:g} at δ = {budget.delta:g}, {budget.source}"
    if over:
        return _finding(
            "budget is kept",
            OVER,
            "A site has spent more than its budget.",
            [limit, *(f"{site}: ε = {value:.4g}" for site, value in sorted(over.items()))],
            "Release nothing more from these records.",
        )
    if not spent:
        return _finding("budget is kept", UNDECIDED, "No spend could be read.", [limit])
    return _finding("budget is kept", SUPPORTED, "No site has spent more than its budget.", [limit])


def accountants_agree(epsilon: float, second: Sequence[Opinion]) -> Finding:
    """Every figure is a bound, so at least the true ε: ours must not be far below all others."""
    others = [(line.accountant, line.epsilon) for line in second if line.epsilon is not None]
    shown = [f"this report: ε = {epsilon:.5g}", *(f"{name}: {value:.5g}" for name, value in others)]
    if not math.isfinite(epsilon):
        return _finding("accountants agree", UNDECIDED, "ε is infinite: there is no figure to compare.")
    theirs = [value for name, value in others if not name.endswith("privfed")]
    if theirs and epsilon < min(theirs) * (1 - 2 * _AGREES):
        return _finding(
            "accountants agree",
            UNSOUND,
            "Every other accountant finds a larger ε than this report.",
            shown,
            "Use the larger figure until it is clear who is wrong.",
        )
    if not theirs:
        return _finding(
            "accountants agree",
            UNDECIDED,
            "No second accountant could check the figure.",
            [f"{line.accountant}: {line.note}" for line in second if line.note],
        )
    return _finding("accountants agree", SUPPORTED, "A second accountant finds no larger ε.", shown)


def _claiming(evidence: Evidence, lines: Sequence[Recorded]) -> set[str]:
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
        return _finding(
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
        return _finding(
            "attacks stay below the claim",
            UNDECIDED,
            "Nobody attacked the mechanism. Hashes and signatures do not show that noise was added.",
            missing or ["no run that claims anything was given"],
            "Run privfed audit RUN, then make this report again.",
        )
    clean = [_shown(audit) for audit in audits if audit.verdict == "supported"]
    if not all(any(audit.verdict == "supported" for audit in own) for own in by_run.values()):
        return _finding(
            "attacks stay below the claim",
            UNDECIDED,
            "The attacks found nothing, but they were too weak to tell: below ε ≈ 2 no attack can pass a mechanism.",
            [_shown(audit) for audit in audits],
        )
    return _finding(
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


def _finding(rule: str, verdict: Verdict, reason: str, evidence: Sequence[str] = (), remedy: str = "") -> Finding:
    shown = list(evidence[:_SHOWN])
    if len(evidence) > _SHOWN:
        shown.append(f"and {len(evidence) - _SHOWN} more")
    return Finding(rule=rule, verdict=verdict, reason=reason, evidence=tuple(shown), remedy=remedy)


def _name(line: Recorded) -> str:
    entry = line.entry
    return f"{entry.site}, entry {line.sequence} (run {entry.run}, round {entry.round})"
