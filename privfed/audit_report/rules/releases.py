"""What was released beside the model."""

from collections.abc import Sequence

from ..evidence import RunEvidence, Statement
from ..model import Finding
from .finding import SUPPORTED, UNDECIDED, UNSOUND, finding


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
        return finding(
            "figures are covered",
            UNSOUND,
            "Figures of accuracy were released without noise. They come from the records, and no ε covers them.",
            leaks or exact,
            "Release figures with evaluation.release = 'private', or not at all.",
        )
    if exact:
        return finding(
            "figures are covered",
            UNDECIDED,
            "The sites gave exact figures of accuracy to the coordinator. ε covers the updates and the model, not "
            "these figures. Whether anybody outside saw them can not be told from here.",
            exact,
            "Use evaluation.release = 'private', or policy.release_figures = false, so that no exact figure leaves.",
        )
    if not any(run.private for run in runs):
        return None
    return finding("figures are covered", SUPPORTED, "No figure left a site but through noise that ε counts.")


def personal_models_stay(runs: Sequence[RunEvidence], statement: Statement) -> Finding | None:
    if "personal-models" in statement.released:
        return finding(
            "personal models stay",
            UNSOUND,
            "The curator states that personal models were released. They are trained on the records without noise.",
            ["the curator's statement: released = personal-models"],
            "Give out the global model alone.",
        )
    readable = [f"{run.path / name}" for run in runs if run.private for name in run.readable_by_others]
    if readable:
        return finding(
            "personal models stay",
            UNSOUND,
            "Personal models or exact figures lie where other users of the machine can read them.",
            readable,
            "Make the run's folder readable for its owner alone (chmod 700).",
        )
    if not any(run.private for run in runs):
        return None
    return finding(
        "personal models stay",
        SUPPORTED,
        "The files with personal models are for their owner alone, and the curator states no release of them.",
    )
