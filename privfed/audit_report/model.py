"""The audit report as data: what the HTML page shows and the JSON form holds, and nothing beside it.

An ε of None is no bound: infinite, or not to be had. Whoever reads the JSON form reads None as "not protected".
"""

from typing import Literal

import msgspec

FORMAT: Literal["privfed-audit-report/1"] = "privfed-audit-report/1"
ANNEX = "Supporting evidence, not a legal determination."

Verdict = Literal["UNSOUND-CLAIM", "AUDIT-VIOLATION", "BUDGET-EXCEEDED", "INCONCLUSIVE", "CLAIM-SUPPORTED"]
ORDER: tuple[Verdict, ...] = (
    "UNSOUND-CLAIM",
    "AUDIT-VIOLATION",
    "BUDGET-EXCEEDED",
    "INCONCLUSIVE",
    "CLAIM-SUPPORTED",
)
"""The gravest first: the report's verdict is the first that any rule gives."""
LEDGER_VERIFIES, FILES_AS_LEFT = "ledger verifies", "files are as the run left them"
INTACT = (LEDGER_VERIFIES, FILES_AS_LEFT)
"""The rules about what was changed since, rather than about what was done."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the report."""


class Finding(Part, frozen=True, kw_only=True):
    """What one rule says, on what evidence; `remedy` is what would change it, empty where nothing has to."""

    rule: str
    verdict: Verdict
    reason: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""


class About(Part, frozen=True, kw_only=True):
    """Who answers for the data and why it is used; as the curator states it, never checked."""

    curator: str = ""
    purpose: str = ""
    data_product: str = ""
    date: str = ""


class Claim(Part, frozen=True, kw_only=True):
    """The promise. `epsilon` is the largest of any site, over all runs on the ledgers; `void` says that it is worth
    nothing. `budget` is the ε at `budget_delta` that no site may pass."""

    flavour: str
    unit: str
    adjacency: str
    records_per_unit: str
    epsilon: float | None
    delta: float
    deployment: str
    void: bool
    budget: float | None
    budget_delta: float | None


class Fact(Part, frozen=True, kw_only=True):
    """A term and what it is here."""

    term: str
    value: str


class Scope(Part, frozen=True, kw_only=True):
    """Which data the promise is about, what it leaves open, and what may be done with what was released."""

    domain: str
    unprotected: tuple[Fact, ...]
    post_processing: str


class RunLine(Part, frozen=True, kw_only=True):
    """One run that spent on the ledgers. `entries` are its spends; `given` says that its folder was read too."""

    ledger: str
    run: str
    sites: int
    rounds: int
    entries: int
    first: str
    last: str
    given: bool


class Composition(Part, frozen=True, kw_only=True):
    """How the costs add up over runs, ledgers and sites."""

    rule: str
    ledgers: tuple[str, ...]
    runs: tuple[RunLine, ...]


class SiteLoss(Part, frozen=True, kw_only=True):
    """What one data set of a site has spent towards one audience, over all runs."""

    ledger: str
    site: str
    dataset: str
    audience: str
    unit: str
    noise: str
    epsilon: float | None
    accountant: str
    tolerance: float
    entries: int
    signed: int
    known_seed: bool


class AdversaryLine(Part, frozen=True, kw_only=True):
    """ε against one adversary, the largest of any site; None where there is none, and why."""

    adversary: str
    colluders: int
    epsilon: float | None
    reason: str


class Thresholds(Part, frozen=True, kw_only=True):
    """From how many colluders or dropouts on things change; of the smallest cohort that a run invited."""

    run: str
    sites: int
    threshold: int | None
    minimum_cohort: int
    colluders: int
    dropouts: int
    smallest_sum: int | None


class Mechanism(Part, frozen=True, kw_only=True):
    """What was done to the data, in public constants."""

    names: tuple[str, ...]
    constants: tuple[Fact, ...]


class EventGroup(Part, frozen=True, kw_only=True):
    """Equal entries of one chain, counted together: `entries` of them, in the rounds from `first_round` to
    `last_round`. `shares` are the fewest and the most shares of noise in one sum, where noise comes in shares."""

    ledger: str
    site: str
    audience: str
    run: str
    kind: Literal["charge", "settled", "unsettled"]
    first_round: int
    last_round: int
    entries: int
    events: tuple[str, ...]
    shares: tuple[int, int] | None
    known_seed: bool


class Opinion(Part, frozen=True, kw_only=True):
    """What one accountant says of the chain that has spent most; every figure is an upper bound."""

    accountant: str
    epsilon: float | None
    tolerance: float
    note: str


class Accounting(Part, frozen=True, kw_only=True):
    """Who computed ε, how exactly, and who computed it a second time."""

    accountant: str
    versions: tuple[Fact, ...]
    tolerance: float
    notes: tuple[str, ...]
    second: tuple[Opinion, ...]


class Execution(Part, frozen=True, kw_only=True):
    """How units were drawn and noise was made, as the ledger has it."""

    sampling: tuple[str, ...]
    randomness: str
    arithmetic: str
    self_test: str


class Group(Part, frozen=True, kw_only=True):
    """Membership inference on some of the records, with a threshold of their own; rates as of the whole attack."""

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


class AuditResult(Part, frozen=True, kw_only=True):
    """One attack that `privfed audit` made: it shows, at `confidence`, that ε is at least `epsilon_lower`. It stands in
    the ledger, signed; `sha256` is of the whole result, whose note and figures are in the run's audit.json."""

    ledger: str
    run: str
    sha256: str
    level: int
    name: str
    claimed_epsilon: float | None
    delta: float | None
    epsilon_lower: float
    confidence: float
    trials: int
    verdict: str
    note: str
    seeds: tuple[int, ...]
    power: float | None
    figures: dict[str, float]
    roc: tuple[tuple[float, float], ...]
    groups: tuple[Group, ...]


class Lineage(Part, frozen=True, kw_only=True):
    """What else touched the data, or chose the model."""

    pre_training: str
    tuning: str
    repeated_runs: str
    metric_releases: str


class Figure(Part, frozen=True, kw_only=True):
    """One measure of one kind of model over the sites, and what, if anything, protects the figure itself."""

    run: str
    model: str
    metric: str
    mean: float | None
    worst_decile: float | None
    sd: float | None
    status: str


class Verification(Part, frozen=True, kw_only=True):
    """Whether a ledger's hashes, signatures, roots and ε hold; `bad_entry` is the first that does not."""

    ledger: str
    path: str
    verified: bool
    reason: str
    bad_entry: str
    entries: int
    signed: int
    rounds_witnessed: int
    keys: Literal["elsewhere", "beside", "none"]
    notes: tuple[str, ...]


class Curve(Part, frozen=True, kw_only=True):
    """ε of some sites after each of the rounds in `across`; None is no bound."""

    sites: tuple[str, ...]
    audience: str
    across: tuple[int, ...]
    epsilon: tuple[float | None, ...]


class Point(Part, frozen=True, kw_only=True):
    """ε and a score that were reached together."""

    run: str
    round: int
    epsilon: float
    model: str
    score: float


class Pair(Part, frozen=True, kw_only=True):
    """One (ε, δ) that holds of the chain that has spent most."""

    delta: float
    epsilon: float | None


class NoiseRound(Part, frozen=True, kw_only=True):
    """The noise of one round: the fewest shares that any site saw in its sum, the fewest that were allowed, how many
    sites booked it, and the smallest standard deviation of the whole noise over what one unit can move."""

    number: int
    run: str
    round: int
    shares: int | None
    least: int | None
    sites: int
    noise_multiplier: float


class Curves(Part, frozen=True, kw_only=True):
    """The numbers of the plots; of `metric`, less may be better."""

    epsilon: tuple[Curve, ...]
    accuracy: tuple[Point, ...]
    metric: str
    lower_is_better: bool
    delta: tuple[Pair, ...]
    noise: tuple[NoiseRound, ...]


class AuditReport(Part, frozen=True, kw_only=True):
    """The whole report."""

    format: Literal["privfed-audit-report/1"] = FORMAT
    privfed: str
    annex: str = ANNEX
    verdict: Verdict
    findings: tuple[Finding, ...]
    about: About
    claim: Claim
    scope: Scope
    composition: Composition
    sites: tuple[SiteLoss, ...]
    adversaries: tuple[AdversaryLine, ...]
    thresholds: tuple[Thresholds, ...]
    mechanism: Mechanism
    events: tuple[EventGroup, ...]
    accounting: Accounting
    execution: Execution
    audits: tuple[AuditResult, ...]
    lineage: Lineage
    utility: tuple[Figure, ...]
    subgroup_gap: str
    verification: tuple[Verification, ...]
    hazards: tuple[str, ...]
    non_claims: tuple[str, ...]
    curves: Curves

    @property
    def intact(self) -> bool:
        """Whether every ledger verifies and every file is as its run left it."""
        return not any(finding.rule in INTACT and finding.verdict == "UNSOUND-CLAIM" for finding in self.findings)
