"""What the report says in words: short sentences, every term explained once, nothing promised that is not computed."""

from collections.abc import Sequence

from privfed.privacy.events import Gaussian, NoiseSite, PatientMixture, PoissonGaussian, PrivacyUnit, Skellam
from privfed.report import words as run_words
from privfed.simulation.together import FEW
from privfed.summary import sampling

from .accounts import Account, multiplier
from .evidence import Evidence, RunEvidence
from .model import AuditResult, Claim, Execution, Fact, Lineage, Mechanism, RunLine, Scope, Verdict

NOT_STATED = "not stated"

VERDICTS: dict[Verdict, str] = {
    "UNSOUND-CLAIM": "The claim does not hold. At least one of its conditions is broken.",
    "AUDIT-VIOLATION": "An attack learned more than the claim allows. The claim is refuted.",
    "BUDGET-EXCEEDED": "The claim is sound, but a site spent more than it was allowed to.",
    "INCONCLUSIVE": "Nothing contradicts the claim, but not everything that it needs could be checked.",
    "CLAIM-SUPPORTED": "Everything that could be checked was checked, and supports the claim. This is not a proof.",
}

GLOSSARY = (
    ("Differential privacy", "A promise about a computation: its result is almost as likely whether or not one "
     "person's data was in it. Whoever sees the result can hardly tell."),
    ("ε (epsilon)", "How much the result may depend on one unit. The chance of any result changes by a factor of at "
     "most e to the power of ε. Zero is perfect privacy. Each release adds to it, and it never goes down."),
    ("δ (delta)", "A small chance with which the promise about ε may fail. It should be far below one over the number "
     "of units."),
    ("Unit", "Whose data is hidden: one record, one patient with all records, or one client, which is a whole site."),
    ("Adjacency", "What the smallest difference between two data sets is: here, that one unit is added or removed."),
    ("Site", "A party that holds records, such as a hospital. Its records do not leave it."),
    ("Round", "One exchange: the server sends the model, the sites send updates, the server adds them up."),
    ("Audience", "Who sees a release. Releases to different audiences are counted apart."),
    ("Noise", "Random numbers added on purpose, so that single units can not be made out."),
    ("Noise multiplier", "How strong the noise is: its standard deviation over the most that one unit can move the "
     "result."),
    ("Clipping", "Cutting each unit's influence to a fixed size, before noise is added."),
    ("Secure sum", "A protocol by which the server learns the sum of the sites' updates and no single one."),
    ("Share of noise", "With a secure sum, each site adds a part of the noise. The sum carries all parts."),
    ("Poisson sampling", "Each unit is in a round by its own coin, independently of all others. This lowers ε. "
     "Shuffling is something else and lowers it less."),
    ("Accountant", "The program that computes ε from what happened. PLD and RDP are two methods for it; both give "
     "upper bounds."),
    ("Composition", "Adding up what several releases cost together."),
    ("Ledger", "The list of everything that was released. Each entry carries a hash over the one before, so that a "
     "later change shows."),
    ("Signed word", "A site's digital signature over its ledger and its ε. It can be checked by everybody with the "
     "site's public key."),
    ("Merkle root", "One number that stands for all signed words of a round. The coordinator signs it."),
    ("Audit (attack)", "An attempt to tell, from the outputs, whether a unit was in the data. Success gives a lower "
     "limit for the true ε."),
    ("Colluders", "Sites that pool what they know with the server, against another site."),
    ("Worst decile", "The mean over the tenth of the sites with the worst figures."),
)  # fmt: skip

HAZARDS = (
    "Only what is in the ledger is counted. A copy of the records used elsewhere is not.",
    "If one person has records at several sites, the costs of these sites add up for that person. The report takes "
    "the largest site, as if no person were at two.",
    "A small δ is not zero. With many records, δ must be far below one over their number.",
    "A ledger file replaced by an older copy of itself is found only by whoever kept a later signed word.",
)

NON_CLAIMS = (
    "That a model tells nothing about groups or populations. Differential privacy hides single units, not facts about "
    "many.",
    "That the records were collected or used lawfully, or are correct.",
    "That the sites and the server followed the protocol in what the ledger does not record.",
    "That the software has no faults. Audits look for some of them.",
    "That the data are anonymous in the legal sense. That is for a lawyer to say, with more than this report.",
)

RULE = (
    "Costs add up over all runs that touched a data set, and never start again. A site with several data sets, ledgers "
    "or audiences is charged for all of them together. Different sites hold different people: the largest site counts, "
    "not the sum."
)


def verdict_title(verdict: Verdict) -> str:
    return verdict.replace("-", " ")


def claim(
    evidence: Evidence,
    accounts: Sequence[Account],
    *,
    epsilon: float | None,
    void: bool,
    budget: tuple[float, float] | None,
) -> Claim:
    units = sorted({line.entry.unit for account in accounts for line in account.lines})
    places = {line.entry.noise for account in accounts for line in account.lines}
    return Claim(
        flavour="approximate differential privacy, (ε, δ)",
        unit=", ".join(unit.value for unit in units) or NOT_STATED,
        adjacency="add-or-remove-one",
        records_per_unit=evidence.statement.records_per_unit or _records_per_unit(evidence, units),
        epsilon=epsilon,
        delta=evidence.delta,
        deployment=deployment(places),
        void=void,
        budget=budget[0] if budget else None,
        budget_delta=budget[1] if budget else None,
    )


def deployment(places: set[NoiseSite]) -> str:
    if not places:
        return NOT_STATED
    return "; ".join(
        {
            NoiseSite.LOCAL: "local noise: each site adds all of its noise before anything leaves it",
            NoiseSite.DISTRIBUTED: "distributed noise: each site adds a share, and a secure sum joins them",
            NoiseSite.CENTRAL: "central noise: a trusted server adds it",
        }[place]
        for place in sorted(places)
    )


def _records_per_unit(evidence: Evidence, units: Sequence[PrivacyUnit]) -> str:
    bounds = {run.history.config.privacy.max_records for run in evidence.runs if run.private}
    if units == [PrivacyUnit.RECORD]:
        return "1"
    if units == [PrivacyUnit.PATIENT]:
        known = [bound for bound in bounds if bound is not None]
        return f"at most {max(known)}" if known else "any number: a patient's whole contribution is clipped"
    if units == [PrivacyUnit.CLIENT]:
        return "all records of a site"
    return NOT_STATED


def scope(evidence: Evidence) -> Scope:
    data = sorted({run_words.data_name(run.history.config) for run in evidence.runs})
    simulated = any(run.history.summary.simulated for run in evidence.runs)
    domain = evidence.statement.data_domain or (f"records from {', '.join(data)}" if data else NOT_STATED)
    if simulated:
        domain += " (simulated: one table cut into sites, not real hospitals)"
    return Scope(
        domain=domain,
        unprotected=(
            Fact(term="How many sites, and their names", value="Visible to everybody in the federation."),
            Fact(term="Who took part in which round, and when", value="Visible to the server and in this ledger."),
            Fact(
                term="Columns, their ranges, and the classes or the range of what is predicted",
                value="Public: they are agreed before the run.",
            ),
            Fact(term="How many rounds, and all public constants", value="Public: they stand in this report."),
            Fact(
                term="How many records a site has",
                value="Not used in any release. It may show in exact figures of accuracy, if such were given.",
            ),
            Fact(term="How long a computation took", value="Not hidden. It may tell how many records there are."),
        ),
        post_processing="Whatever is computed from the noised sums alone costs nothing more: the global model, its "
        "predictions, its choice among rounds by noised figures. What looks at the records again costs again.",
    )


_FIGURES = {
    "guesses": "guesses made",
    "correct": "of them right",
    "canaries_show": "share of its effect that a canary showed",
    "epsilon_lower_any_mechanism": "limit without assumptions on the mechanism",
    "fpr_upper": "false alarms at most",
    "fnr_upper": "misses at most",
    "auc": "area under the curve",
    "tpr_at_1_percent_fpr": "members found at 1 % false alarms",
    "tpr_low": "at least",
    "tpr_high": "at most",
    "checks": "checks",
    "failed": "failed",
}


def figures_of(audit: AuditResult) -> str:
    """An attack's further numbers, in words; those that stand elsewhere on the page, or are steps, are left out."""
    shown = [f"{text} {audit.figures[name]:.4g}" for name, text in _FIGURES.items() if name in audit.figures]
    if audit.level in (2, 4):  # its checks stand in the note; the limits of ε's halves say nothing without a claim
        shown = [line for line in shown if not line.startswith(("checks", "failed", "false alarms", "misses"))]
    if audit.power is not None:
        shown.append(f"would have noticed half of the noise with probability {audit.power:.2f}")
    return "; ".join(shown)


def mechanism(evidence: Evidence, accounts: Sequence[Account]) -> Mechanism:
    kinds = {type(charge.event) for account in accounts for charge in account.charges}
    names = [
        text
        for kind, text in (
            (Gaussian, "Gaussian mechanism: a clipped sum with Gaussian noise"),
            (PoissonGaussian, "Sampled Gaussian mechanism (DP-SGD): a clipped sum over a Poisson sample, with noise"),
            (PatientMixture, "Mixture of Gaussians: sampled records, with a bound on the records of a patient"),
            (Skellam, "Distributed Skellam mechanism: integer noise in shares, joined by a secure sum"),
        )
        if kind in kinds
    ]
    facts = []
    several = len(evidence.runs) > 1
    for run in evidence.runs:
        config = run.history.config
        prefix = f"{run.run}: " if several else ""
        client = config.privacy.unit is PrivacyUnit.CLIENT
        bound = config.privacy.max_update_norm if client else config.privacy.max_grad_norm
        clip = f"{bound:g}" if config.privacy.clip == "fixed" else f"{bound:g} at the start, adaptive"
        facts += [
            Fact(term=f"{prefix}Task", value=run_words.TASKS[run_words.task_name(config)]),
            Fact(term=f"{prefix}Method", value=run_words.method_name(config)),
            Fact(term=f"{prefix}Model", value=f"{run_words.model_name(config)}; no batch normalisation"),
            Fact(term=f"{prefix}Rounds planned", value=str(config.rounds)),
            Fact(term=f"{prefix}Noise multiplier", value=_noise_multiplier(run)),
            Fact(term=f"{prefix}Clipping norm C", value=clip),
            Fact(term=f"{prefix}Sample rate", value=f"{config.privacy.rate:g}"),
            Fact(term=f"{prefix}Expected batch size", value=f"{config.privacy.expected_batch_size:g}"),
            Fact(term=f"{prefix}Aggregation", value=config.aggregation.kind),
            Fact(term=f"{prefix}SHA-256 of config.toml", value=f"{run.facts.config_sha256[:16]}…"),
        ]
    if not evidence.runs:
        strengths = sorted({multiplier(charge.event) for account in accounts for charge in account.charges})
        shown = [f"{value:.4g}" for value in strengths]
        if len(shown) > 6:
            shown = [shown[0], "…", shown[-1]]
        facts.append(Fact(term="Noise multipliers booked", value=", ".join(shown) or "none"))
    return Mechanism(names=tuple(names), constants=tuple(facts))


def _noise_multiplier(run: RunEvidence) -> str:
    """σ/C of a round's smallest sum; where the budget is spent as it is given back, of all rounds."""
    planned = f"{run.facts.noise_multiplier:.6g}"
    levels = [line.noise_multiplier for line in run.history.rounds if line.contributed]
    if run.history.config.privacy.schedule != "spend" or not levels:
        return planned
    least, most = min(levels), max(levels)
    return (
        f"{least:.6g} to {most:.6g}, round by round: what a sum of more sites did not need went to later rounds. Every "
        "round is booked with its own"
    )


def execution(evidence: Evidence, accounts: Sequence[Account], audits: Sequence[AuditResult]) -> Execution:
    events = {charge.event for account in accounts for charge in account.charges}
    drawn = sorted({event.sample_rate for event in events if isinstance(event, PoissonGaussian | PatientMixture)})
    lines = [f"Booked: a Poisson sample, rate {rate:g}" for rate in drawn[:8]]
    if len(drawn) > 8:
        lines.append(f"and {len(drawn) - 8} more rates, up to {drawn[-1]:g}")
    if any(isinstance(event, Gaussian) or (isinstance(event, Skellam) and event.sample_rate == 1) for event in events):
        lines.append("Booked: every unit in every release")
    lines += [f"Configured, run {run.run}: {sampling(run.history.config)}" for run in evidence.runs if run.private]
    known = any(line.entry.insecure_seed for account in accounts for line in account.lines)
    integers = {isinstance(event, Skellam) for event in events}
    arithmetic = {
        frozenset({True}): "Integers: noise and sums are exact, and the proof is about these integers.",
        frozenset({False}): "Floating point, rounded to a fixed grid: the proof is for real numbers, and a gap between "
        "the two is not covered.",
        frozenset({True, False}): "Both: integers where noise comes in shares, floating point elsewhere, whose proof "
        "is for real numbers.",
    }.get(frozenset(integers), NOT_STATED)
    tests = [audit for audit in audits if audit.level == 2]
    return Execution(
        sampling=tuple(lines) or (NOT_STATED,),
        randomness="A KNOWN SEED: whoever knows it can compute the noise and take it away."
        if known
        else "ChaCha20 streams under 256-bit keys; each site's key comes from its operating system's secure source.",
        arithmetic=arithmetic,
        self_test="; ".join(f"{audit.name}: {audit.verdict}" for audit in tests)
        or "not run: privfed audit RUN tests the noise (level 2)",
    )


def lineage(evidence: Evidence, runs: Sequence[RunLine], accounts: Sequence[Account]) -> Lineage:
    stated, given = evidence.statement, evidence.runs
    start = "none: every model starts from parameters drawn from a public seed" if given else NOT_STATED
    releases = sorted({run.history.config.evaluation.release for run in given})
    counted = sum(
        line.entry.run.endswith("/figures") and line.entry.kind != "reserve"
        for account in accounts
        for line in account.lines
    )
    figures = "; ".join(
        {
            "internal": "exact figures to the coordinator, which no ε covers",
            "private": f"noised counts, {counted} entries in the ledger",
            "public-cohort": "exact figures of public sites alone",
        }[release]
        for release in releases
    )
    return Lineage(
        pre_training=stated.pre_training or start,
        tuning=stated.tuning
        or f"{NOT_STATED}. Settings tried on the same records cost privacy too, unless they stand in this ledger",
        repeated_runs=stated.repeated_runs or f"{len(runs)} run{'s' if len(runs) != 1 else ''}, all counted together",
        metric_releases=figures or NOT_STATED,
    )


def hazards(evidence: Evidence) -> tuple[str, ...]:
    points = list(HAZARDS)
    for run in evidence.runs:
        points += [point for point in run_words.not_protected(run.history) if point not in points]
    if any(_together(run) for run in evidence.runs):
        points.append(
            "The simulation computed the gradients of all sites in one pass. A model made for it could use how its "
            "sums are rounded; a site in a network computes its own."
        )
    if any(audit.level == 4 for audit in evidence.audits):
        points.append("Personal models were attacked (level 4): see the audits. They are not covered by ε.")
    if evidence.baseline is not None:
        points.append(
            f"The baseline run {evidence.baseline.run} used records without noise. Its figures stand here for "
            "comparison; what it released is not covered by any ε."
        )
    return tuple(points)


def _together(run: RunEvidence) -> bool:
    """Whether a simulation may have computed several sites' gradients in one pass."""
    engine, history = run.history.config.simulation.engine, run.history
    return run.private and (engine == "cohort" or (engine == "auto" and history.summary.sites >= FEW))
