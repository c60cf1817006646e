"""What the events cost: ε at a given δ, from above, by two independent methods.

The privacy loss distribution (PLD) of one event comes from dp-accounting, rounded pessimistically onto a grid
(Doroshenko et al. 2022, "Connect the Dots"). A composition is a convolution: here all events of a ledger are
convolved in one Fourier pass, so that a mixed ledger costs one inverse transform and a live meter milliseconds.
dp-accounting's own `compose` does one pass per distinct event; a test holds both to the same ε.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import dp_accounting
import msgspec
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.signal import lfilter
from scipy.special import logsumexp

from .errors import NoGuarantee
from .events import ALL_RECORDS, Adjacency, Charge, Event, Gaussian, PoissonGaussian, to_dp_event

_Floats = NDArray[np.float64]
_Multiset = tuple[tuple[Event, int], ...]  # distinct events and how often, in one order

_MIN_PLD_DELTA = 1e-11  # below it, the rounding errors of float64 Fourier transforms are no longer small against δ
_TOLERANCE = 0.005  # refine the grid until ε moves by less, relatively
_REFINEMENT = 4.0  # the grid's error falls with the square of its step, so one refinement leaves a fifteenth of it
_STEPS_PER_EPSILON = 500  # the first grid: coarse enough to be cheap, fine enough to settle after one refinement
_MAX_GRID = 2**22  # points of a composition; beyond it RDP answers
_MAX_EVENT_GRID = 2**18  # points of one event, which dp-accounting builds one by one in Python
_TAIL_MASS = 1e-15  # probability that the composed window may miss; counted as certain disclosure
_ROUNDING = 2.0**-48  # error of a Fourier power per event (measured: 2⁻⁵⁰, against longdouble); counted likewise
_MAX_WORLDS = 16  # combinations of parts that are convolved one by one
_CHERNOFF_ORDERS = np.concatenate([-(2.0 ** np.arange(-5, 14)), 2.0 ** np.arange(-5, 14)])
_RDP_ORDERS = np.array(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)


class Epsilon(msgspec.Struct, frozen=True):
    """An upper bound on ε, never printed without what it is a bound of.

    Attributes:
        value: ε at `delta`, for neighbours by adding or removing one unit; infinite if some release had no noise.
        delta: the δ it holds at.
        accountant: the method that gave the smaller bound.
        tolerance: how much ε still moved, relatively, at the last grid refinement; 1 if memory allowed only one grid.
            0 where there is none: RDP, and unsampled Gaussians alone, whose loss distribution has a closed form.
        per_group: ε of the records of each part of a split ("all" if nothing was split); `value` is their maximum.
    """

    value: float
    delta: float
    accountant: Literal["pld", "rdp"]
    tolerance: float
    per_group: dict[str, float]


class _Cost(NamedTuple):
    value: float
    accountant: Literal["pld", "rdp"]
    tolerance: float


class Accountant:
    """Composes charges, and remembers what it has computed in caches of bounded size. Not shared between threads.

    **Guarantees.** `value` is an upper bound on the ε of the adaptive composition of all charges, if the events are
    what was executed. It does not depend on the order of the charges. The bound is min(PLD, RDP), and holds for
    add-or-remove-one adjacency only. Charges to the parts of one split compose in parallel: the worst part counts,
    not the sum. A record is in one part of *every* split, so different splits compose sequentially.

    Args:
        adjacency: only ADD_OR_REMOVE_ONE is accounted.

    Raises:
        NoGuarantee: for any other adjacency. dp-accounting 0.6 forgets under RDP that replacing a record moves the
            sum by 2C, and reports ε = 4.73 where 9.997 is exact.
    """

    def __init__(self, adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE) -> None:
        if adjacency != Adjacency.ADD_OR_REMOVE_ONE:
            raise NoGuarantee(f"adjacency must be {Adjacency.ADD_OR_REMOVE_ONE.value!r}, got {str(adjacency)!r}")
        self.adjacency = adjacency
        self._rdp = lru_cache(maxsize=4096)(_rdp_of)
        self._grid = lru_cache(maxsize=128)(_grid_of)
        self._rdp_epsilon = lru_cache(maxsize=4096)(self._compute_rdp_epsilon)
        self._cost = lru_cache(maxsize=4096)(self._compute_cost)

    def epsilon(self, charges: Iterable[Charge], delta: float) -> Epsilon:
        """ε of the composition of `charges` at `delta`; 0 for no charges.

        Args:
            charges: everything that touched the records, in any order.
            delta: in (0, 1). Below 1e-11 the answer is RDP's and says so.

        Raises:
            UnsupportedEvent: a charge holds an event that neither method bounds.
            ValueError: `delta` out of range.
        """
        _check_delta(delta)
        always, splits = _sort_by_group(charges)
        worlds = _worlds(always, splits)
        if worlds is None:
            value = self._rdp_over_splits(always, splits, delta)
            return Epsilon(value, delta, "rdp", 0.0, {"worst part of every split": value})
        costs = {name: self._cost(multiset, delta) for name, multiset in worlds.items()}
        worst = max(costs.values(), key=lambda cost: cost.value)
        return Epsilon(
            worst.value, delta, worst.accountant, worst.tolerance, {name: cost.value for name, cost in costs.items()}
        )

    def rdp_epsilon(self, charges: Iterable[Charge], delta: float) -> float:
        """ε by Rényi differential privacy alone: looser, and quick at any count. Never below the PLD's by design."""
        _check_delta(delta)
        always, splits = _sort_by_group(charges)
        worlds = _worlds(always, splits)
        if worlds is None:
            return self._rdp_over_splits(always, splits, delta)
        return max(self._rdp_epsilon(multiset, delta) for multiset in worlds.values())

    def _compute_cost(self, events: _Multiset, delta: float) -> _Cost:
        if not events:
            return _Cost(0.0, "pld", 0.0)
        if any(event.noise_multiplier == 0 for event, _ in events):
            return _Cost(math.inf, "pld", 0.0)
        rdp = _Cost(self._rdp_epsilon(events, delta), "rdp", 0.0)
        if delta < _MIN_PLD_DELTA:
            return rdp
        exact = _gaussian_epsilon(events, delta)
        if exact is not None:
            return _Cost(exact, "pld", 0.0)
        pld = self._pld_cost(events, delta, rdp.value)
        return pld if pld.value <= rdp.value else rdp

    def _compute_rdp_epsilon(self, events: _Multiset, delta: float) -> float:
        return _epsilon_of_rdp(self._composed_rdp(events), delta)

    def _composed_rdp(self, events: _Multiset) -> _Floats:
        total = np.zeros_like(_RDP_ORDERS)
        for event, count in events:
            total += count * self._rdp(event)
        return total

    def _rdp_over_splits(self, always: Counter[Event], splits: "_Splits", delta: float) -> float:
        """Too many combinations to convolve: at each order, the worst part of every split bounds all of them."""
        total = self._composed_rdp(_multiset(always))
        for parts in splits.values():
            total += np.max([self._composed_rdp(_multiset(part)) for part in parts.values()], axis=0)
        return _epsilon_of_rdp(total, delta)

    def _pld_cost(self, events: _Multiset, delta: float, guess: float) -> _Cost:
        """ε by PLD on finer and finer grids. Every grid is pessimistic, so stopping early loses tightness only."""
        step = _first_step(guess)
        best, change = math.inf, 1.0
        while all(_grid_points(event, step) <= _MAX_EVENT_GRID for event, _ in events):
            value = _pld_epsilon([(self._grid(event, step), count) for event, count in events], step, delta)
            if math.isinf(value):  # the window outgrew the memory, or δ is below the rounding allowance
                break
            if math.isfinite(best):
                change = abs(best - value) / value if value > 0 else best
            best = min(best, value)
            if change < _TOLERANCE:
                break
            step /= _REFINEMENT
        return _Cost(best, "pld", change)


_Splits = dict[str, dict[str, Counter[Event]]]


def _sort_by_group(charges: Iterable[Charge]) -> tuple[Counter[Event], _Splits]:
    """What touched every record, and what touched the parts of each split."""
    always: Counter[Event] = Counter()
    splits: _Splits = {}
    for charge in charges:
        event = charge.event
        if isinstance(event, PoissonGaussian) and event.sample_rate == 1.0:
            event = Gaussian(event.noise_multiplier)
        if charge.group == ALL_RECORDS:
            always[event] += charge.count
        else:
            split, part = charge.group.split("/")
            splits.setdefault(split, {}).setdefault(part, Counter())[event] += charge.count
    return always, splits


def _worlds(always: Counter[Event], splits: _Splits) -> dict[str, _Multiset] | None:
    """Every distinct history that one record can have: what touched all, plus one part of each split.

    Returns:
        The histories by the parts that name them, or None if there are too many to convolve one by one.
    """
    worlds = {_multiset(always): ALL_RECORDS}
    for split, parts in sorted(splits.items()):
        grown: dict[_Multiset, str] = {}
        for history, name in worlds.items():
            for part, events in sorted(parts.items()):
                label = f"{split}/{part}"
                grown.setdefault(
                    _multiset(Counter(dict(history)) + events), label if name == ALL_RECORDS else f"{name} {label}"
                )
        if len(grown) > _MAX_WORLDS:
            return None
        worlds = grown
    return {name: history for history, name in worlds.items()}


def _multiset(events: Counter[Event]) -> _Multiset:
    # One order, so that the last bits of ε do not depend on the order of the ledger.
    return tuple(sorted(events.items(), key=repr))


def _gaussian_epsilon(events: _Multiset, delta: float) -> float | None:
    """Exact ε of unsampled Gaussian releases, which compose to one with σ⁻² = Σ σᵢ⁻²; None if another is among them.

    Source: Balle and Wang 2018, Theorem 8, as dp-accounting solves it.
    """
    if not all(isinstance(event, Gaussian) for event, _ in events):
        return None
    precision = sum(count / event.noise_multiplier**2 for event, count in events)
    exact = float(dp_accounting.get_epsilon_gaussian(precision**-0.5, delta))
    return exact * (1 + 1e-9) + 1e-12  # the root is found to 1e-12: round up


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


# Rényi differential privacy


def _rdp_of(event: Event) -> _Floats:
    """RDP of one event at every order.

    dp-accounting reads a divergence at or below zero, which only rounding can produce here, as ε = 0. Sampling never
    raises a divergence, so the unsampled Gaussian's α/2σ² takes its place.
    """
    dp_event = to_dp_event(event)
    if not event.noise_multiplier:
        return np.full_like(_RDP_ORDERS, math.inf)
    unsampled = _RDP_ORDERS / (2 * event.noise_multiplier**2)
    accountant = rdp_privacy_accountant.RdpAccountant(orders=_RDP_ORDERS)
    with np.errstate(all="ignore"), _quiet_absl():
        accountant.compose(dp_event)
    divergence = accountant.rdp
    return np.fmin(np.where(divergence > 0, divergence, np.nan), unsampled)


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """dp-accounting warns on stderr about each order that it leaves out, though leaving one out is safe."""
    logger = logging.getLogger("absl")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _epsilon_of_rdp(divergence: _Floats, delta: float) -> float:
    if not divergence.any():
        return 0.0
    return float(rdp_privacy_accountant.compute_epsilon(_RDP_ORDERS, divergence, delta)[0])


# Privacy loss distributions on a grid of multiples of `step`


class _Losses(NamedTuple):
    """Distribution of the privacy loss of one event in one direction (a record removed, or added)."""

    lowest: int  # grid index of probs[0]
    probs: _Floats
    infinity: float  # probability of an infinite loss
    log_moments: _Floats  # log E exp(order · (loss − lowest loss)) at each Chernoff order


class _Grid(NamedTuple):
    remove: _Losses
    add: _Losses | None  # None: the same as remove


def _first_step(epsilon: float) -> float:
    """A power of the refinement, so that neighbouring ε share their cached grids."""
    wanted = min(max(epsilon / _STEPS_PER_EPSILON, 1e-6), 1.0)
    return float(_REFINEMENT ** math.floor(math.log(wanted, _REFINEMENT)))


def _grid_points(event: Event, step: float) -> float:
    """How many points one event needs. Unsampled, |loss| is below 1/2σ² + 10/σ all but surely; sampling shrinks it."""
    unsampled = 0.5 / event.noise_multiplier**2 + 10.0 / event.noise_multiplier
    if not isinstance(event, PoissonGaussian) or event.sample_rate == 1.0 or unsampled > 700.0:  # exp overflows
        return 2 * unsampled / step
    rate = event.sample_rate
    return (math.log1p(rate * math.expm1(unsampled)) + min(unsampled, -math.log1p(-rate))) / step


def _grid_of(event: Event, step: float) -> _Grid:
    rate = event.sample_rate if isinstance(event, PoissonGaussian) else 1.0
    with np.errstate(all="ignore"):
        pld = privacy_loss_distribution.from_gaussian_mechanism(
            event.noise_multiplier, sampling_prob=rate, value_discretization_interval=step
        )
    # The arrays have no public name in dp-accounting 0.6. A change there breaks the comparison test, not an ε.
    remove = _losses(pld._pmf_remove.to_dense_pmf(), step)
    return _Grid(remove, None if pld._symmetric else _losses(pld._pmf_add.to_dense_pmf(), step))


def _losses(pmf: "privacy_loss_distribution.pld_pmf.DensePLDPmf", step: float) -> _Losses:
    probs = np.asarray(pmf._probs, dtype=np.float64)
    losses = step * np.arange(len(probs))
    with np.errstate(divide="ignore"):
        logs = np.log(probs)
    moments = np.array([logsumexp(order * losses + logs) for order in _CHERNOFF_ORDERS])
    return _Losses(int(pmf._lower_loss), probs, float(pmf._infinity_mass), moments)


def _pld_epsilon(events: Sequence[tuple[_Grid, int]], step: float, delta: float) -> float:
    remove = _compose([(grid.remove, count) for grid, count in events], step, delta)
    if all(grid.add is None for grid, _ in events):
        return remove
    return max(remove, _compose([(grid.add or grid.remove, count) for grid, count in events], step, delta))


def _compose(events: Sequence[tuple[_Losses, int]], step: float, delta: float) -> float:
    """ε at `delta` of the composition in one direction; infinite if it cannot be computed.

    The window of losses misses at most the tail mass by Chernoff's bound. What lies outside wraps into it, and is
    counted again as infinite loss: both errors are on the safe side.
    """
    log_moments = sum((count * losses.log_moments for losses, count in events), np.zeros_like(_CHERNOFF_ORDERS))
    bounds = (log_moments + math.log(2 / _TAIL_MASS)) / _CHERNOFF_ORDERS / step
    longest = max(len(losses.probs) for losses, _ in events)
    highest = sum(count * (len(losses.probs) - 1) for losses, count in events)
    bottom = max(0, math.floor(np.max(bounds[_CHERNOFF_ORDERS < 0])))
    top = min(highest, math.ceil(np.min(bounds[_CHERNOFF_ORDERS > 0])))
    points = top - bottom + 1
    if max(points, longest) > _MAX_GRID:
        return math.inf

    size = next_fast_len(max(points, longest), real=True)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for losses, count in events:
        spectrum *= np.fft.rfft(losses.probs, size) ** count
    probs = np.roll(np.fft.irfft(spectrum, size), -bottom)[:points]

    infinity = -math.expm1(sum(count * math.log1p(-losses.infinity) for losses, count in events))
    infinity += _TAIL_MASS + _ROUNDING * sum(count for _, count in events)
    lowest = bottom + sum(count * losses.lowest for losses, count in events)
    return _smallest_epsilon(lowest, np.maximum(probs, 0.0), infinity, step, delta)


def _smallest_epsilon(lowest: int, probs: _Floats, infinity: float, step: float, delta: float) -> float:
    """Smallest ε ≥ 0 whose hockey-stick divergence is at most δ.

    δ(ε) = infinity + Σ_{loss > ε} p · (1 − exp(ε − loss)). At grid point k this is above[k] − weighted[k], with
    above[k] = infinity + Σ_{i>k} p_i and weighted[k] = Σ_{i>k} p_i · exp(−(i − k) · step): a first-order filter.
    """
    if infinity > delta:
        return math.inf
    from_k = infinity + np.cumsum(probs[::-1])[::-1]  # Σ_{i≥k}
    discounted = lfilter([1.0], [1.0, -math.exp(-step)], probs[::-1])[::-1]  # Σ_{i≥k} p_i · exp(−(i − k) · step)
    divergence = from_k - probs - (discounted - probs)
    k = int(np.argmax(divergence <= delta))  # the last point always qualifies: only `infinity` lies above it
    loss = (lowest + k) * step
    if from_k[k] <= delta:  # only at k = 0, up to rounding
        return max(0.0, loss) if k else 0.0
    return max(0.0, loss + math.log((from_k[k] - delta) / discounted[k]))
