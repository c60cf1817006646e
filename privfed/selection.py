"""When to stop and which round's model to keep: decided on released figures alone.

A choice among rounds tells something about the records that it was made on. So it may be made on figures that have
been paid for, on public records, or where nothing is claimed; never on figures that stay inside.
"""

from collections.abc import Sequence

from privfed.privacy.events import PrivacyUnit

from .config import Config
from .errors import ConfigError
from .federation import RoundReport
from .tasks import LOWER_IS_BETTER


def check_selection(config: Config) -> None:
    """Return if the run's choices rest on figures that may leave.

    Raises:
        ConfigError: they rest on internal ones.
    """
    evaluation = config.evaluation
    if evaluation.release == "public-cohort" and not evaluation.public_sites:
        raise ConfigError(
            "evaluation.release = 'public-cohort' needs evaluation.public_sites: the sites with public records"
        )
    if evaluation.patience is None and evaluation.keep == "last":
        return
    if evaluation.release == "internal" and config.privacy.unit is not PrivacyUnit.NONE:
        raise ConfigError(
            "evaluation.patience and evaluation.keep = 'best' choose by a figure, and internal ones are covered by no "
            "ε: set evaluation.release = 'private' or 'public-cohort'"
        )


def figure(report: RoundReport) -> float | None:
    """The global model's figure that the run releases; None where the round has none."""
    if report.released is not None:
        return report.released.score
    spread = report.figures("global_score")
    return spread.mean if spread else None


def _goodness(report: RoundReport, metric: str) -> float | None:
    """The figure, so that more is better."""
    value = figure(report)
    return -value if value is not None and metric in LOWER_IS_BETTER else value


def best(reports: Sequence[RoundReport], metric: str) -> int | None:
    """The number of the round with the best figure, the first of equals."""
    scored = [(value, -report.round) for report in reports if (value := _goodness(report, metric)) is not None]
    return -max(scored)[1] if scored else None


def stalled(reports: Sequence[RoundReport], metric: str, patience: int | None) -> bool:
    """Whether the last ``patience`` figures brought nothing better than what was there before them."""
    values = [value for report in reports if (value := _goodness(report, metric)) is not None]
    if patience is None or len(values) <= patience:
        return False
    return max(values[-patience:]) <= max(values[:-patience])
