"""What the page says in words: the claim, who sees what, what is not promised, what a term means.

The table of promises is `promises`'.
"""

from decimal import ROUND_CEILING, Decimal
from pathlib import PurePath

from privfed.config import Config
from privfed.data.arrays import Arrays
from privfed.data.tables import Table
from privfed.models import CNN, MLP, Embedding, Factory, Signal
from privfed.privacy.events import NoiseSite, PrivacyUnit

from .history import History

METHODS = {
    "reptile": "Reptile",
    "fomaml": "first-order MAML",
    "fedavg": "FedAvg",
    "fedsgd": "FedSGD",
    "local": "local training only",
}
UNITS = {"record": "record", "patient": "patient", "client": "whole site"}


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
    if isinstance(config.data, Arrays):
        return PurePath(config.data.file).name
    return str(type(config.data).__struct_config__.tag)


TASKS = {
    "classification": "classification",
    "regression": "regression",
    "rating": "rating prediction",
    "survival": "survival, by discrete-time hazards",
    "cox": "survival, by Cox's proportional hazards",
}
_LINEAR = {
    "classification": "logistic regression",
    "regression": "linear regression",
    "rating": "linear model of ratings",
    "survival": "logistic model of hazards",
    "cox": "Cox regression",
}
_NETWORKS = {
    MLP: "neural network",
    CNN: "convolutional network",
    Signal: "convolutional network over time",
    Embedding: "model of items",
}
_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "c-index": "C-index",
}


def metric_name(metric: str) -> str:
    return _METRICS.get(metric, metric)


def task_name(config: Config) -> str:
    return str(type(config.task).__struct_config__.tag)


def model_name(config: Config) -> str:
    model = config.model
    if isinstance(model, Factory):
        return f"network of the user's own ({model.factory})"
    if isinstance(model, MLP) and not model.hidden:
        return _LINEAR[task_name(config)]
    widths = ", ".join(map(str, model.hidden))
    hidden = [f"hidden layer{'s' if len(model.hidden) > 1 else ''} of {widths}"] if model.hidden else []
    if isinstance(model, CNN | Signal):
        hidden.insert(0, f"{', '.join(map(str, model.channels))} channels")
    if isinstance(model, Embedding):
        hidden.insert(0, f"{model.width} numbers an item")
    return f"{_NETWORKS[type(model)]} ({'; '.join(hidden)})"


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
        f"{void}ε = {epsilon_text(privacy.epsilon.max)} at δ = {delta_text(privacy.delta)} for each "
        f"{UNITS[privacy.unit]}, against {_against(history)}."
    )


def particulars(history: History) -> list[tuple[str, str]]:
    """What belongs to the claim and to the run, term by term."""
    config, summary = history.config, history.summary
    privacy = summary.privacy
    run = [
        ("Data", data_name(config)),
        ("Task", TASKS[task_name(config)]),
        ("Model", model_name(config)),
        *([("Started from", summary.base)] if summary.base is not None else []),
        ("Method", method_name(config)),
        ("Aggregation", summary.aggregation.kind if config.method.sends else "none: nothing is sent"),
    ]
    if privacy.unit == PrivacyUnit.NONE.value or not config.method.sends:
        return run
    standard, figures = config.privacy.standardise_epsilon, config.evaluation
    inputs = [("Inputs", f"standardised by noised means, ε ≤ {standard:g} of the whole")] if standard else []
    released = {
        "internal": "exact, in no ε",
        "private": "released through noise, counted in ε",
        "public-cohort": f"exact, of the public sites alone ({', '.join(figures.public_sites)})",
    }
    return [
        ("Unit", _unit(config, privacy.unit)),
        ("Adjacency", _words(privacy.adjacency)),
        ("Accountant", f"{privacy.accountant.upper()}, all runs on each ledger"),
        ("Sampling", privacy.sampling),
        ("Noise", _noise(history)),
        ("ε is", "the largest over sites"),
        *inputs,
        ("Figures", released[figures.release]),
        *run,
    ]


def in_shares(history: History) -> bool:
    """Whether the updates carry shares of noise alone."""
    return history.summary.privacy.noise == NoiseSite.DISTRIBUTED.value


def not_protected(history: History) -> list[str]:
    """The short list of SECURITY.md, with what this run adds to it."""
    config, summary = history.config, history.summary
    points = [
        _FIGURES[history.release],
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
    if summary.privacy.colluders is not None:
        points.append(
            "Noise in shares rests on sites that add theirs. A site that leaves its share out, or tells it to others, "
            f"counts as one that colludes: the ε above allows for {_sites(summary.privacy.colluders)}."
        )
    if is_central(history):
        points.insert(0, "Anything, from the server: it sees the sum, or the updates, before it adds the noise.")
    points += [
        "Noise is sampled in floating point and rounded to a fixed-point grid; the proof of ε is for real numbers."
        if summary.privacy.noise == NoiseSite.LOCAL.value
        else "Noise is drawn as exact integers, but how long a draw takes may depend on what is drawn.",
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


_FIGURES = {
    "internal": "Accuracy and loss per site, here and in metrics.jsonl, are exact figures of the sites' own test "
    "records. They are internal: whoever publishes this page releases them.",
    "private": "Figures of personal models: none stands on this page, because those models saw their site's records "
    "without noise. A site that shows such figures releases something that no ε covers.",
    "public-cohort": "The records of the public sites: their figures are exact. The others' figures stay with them.",
}


def glossary(history: History) -> list[tuple[str, str]]:
    """The page's terms, one sentence each."""
    summary, config = history.summary, history.config
    unit, adjacency = summary.privacy.unit, _words(summary.privacy.adjacency)
    whose = {
        "record": "in this run, one row of the table.",
        "patient": "in this run, one patient, with all records that carry the same patient's id at a site.",
        "client": "in this run, a whole site (client) with all its records.",
        "none": "in this run, nobody's, because no claim is made.",
    }
    terms = [
        ("ε (epsilon)", "How much more likely any outcome can become, by a factor of at most e to the ε, because one "
         "unit's data was there or not: smaller is more private."),
        ("δ (delta)", "The small probability, on top of ε, with which that bound may fail; it should be far below one "
         "over the number of records."),
        ("Unit", f"Whose presence is hidden: {whose[unit]}"),
        ("Adjacency", f"What counts as the smallest difference between two data sets: {adjacency}."),
        ("Secure aggregation", "A protocol by which the server learns the sum of the sites' updates and not a single "
         "one of them."),
        ("Global model", "The one model that all sites trained together and all of them receive."),
    ]  # fmt: skip
    if unit != PrivacyUnit.NONE.value and config.method.sends:
        terms.append(("σ/C", "The noise multiplier: the standard deviation of the noise over C, the most that one unit "
                      "may add to what is released. Larger is more private."))  # fmt: skip
    if summary.privacy.colluders is not None:
        terms += [
            ("Noise in shares", "Each site adds a part of the noise before its numbers are hidden in the sum. No part "
             "is enough alone; the sum carries what ε needs."),
            ("Colluding site", "A site that tells the server what it knows, its own share of the noise included."),
        ]  # fmt: skip
    if is_central(history):
        terms.append(("Central noise", "The server adds the noise to the sum. It sees the sum without it and has to be "
                      "trusted."))  # fmt: skip
    if config.privacy.standardise_epsilon is not None and config.method.sends:
        terms.append(("Standardised inputs", "Every input less its mean over all sites, divided by its deviation. Both "
                      "were measured once, in a sum with noise."))  # fmt: skip
    if history.release == "private":
        return [
            *terms,
            ("Released figure, ±", "How good the global model is on the test records of all sites together, read from "
             "counts with noise; ± is the standard deviation that the noise alone gives it."),
            *_stopping(history),
        ]  # fmt: skip
    if history.release == "public-cohort":
        terms.append(("Public site", "A site whose records are public anyway, so that exact figures on them tell "
                      "nothing about anybody else but through the models."))  # fmt: skip
    return [
        *terms,
        *_stopping(history),
        ("Personalised", "The global model adapted at a site to its own records; it never leaves that site."),
        ("Local-only", "A model that a site trained alone, without noise and without the others: what it would have "
         "had anyway."),
        ("Worst decile", "The mean over the tenth of the sites (at least one) with the worst figures."),
        ("Hurt", "A site is hurt when its personalised model is worse than its own local-only one."),
    ]  # fmt: skip


def _stopping(history: History) -> list[tuple[str, str]]:
    patience = history.config.evaluation.patience
    if patience is None:
        return []
    return [("Early stopping", f"The run ends when {patience} measurement{'s' if patience != 1 else ''} in a row "
             "brought no better figure.")]  # fmt: skip


def is_central(history: History) -> bool:
    privacy = history.summary.privacy
    return privacy.noise == NoiseSite.CENTRAL.value and privacy.unit != PrivacyUnit.NONE.value


def _against(history: History) -> str:
    privacy = history.summary.privacy
    if privacy.noise == NoiseSite.CENTRAL.value:
        return (
            "the other sites and whoever gets the model. It holds against nobody who runs the server: the server adds "
            "the noise and is trusted"
        )
    if privacy.colluders is None:
        return (
            "everybody who sees what leaves a site: the server, the other sites, all of them together, and whoever "
            "gets the model"
        )
    apart = ", as long as the server and the key holder stay apart" if _encrypted(history) else ""
    if privacy.colluders == 0:
        return f"the server and whoever gets the model, if no site works with them{apart}"
    return (
        f"the server together with {_up_to(privacy.colluders)}, any one other site, and whoever gets the model{apart}. "
        "More who collude know more of the noise: the table of promises says what is left then"
    )


def against_short(noise: str, colluders: int | None) -> str:
    """The same in a few words, for a caption."""
    if noise == NoiseSite.CENTRAL.value:
        return "against everybody but the trusted server"
    if colluders is None:
        return "against whoever sees all that leaves a site"
    if colluders == 0:
        return "against the server, if no site works with it"
    return f"against the server together with {_up_to(colluders)}"


def _encrypted(history: History) -> bool:
    return history.summary.aggregation.kind == "homomorphic"


def _up_to(colluders: int) -> str:
    return "one colluding site" if colluders == 1 else f"up to {colluders} colluding sites"


def _sites(count: int) -> str:
    return {0: "none", 1: "one"}.get(count, str(count))


def _unit(config: Config, unit: str) -> str:
    if unit == PrivacyUnit.CLIENT.value:
        return "one site, with everything that it sends"
    column = config.data.patient if isinstance(config.data, Table | Arrays) else None
    if unit == PrivacyUnit.PATIENT.value and column is not None:
        return f"one patient: all records of a site with the same {column!r}"
    return f"one {unit}"


def _noise(history: History) -> str:
    privacy = history.summary.privacy
    text = f"{privacy.noise}, σ/C = {privacy.noise_multiplier:.4g}"
    cohort = history.cohorts[0] if history.cohorts else None
    if not in_shares(history) or cohort is None or privacy.colluders is None:
        return text
    return f"{text} from {max(1, cohort.minimum_cohort - privacy.colluders)} of the sites' shares together"


def _words(adjacency: str) -> str:
    return {"add-or-remove-one": "one unit added or removed", "replace-one": "one unit replaced by another"}.get(
        adjacency, adjacency
    )
