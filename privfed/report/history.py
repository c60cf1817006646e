"""A run's folder, read back: the configuration, the summary, and every round's line."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from privfed import config_io
from privfed.cohort import Cohort, cohort_of
from privfed.config import Config
from privfed.errors import ConfigError, RunFolderError
from privfed.folder import CONFIG, METRICS, SUMMARY
from privfed.summary import Summary
from privfed.tasks import LOWER_IS_BETTER

MEASURES = ("global_score", "personalized", "local_only")


class SiteFigures(msgspec.Struct, frozen=True):
    """What one site measured after one round."""

    records: int = 0
    global_score: float | None = None
    personalized: float | None = None
    local_only: float | None = None
    epsilon: float | None = None


class ReleasedFigure(msgspec.Struct, frozen=True):
    """What was read from the noised counts after one round."""

    score: float | None = None
    deviation: float | None = None


class RoundLine(msgspec.Struct, frozen=True):
    """The part of a line of metrics.jsonl that the page shows."""

    round: int
    invited: tuple[str, ...] = ()
    contributed: tuple[str, ...] = ()
    dropped: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    aborted: str | None = None
    bytes_up_per_site: float | None = None
    noise_multiplier: float = 0.0
    sites: dict[str, SiteFigures] = {}
    unseen: dict[str, SiteFigures] = {}
    released: ReleasedFigure | None = None


@dataclass(frozen=True)
class SiteRow:
    """One site over the whole run; its figures are the last that it measured."""

    name: str
    figures: SiteFigures | None
    epsilon: float | None
    contributed: int
    missed: int
    refusal: str | None
    lower_is_better: bool = False

    @property
    def gain(self) -> float | None:
        """How much better personalised is than local-only; below zero the site is hurt."""
        if self.figures is None or self.figures.personalized is None or self.figures.local_only is None:
            return None
        gain = self.figures.personalized - self.figures.local_only
        return -gain if self.lower_is_better else gain


@dataclass(frozen=True)
class History:
    """Everything that the page is made of."""

    config: Config
    config_text: str
    summary: Summary
    rounds: tuple[RoundLine, ...]

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        """The aggregation's numbers for every size of cohort that was invited, the largest first."""
        sizes = {len(line.invited) for line in self.rounds if line.invited} or {self.summary.sites}
        found = []
        for size in sorted(sizes, reverse=True) if self.config.method.sends else ():
            try:
                found.append(cohort_of(self.config, size))
            except ConfigError:  # the figures of a folder that this version can not run
                continue
        return tuple(found)

    @property
    def evaluated(self) -> tuple[RoundLine, ...]:
        """The rounds after which sites measured something."""
        return tuple(line for line in self.rounds if line.sites)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.summary.privacy.epsilon.per_site)

    @property
    def release(self) -> str:
        """Which figures leave a site: internal, private or public-cohort."""
        return self.config.evaluation.release

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the run's figure is better."""
        return self.summary.utility.metric in LOWER_IS_BETTER

    def curves(self, name: str) -> dict[str, list[float]]:
        """site → its figure after each evaluated round; NaN where there is none."""
        lines = self.evaluated
        curves: dict[str, list[float]] = {}
        for site in self.sites:
            values = (getattr(line.sites.get(site), name, None) for line in lines)
            curves[site] = [math.nan if value is None else value for value in values]
        return curves

    def unseen(self) -> list[SiteRow]:
        """One row a site that was held out of training and only adapted the model, by name."""
        latest: dict[str, SiteFigures] = {}
        for line in self.rounds:
            latest.update(line.unseen)
        return [
            SiteRow(name, figures, None, 0, 0, None, self.lower_is_better) for name, figures in sorted(latest.items())
        ]

    def rows(self) -> list[SiteRow]:
        """One row a site, in the run's own order."""
        latest: dict[str, SiteFigures] = {}
        contributed = dict.fromkeys(self.sites, 0)
        missed = dict.fromkeys(self.sites, 0)
        for line in self.rounds:
            latest.update(line.sites)
            given = set(line.contributed)
            for site in line.invited:
                count = contributed if site in given else missed
                count[site] = count.get(site, 0) + 1
        return [
            SiteRow(
                name=site,
                figures=latest.get(site),
                epsilon=self.summary.privacy.epsilon.per_site[site],
                contributed=contributed[site],
                missed=missed[site],
                refusal=self.summary.refusals.get(site),
                lower_is_better=self.lower_is_better,
            )
            for site in self.sites
        ]


def read(folder: Path) -> History:
    """The history of the run in ``folder``; what is missing or damaged is named."""
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"{folder} is not a run's folder: it has no {CONFIG}. Give the folder that privfed run made"
        )
    if not (folder / SUMMARY).is_file():
        raise RunFolderError(f"{folder} has no {SUMMARY}: the run has not ended, and there is nothing to report yet")
    config = _config(folder / CONFIG)
    try:
        summary = msgspec.convert(_finite(json.loads(_text(folder / SUMMARY))), Summary)
    except (ValueError, msgspec.ValidationError) as error:
        raise RunFolderError(f"{folder / SUMMARY} is not the summary of a run: {error}") from None
    rounds = _rounds(folder / METRICS) if (folder / METRICS).is_file() else ()
    return History(config, _text(folder / CONFIG), summary, rounds)


def _config(path: Path) -> Config:
    try:
        return config_io.load_config(path)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a configuration of this version of privfed: {error}") from None


def _rounds(path: Path) -> tuple[RoundLine, ...]:
    lines: dict[int, RoundLine] = {}
    text = _text(path)
    written = text.splitlines()
    for number, line in enumerate(written, start=1):
        if not line.strip():
            continue
        try:
            decoded = msgspec.convert(_finite(json.loads(line)), RoundLine)
        except (ValueError, msgspec.ValidationError) as error:
            if number == len(written) and not text.endswith("\n"):
                break  # the kill came in the middle of this line; the round was not over
            raise RunFolderError(f"{path}, line {number}, is not a round of a run: {error}") from None
        lines[decoded.round] = decoded  # a round done again after an interruption counts once
    return tuple(lines[number] for number in sorted(lines))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RunFolderError(f"can not read {path}: {reason}") from None


def _finite(value: Any) -> Any:
    """The same JSON value with None for the NaN and infinities that Python writes into JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def finite(values: Sequence[float | None]) -> list[float]:
    """The numbers among ``values``."""
    return [value for value in values if value is not None and math.isfinite(value)]
