"""What earlier rounds did not need, later ones may spend: `privacy.schedule = "spend"`.

With noise in shares a round is booked for the smallest sum that may be released, and settled, when the sites in the
sum are known, at the noise that it really carries. "constant" plans every round at its worst, and what settlements give
back stays unspent. "spend" gives a round the least noise with which

    what the rounds before were settled at + this round at its worst + the rounds after it with all sites

cost target_epsilon. If nobody ever drops out, all rounds get the same noise, and the last one alone leaves something.
When somebody does, the rounds after it get more noise.

**Guarantees.** At every moment a site has booked at most target_epsilon, whoever drops out: a round begins only if its
worst case fits on top of what is settled, and every later one again. Levels depend on who contributed and on nothing
else: who was in a sum is no secret and no function of the records, so the levels might as well have been fixed before.
A site does not rely on that: its ledger holds the target, and it refuses noise that leaves less for the rounds after it
than this schedule does. A coordinator that chooses levels by what it has seen gains nothing: of Gaussian mechanisms,
each chosen on the outputs before it, the total is that of the sum of their 1/σ², as long as this sum is held to a bound
(Smith and Thakurta 2022, "Fully Adaptive Composition for Gaussian Differential Privacy"; Feldman and Zrnic 2021 for
Rényi divergences), and the distance of Skellam noise from its Gaussian twin adds up by the chain rule whoever chose it.
Of sampled noise nothing like it is proved for the accountant here, so that a sample rate below 1 is refused.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import SLACK, noise_multiplier_for
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, Event, NoiseSite, PrivacyUnit

from .cohort import Cohort, cohort_of
from .config import Config
from .errors import ConfigError
from .terms import Update, encoding_of, planned_charges, whole_group

_LOOKED_AT = 4  # different histories of sites that are priced exactly
_PACE = 0.01  # relative; a site's own sum may differ from the coordinator's by what a grid makes of another ledger


class Done(Protocol):
    """What is known of a round that is over."""

    @property
    def invited(self) -> tuple[str, ...]: ...
    @property
    def contributed(self) -> tuple[str, ...]: ...
    @property
    def dropped(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def aborted(self) -> str | None: ...
    @property
    def noise_multiplier(self) -> float: ...


def check_schedule(config: Config) -> None:
    """Return if the run's schedule can be kept.

    Raises:
        ConfigError: the noise is fixed, or no round is ever settled for less than its worst case.
    """
    privacy = config.privacy
    if privacy.schedule == "constant":
        return
    if privacy.unit is PrivacyUnit.NONE or privacy.noise is not NoiseSite.DISTRIBUTED or not config.method.sends:
        raise ConfigError("privacy.schedule = 'spend' belongs to noise in shares: privacy.noise = 'distributed'")
    if privacy.noise_multiplier is not None:
        raise ConfigError("privacy.schedule = 'spend' calibrates the noise: leave privacy.noise_multiplier away")
    if privacy.unit is not PrivacyUnit.CLIENT and privacy.rate < 1:
        raise ConfigError(
            "privacy.schedule = 'spend' needs privacy.sample_rate = 1: that levels may be chosen on the way is proved "
            "for noise on all records, and not on a sample of them"
        )
    if config.aggregation.kind != "masked":
        raise ConfigError(
            "privacy.schedule = 'spend' needs aggregation.kind = 'masked': a site in an encrypted sum never learns who "
            "else is in it, books the worst case for good, and has nothing to give back"
        )


def ahead(config: Config, cohort: Cohort, parameters: int, noise_multiplier: float, rounds: int) -> tuple[Charge, ...]:
    """What ``rounds`` further rounds are planned to cost a site that takes part in all of them."""
    encoding = encoding_of(config, cohort, parameters, noise_multiplier)
    if config.privacy.schedule == "constant":
        return planned_charges(config, encoding, noise_multiplier, rounds)
    (worst,) = planned_charges(config, encoding, noise_multiplier)
    if rounds == 1:
        return (worst,)
    return (worst, Charge(encoding.event(cohort.size), rounds - 1, worst.group))  # type: ignore[union-attr]  # in shares


def keeps_pace(
    config: Config,
    cohort: Cohort,
    parameters: int,
    noise_multiplier: float,
    before: Sequence[Charge],
    rounds: int,
    accountant: Accountant,
) -> bool:
    """Whether a round's noise leaves as much for the ``rounds`` − 1 after it as the schedule does.

    Args:
        before: what the site has been charged by the run so far.
    """
    if config.privacy.schedule == "constant":
        return True
    planned = ahead(config, cohort, parameters, noise_multiplier, rounds)
    cost = accountant.epsilon((*before, *planned), config.privacy.delta).value
    return cost <= config.privacy.target_epsilon * (1 + _PACE)


@dataclass(frozen=True)
class Spending:
    """The levels of one run.

    Args:
        config: with ``schedule = "spend"``.
        parameters: the model's size.
        first: σ/C of the first round.
        beside: what is released beside the updates about the same records, at its worst.
        accountant: prices the plans, and remembers.
    """

    config: Config
    parameters: int
    first: float
    beside: tuple[Charge, ...]
    accountant: Accountant = field(repr=False)
    _encodings: dict[tuple[int, float], Update] = field(default_factory=dict, init=False, repr=False)

    def level(self, cohort: Cohort, before: Sequence[Done], sites: Collection[str]) -> float:
        """σ/C of the next round.

        The last round's, as long as everything goes by the plan. Otherwise the least with which no site of ``sites``
        exceeds the target, whatever it has missed.

        Args:
            cohort: of the next round.
            before: all rounds so far.
            sites: who is invited to it.

        Raises:
            NoGuarantee: the target is spent, or the noise that is left to add does not fit.
        """
        target, delta = self.config.privacy.target_epsilon, self.config.privacy.delta
        rounds = self.config.rounds - len(before)
        histories = sorted({self._spent(before, site) for site in sites}, key=repr)

        def plan(history: tuple[Charge, ...], noise_multiplier: float) -> tuple[Charge, ...]:
            planned = ahead(self.config, cohort, self.parameters, noise_multiplier, rounds)
            return (*history, *self.beside, *planned)

        def dearest(noise_multiplier: float) -> tuple[tuple[Charge, ...], float]:
            """Of the sites that RDP finds dearest, the one that is, and its ε."""
            roughly = {h: self.accountant.rdp_epsilon(plan(h, noise_multiplier), delta) for h in histories}
            some = sorted(histories, key=lambda history: -roughly[history])[:_LOOKED_AT]
            found = {h: self.accountant.epsilon(plan(h, noise_multiplier), delta).value for h in some}
            worst = max(some, key=lambda history: found[history])
            return worst, found[worst]

        level = before[-1].noise_multiplier if before else self.first
        worst, epsilon = dearest(level)
        if target * (1 - SLACK) <= epsilon <= target:
            return level
        least = 0.0
        while True:
            calibrated = partial(plan, worst)
            try:
                level = noise_multiplier_for(target, delta, calibrated, self.accountant, near=level)
            except ValueError as error:
                raise NoGuarantee(str(error)) from None
            if level <= least:  # what another site needs is enough for this one
                return least
            least = level
            worst, epsilon = dearest(level)
            if epsilon <= target:
                return level

    def _spent(self, before: Sequence[Done], site: str) -> tuple[Charge, ...]:
        """What the rounds so far have cost a site, equal ones together."""
        group, spent = whole_group(self.config), Counter[Charge]()
        for done in before:
            shares = shares_of(done, site)
            if shares != 0:
                spent[Charge(self._event(len(done.invited), done.noise_multiplier, shares), 1, group)] += 1
        return tuple(Charge(charge.event, count, group) for charge, count in sorted(spent.items(), key=repr))

    def _event(self, invited: int, noise_multiplier: float, shares: int | None) -> Event:
        key = invited, noise_multiplier
        if key not in self._encodings:
            cohort = cohort_of(self.config, invited)
            self._encodings[key] = encoding_of(self.config, cohort, self.parameters, noise_multiplier)
        return self._encodings[key].event(shares)  # type: ignore[union-attr]  # in shares: it is no Grid


def shares_of(done: Done, site: str) -> int | None:
    """The shares that a site has settled a round at; None if it may still hold its worst case, 0 if it booked nothing.

    A site settles when it is asked to unmask. It books when it is asked for its input.
    """
    if site not in done.invited:
        return 0
    if done.aborted is not None:
        return None
    if any(site in done.dropped.get(step, ()) for step in ("advertise", "share")):
        return 0
    late = any(site in done.dropped.get(step, ()) for step in ("consistency", "unmask"))
    return len(done.contributed) if site in done.contributed and not late else None
