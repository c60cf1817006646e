"""The numbers of a round's aggregation: what follows from how many sites are invited."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from privfed.crypto import degree as graph_degree
from privfed.crypto.aggregation import COMPLETE_UP_TO, default_colluders, default_parameters, default_threshold
from privfed.privacy.events import NoiseSite

from .config import Config
from .errors import ConfigError


@dataclass(frozen=True)
class Cohort:
    """One round's aggregation.

    Attributes:
        size: sites invited.
        threshold: shares that recover a dropout.
        minimum_cohort: fewest sites whose sum is released.
        colluders: sites that may collude with the server.
        degree: neighbours of each site in the mask graph; None for all others.
    """

    size: int
    threshold: int
    minimum_cohort: int
    colluders: int
    degree: int | None = None

    @property
    def tolerated_dropouts(self) -> int:
        # On a sparse graph the threshold counts neighbours, not sites
        needed = self.minimum_cohort if self.degree is not None else max(self.threshold, self.minimum_cohort)
        return self.size - needed


def held_out(config: Config, names: Iterable[str]) -> frozenset[str]:
    """The sites among ``names`` that take no part in training, by names and the public seed alone.

    Raises:
        ConfigError: a site is to be held out that there is not.
    """
    evaluation = config.evaluation
    if not evaluation.unseen_sites and not evaluation.unseen_fraction:
        return frozenset()  # every site asks this of every message: the names are not gone through for nothing
    names = list(names)
    if strangers := sorted(set(evaluation.unseen_sites) - set(names)):
        raise ConfigError(f"evaluation.unseen_sites: no site {strangers[0]!r}; sites are {', '.join(names)}")
    others = sorted(set(names) - set(evaluation.unseen_sites), key=lambda name: _place(config.seed, name))
    return frozenset(evaluation.unseen_sites).union(others[: round(evaluation.unseen_fraction * len(others))])


def _place(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"privfed unseen {seed} {name}".encode()).digest()


def training_sites(config: Config, sites: int) -> int:
    """How many of so many sites `held_out` leaves for training."""
    others = sites - len(config.evaluation.unseen_sites)
    return others - round(config.evaluation.unseen_fraction * others)


def cohort_of(config: Config, n: int) -> Cohort:
    """The cohort's numbers for ``n`` sites.

    Raises:
        ConfigError: a configured number does not fit ``n`` sites.
    """
    settings = config.aggregation
    if settings.key_holder is not None and settings.kind != "homomorphic":
        raise ConfigError(
            f"aggregation.key_holder belongs to homomorphic aggregation, and aggregation.kind is '{settings.kind}': "
            "leave it out, or set the kind to 'homomorphic'"
        )
    if not config.method.sends:
        return Cohort(n, 1, 1, 0)
    if settings.kind == "plain":
        cohort = Cohort(n, settings.threshold or 1, settings.minimum_cohort or 1, settings.colluders or 0)
    elif settings.kind == "homomorphic":
        cohort = _homomorphic(config, n)
    else:
        cohort = _masked(config, n)
    if cohort.minimum_cohort > n:
        raise ConfigError(
            f"aggregation.minimum_cohort = {cohort.minimum_cohort} is above the cohort of {n} sites: lower it"
        )
    if cohort.degree is not None:
        try:
            graph_degree.check(
                n,
                degree=cohort.degree,
                threshold=cohort.threshold,
                colluders=cohort.colluders,
                minimum_cohort=cohort.minimum_cohort,
            )
        except ValueError as error:
            raise ConfigError(f"aggregation: {error}") from None
    return cohort


def _masked(config: Config, n: int) -> Cohort:
    settings = config.aggregation
    if n < 3:
        raise ConfigError(
            f"masked aggregation needs at least 3 sites, there are {n}: the sum of two tells each the other's update. "
            "Use more sites, or aggregation.kind = 'plain' if the server may see every update"
        )
    if n > COMPLETE_UP_TO and settings.threshold is None:
        numbers = default_parameters(n)
        return Cohort(
            n,
            numbers.threshold,
            settings.minimum_cohort or numbers.minimum_cohort,
            numbers.colluders if settings.colluders is None else settings.colluders,
            numbers.degree,
        )
    threshold = settings.threshold or default_threshold(n)
    if threshold > n:
        raise ConfigError(
            f"aggregation.threshold = {threshold} is above the cohort of {n} sites: at most {n} shares exist; "
            f"lower it (default {default_threshold(n)})"
        )
    colluders = default_colluders(n, threshold) if settings.colluders is None else settings.colluders
    if 2 * threshold <= n + colluders:
        raise ConfigError(
            f"aggregation.threshold = {threshold} is too small for {n} sites and {colluders} colluders: a server could "
            f"unmask two views of one round; use at least {(n + colluders) // 2 + 1}"
        )
    return Cohort(n, threshold, settings.minimum_cohort or max(3, threshold), colluders)


def _homomorphic(config: Config, n: int) -> Cohort:
    settings = config.aggregation
    if n < 3:
        raise ConfigError(
            f"homomorphic aggregation needs at least 3 sites, there are {n}: the sum of two tells each the other's "
            "update. Use more sites, or aggregation.kind = 'plain' if the server may see every update"
        )
    if settings.threshold is not None or settings.colluders is not None:
        raise ConfigError(
            "aggregation.threshold and aggregation.colluders belong to masked aggregation: leave them away, and set "
            "aggregation.minimum_cohort if another number than 3 sites is the fewest in a released sum"
        )
    # Shares of noise are sized for the fewest sites in a sum: a small number would be paid for with noise
    fewest = default_threshold(n) if config.privacy.noise is NoiseSite.DISTRIBUTED else 3
    return Cohort(n, 1, settings.minimum_cohort or max(3, fewest), 0)
