"""What ε means in a run that may still go on: its company, from what its folder tells so far."""

from collections.abc import Sequence

from privfed.config import Config
from privfed.privacy.events import PrivacyUnit

from ..summary import Summary, colluders_of, sampling
from ..watching import Row
from .words import UNITS, against_short, delta_text


def meaning(config: Config, rows: Sequence[Row], summary: Summary | None) -> str:
    """What the run's ε is of, and against whom; empty where there is none. It is never shown without.

    Args:
        rows: the rounds so far. summary: once the run is over.
    """
    privacy = config.privacy
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return ""
    summed = {row.invited for row in rows if row.contributed} or {row.invited for row in rows}
    colluders = summary.privacy.colluders if summary is not None else colluders_of(config, summed)
    accountant = f"accountant {summary.privacy.accountant.upper()}" if summary is not None else "each site's accountant"
    noise = privacy.noise.value
    return (
        f"{'VOID: ' if void(config, summary) else ''}ε at δ = {delta_text(privacy.delta)} for each "
        f"{UNITS[privacy.unit.value]}, {noise} noise, {sampling(config)}, adding or removing one, {accountant}, "
        f"{against_short(noise, colluders)}; the largest of any site, all its runs together."
    )


def void(config: Config, summary: Summary | None) -> bool:
    """Whether others can compute the noise."""
    return config.privacy.insecure_seed is not None or (summary is not None and summary.privacy.insecure_seed)
