"""What the page says in words: the claim, who sees what, what is not promised, what a term means.

The tables follow SECURITY.md and the adversaries of privacy.md section 4. A combination that is not in them gets no
promise: the page then says so.
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import PurePath

from privfed.config import Config
from privfed.data.tables import Table
from privfed.privacy.events import NoiseSite, PrivacyUnit

from .history import History

METHODS = {"reptile": "Reptile", "fomaml": "first-order MAML", "fedavg": "FedAvg", "local": "local training only"}


@dataclass(frozen=True)
class Adversary:
    """One line of the table of promises."""

    who: str
    sees: str
    promise: str


def delta_text(delta: float) -> str:
    """1e-05 as 10⁻⁵."""
    mantissa, _, exponent = f"{delta:e}".partition("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    value = f"{float(mantissa):g}"
    return f"10{power}" if value == "1" else f"{value} × 10{power}"


def epsilon_text(epsilon: float) -> str:
    """Three decimals, rounded up: a privacy loss is never shown smaller than it is."""
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.001"), ROUND_CEILING))


def signed(value: float) -> str:
    """With its sign, and a minus that is one."""
    return f"{value:+.3f}".replace("-", "−")


def method_name(config: Config) -> str:
    tag = str(type(config.method).__struct_config__.tag)
    return METHODS.get(tag, tag)


def data_name(config: Config) -> str:
    if isinstance(config.data, Table):
        files = [config.data.file] if config.data.file else sorted(config.data.files.values())
        return ", ".join(PurePath(file).name for file in files[:3]) + (" and more" if len(files) > 3 else "")
    return str(type(config.data).__struct_config__.tag)


def model_name(config: Config) -> str:
    if not config.model.hidden:
        return "logistic regression"
    widths = ", ".join(map(str, config.model.hidden))
    return f"neural network (hidden layer{'s' if len(config.model.hidden) > 1 else ''} of {widths})"


def headline(history: History) -> str:
    """What was trained, and where."""
    summary, config = history.summary, history.config
    kind = "simulated" if summary.simulated else "real"
    sites = f"{summary.sites} {kind} site{'s' if summary.sites != 1 else ''}"
    model = model_name(config).partition(" (")[0]
    if not config.method.sends:
        return f"A {model} was trained at each of {sites}, each alone"
    return f"A {model} was trained with {method_name(config)} across {sites}"


def claim(history: History) -> str:
    """The whole promise in one sentence; ε never without its company."""
    privacy = history.summary.privacy
    if privacy.unit == PrivacyUnit.NONE.value or privacy.epsilon.max is None:
        return (
            "This run makes no differential-privacy claim: nothing bounds what its updates and its model tell about a "
            "single record."
        )
    if not history.config.method.sends:
        return (
            "Each site trained alone and sent no update, so the others learn nothing about its records from training."
        )
    void = "VOID, because the seed of the noise is known. It would be: " if privacy.insecure_seed else ""
    return (
        f"{void}ε = {epsilon_text(privacy.epsilon.max)} at δ = {delta_text(privacy.delta)} for each {privacy.unit}, "
        f"against {_against(privacy.noise)}."
    )


def particulars(history: History) -> list[tuple[str, str]]:
    """What belongs to the claim and to the run, term by term."""
    config, summary = history.config, history.summary
    privacy = summary.privacy
    run = [
        ("Data", data_name(config)),
        ("Model", model_name(config)),
        ("Method", method_name(config)),
        ("Aggregation", summary.aggregation.kind if config.method.sends else "none: nothing is sent"),
    ]
    if privacy.unit == PrivacyUnit.NONE.value or not config.method.sends:
        return run
    return [
        ("Unit", f"one {privacy.unit}"),
        ("Adjacency", _words(privacy.adjacency)),
        ("Accountant", f"{privacy.accountant.upper()}, all runs on each ledger"),
        ("Sampling", privacy.sampling),
        ("Noise", f"{privacy.noise}, σ/C = {privacy.noise_multiplier:.4g}"),
        ("ε is", "the largest over sites"),
        *run,
    ]


def adversaries(history: History) -> list[Adversary]:
    """Who sees what in a run like this one, and what differential privacy promises against them."""
    config, summary = history.config, history.summary
    promise = _promise(history)
    unit = summary.privacy.unit if summary.privacy.unit != PrivacyUnit.NONE.value else "record"
    if not config.method.sends:
        return [
            Adversary("The server", "No update. Accuracy figures, which are exact", "No update leaves a site"),
            Adversary("Another site", "Nothing", "Nothing reaches it"),
            Adversary("Whoever gets a site's own model", "That model", "No claim: it is trained without noise"),
        ]
    rows: list[Adversary] = []
    cohorts = history.cohorts
    if summary.aggregation.kind == "masked":
        # Sites that leave for good make the cohort smaller: the promise is that of the smallest one.
        fewest = min((cohort.size - cohort.tolerated_dropouts for cohort in cohorts), default=None)
        smallest = f"at least {fewest} of {summary.sites}" if fewest is not None else "the"
        rows += [
            Adversary("A curious server", f"Each round, the sum of {smallest} sites' updates; no single one", promise),
            Adversary("The server and one site", "The sum without that site's own update", promise),
        ]
        if cohorts:
            threshold = min(cohort.threshold for cohort in cohorts)
            colluders = min(cohort.colluders for cohort in cohorts)
            holders = f"The server and {threshold} or more holders of a site's shares"
            stopped = f"The sum only, while no more than {colluders} of the sites collude with it"
            rows += [
                Adversary(holders, "That site's update: its mask no longer hides", promise),
                Adversary("A malicious server, which breaks the protocol", stopped, promise),
            ]
    elif summary.aggregation.kind == "homomorphic":
        holder = config.aggregation.key_holder
        fewest = min((cohort.minimum_cohort for cohort in cohorts), default=None)
        smallest = f"at least {fewest} of {summary.sites}" if fewest is not None else "the"
        total = f"Each round, the sum of {smallest} sites' updates"
        less = f"; {holder} is a site: less its own" if holder else ""
        rows += [
            Adversary("A curious server", f"{total}; no single one", promise),
            Adversary("The key holder", f"{total}{less}; no single one", promise),
            Adversary("The server and one site", "The sum without that site's own update", promise),
            Adversary("The server and the key holder together", "Every site's update, every round", promise),
            Adversary(
                "A malicious server, which breaks the protocol", "The sum only, unless the key holder helps it", promise
            ),
        ]
    elif summary.aggregation.kind == "plain":
        rows += [
            Adversary("A curious server", "Every site's update, every round", promise),
            Adversary("A malicious server, which breaks the protocol", "Every site's update, every round", promise),
        ]
    else:
        rows.append(Adversary("The server", f"What {summary.aggregation.kind} aggregation shows it", promise))
    rows += [
        Adversary("Another site", "The global model after each round", promise),
        Adversary("All other sites together", "This site's update: the change of the model less their own", promise),
        Adversary("Whoever gets the global model", "The final model", promise),
        Adversary(
            "A malicious site",
            "As any site; it can also poison the model or abort rounds",
            f"For others' {unit}s: {promise}" if promise.startswith("ε") else promise,
        ),
    ]
    return rows


def not_protected(history: History) -> list[str]:
    """The short list of SECURITY.md, with what this run adds to it."""
    config, summary = history.config, history.summary
    points = [
        "Accuracy and loss per site, here and in metrics.jsonl, are exact figures of the sites' own test records. They "
        "are internal: whoever publishes this page releases them.",
        "Who takes part, how often, how long it took, the table's columns and the public constants are visible.",
    ]
    if config.method.sends:
        points += [
            "A site can send any update within the bound. Nothing proves that it is honest (poisoning).",
            "A site's personal model is trained on its own records without noise. It must stay at the site.",
        ]
    if summary.privacy.unit == PrivacyUnit.NONE.value and config.method.sends:
        points.insert(0, "Membership inference on what was released: no noise was added, and sums tell about records.")
    if summary.aggregation.kind == "plain":
        points.insert(0, "Single updates: plain aggregation shows each one to the server.")
    points += [
        "Noise is sampled in floating point and rounded to a fixed-point grid; the proof of ε is for real numbers.",
        "Python promises neither constant time nor the erasure of secrets: a site's machine is trusted by the site.",
        "A ledger file replaced by an older copy is not found from the file alone; keep its last hash elsewhere.",
    ]
    if summary.simulated:
        points.append(
            "These sites were simulated on one machine, which held all records. The table says what the same messages "
            "would show between real hospitals."
        )
    else:
        points.append(
            "A machine that reads the files of several sites, as privfed run does, sees all their records. The table "
            "is about the messages between sites."
        )
    return points


def glossary(history: History) -> list[tuple[str, str]]:
    """The page's terms, one sentence each."""
    unit, adjacency = history.summary.privacy.unit, _words(history.summary.privacy.adjacency)
    return [
        ("ε (epsilon)", "How much more likely any outcome can become, by a factor of at most e to the ε, because one "
         "unit's data was there or not: smaller is more private."),
        ("δ (delta)", "The small probability, on top of ε, with which that bound may fail; it should be far below one "
         "over the number of records."),
        ("Unit", "Whose presence is hidden: " + (f"in this run, one {unit}." if unit != "none" else "in this run, "
         "nobody's, because no claim is made.")),
        ("Adjacency", f"What counts as the smallest difference between two data sets: {adjacency}."),
        ("Secure aggregation", "A protocol by which the server learns the sum of the sites' updates and not a single "
         "one of them."),
        ("Global model", "The one model that all sites trained together and all of them receive."),
        ("Personalised", "The global model adapted at a site to its own records; it never leaves that site."),
        ("Local-only", "A model that a site trained alone, without noise and without the others: what it would have "
         "had anyway."),
        ("Worst decile", "The mean over the tenth of the sites (at least one) with the lowest figures."),
        ("Hurt", "A site is hurt when its personalised model is worse than its own local-only one."),
    ]  # fmt: skip


def _promise(history: History) -> str:
    privacy = history.summary.privacy
    if privacy.unit == PrivacyUnit.NONE.value or privacy.epsilon.max is None:
        return "No claim"
    if privacy.insecure_seed:
        return "Void: the seed of the noise is known"
    if (
        privacy.unit not in (PrivacyUnit.RECORD.value, PrivacyUnit.PATIENT.value)
        or privacy.noise != NoiseSite.LOCAL.value
    ):
        return f"Not stated on this page for {privacy.unit} unit with {privacy.noise} noise"
    return f"ε ≤ {epsilon_text(privacy.epsilon.max)} for each {privacy.unit}, by its own site's noise"


def _against(noise: str) -> str:
    if noise == NoiseSite.LOCAL.value:
        return (
            "everybody who sees what leaves a site: the server, the other sites, all of them together, and whoever "
            "gets the model"
        )
    return "the adversaries in the table of promises"


def _words(adjacency: str) -> str:
    return {"add-or-remove-one": "one unit added or removed", "replace-one": "one unit replaced by another"}.get(
        adjacency, adjacency
    )
