"""What the events cost: ε at a given δ, from above, by two independent methods.

Privacy loss distributions (pld.py) are tight, and exist for the Gaussian events. Rényi divergences (rdp.py) are quick,
exist for every event, and compose by addition. What is reported is the smaller bound. Skellam noise of a large variance
is priced either way: as rounded Gaussian noise, a little of δ being set aside for how near it is (closeness.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import dp_accounting
import msgspec
import numpy as np
from numpy.typing import NDArray

from . import closeness, pld, rdp
from .errors import NoGuarantee
from .events import (
    ALL_RECORDS,
    Adjacency,
    Charge,
    Event,
    Gaussian,
    PatientMixture,
    PoissonGaussian,
    Skellam,
    is_noiseless,
)
from .skellam import SAMPLING_ERROR

_Floats = NDArray[np.float64]
_Multiset = tuple[tuple[Event, int], ...]  # distinct events and how often, in one order

_TOLERANCE = 0.005  # refine the grid until ε moves by less, relatively
_REFINEMENT = 4.0  # the grid's error falls with the square of its step, so one refinement leaves a fifteenth of it
_STEPS_PER_EPSILON = 500  # the first grid: coarse enough to be cheap, fine enough to settle after one refinement
_MAX_WORLDS = 16  # combinations of parts that are convolved one by one
_MANY_RATES = 24  # at one noise multiplier; more are placed between the nodes of a fixed grid of rates
_NODES_PER_OCTAVE = 16  # neighbours differ by 4.4 %, which moves ε by at most (0.044)²/8 = 0.025 %
_MANY_LEVELS = 32  # of sampled Skellam noise; more are priced together
_NEAR = 0.25  # of δ, at most, for Skellam noise that stands as Gaussian: a quarter of δ is 1 % of ε

Method = Literal["pld", "rdp", "pld+rdp"]


class Epsilon(msgspec.Struct, frozen=True):
    """An upper bound on ε, never printed without what it is a bound of.

    Attributes:
        value: ε at `delta`, for neighbours by adding or removing one unit; infinite if some release had no noise.
        delta: the δ it holds at.
        accountant: the method that gave the smallest bound; "pld+rdp" if δ was split between the Gaussian events and
            the Skellam ones.
        tolerance: how much ε still moved, relatively, at the last grid refinement; 1 if memory allowed only one grid.
            0 where there is none: RDP, and unsampled Gaussians alone, whose loss distribution has a closed form.
        per_group: ε of the records of each part of a split ("all" if nothing was split); `value` is their maximum.
        notes: why the bound is looser than it might be, for the report.
    """

    value: float
    delta: float
    accountant: Method
    tolerance: float
    per_group: dict[str, float]
    notes: tuple[str, ...] = ()


class _Cost(NamedTuple):
    value: float
    accountant: Method
    tolerance: float
    near: float = 0.0  # total variation between the noise as it is and as it was priced


class _Sorted(NamedTuple):
    """Events by the way they are priced."""

    gaussian: _Multiset  # Skellam events among them stand as their twins
    skellam: _Multiset
    near: float  # total variation between the first group as it is and as it stands here
    reserved: float  # what that adds to δ, at any ε up to that of RDP


class Accountant:
    """Composes charges, and remembers what it has computed in caches of bounded size. Not shared between threads.

    **Guarantees.** `value` is an upper bound on the ε of the adaptive composition of all charges, if the events are
    what was executed. It does not depend on the order of the charges. The bound is min(PLD, RDP), and holds for
    add-or-remove-one adjacency only. Charges to the parts of one split compose in parallel: the worst part counts,
    not the sum. A record is in one part of *every* split, so different splits compose sequentially.

    A vector's Skellam noise has no loss distribution of one dimension. It costs what RDP bounds, or, where its variance
    is large, what rounded Gaussian noise costs at a δ that is less by (1 + e^ε) times the total variation between the
    two (closeness.py); the smaller counts. Where some Skellam noise is too coarse for that, either all events compose
    by RDP, or δ is halved between the Gaussian events and those, and their ε are added; again the smaller counts. That
    holds for interleaved adaptive releases too (Vadhan and Zhang 2023, "Concurrent Composition Theorems for
    Differential Privacy").

    Of many sampling rates at one noise multiplier, each is bounded by a public coin between the next rates of a fixed
    grid, 16 to an octave: ε grows by less than 0.05 %, and the work no longer grows with the number of rates.

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
        self._composer = pld.Composer()
        self._divergences = lru_cache(maxsize=4096)(rdp.divergences)
        self._composed = lru_cache(maxsize=1024)(self._compute_composed)
        self._cost = lru_cache(maxsize=4096)(self._compute_cost)
        self._quick_cost = lru_cache(maxsize=4096)(self._compute_quick_cost)
        self._answer = lru_cache(maxsize=1024)(self._compute_answer)

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
        answer = self._answer(tuple(charges), delta)
        return msgspec.structs.replace(answer, per_group=dict(answer.per_group))

    def rdp_epsilon(self, charges: Iterable[Charge], delta: float) -> float:
        """ε by Rényi differential privacy alone: looser, and quick at any count. Never below the PLD's by design."""
        _check_delta(delta)
        always, splits = _sort_by_group(charges)
        worlds = _worlds(always, splits)
        if worlds is None:
            return self._rdp_over_splits(always, splits, delta)
        return max(self._rdp_epsilon(multiset, delta) for multiset in worlds.values())

    def quick_epsilon(self, charges: Iterable[Charge], delta: float) -> float:
        """A bound from the first grid alone, for searches: never below `epsilon`, and rarely more than 1 % above."""
        _check_delta(delta)
        always, splits = _sort_by_group(charges)
        worlds = _worlds(always, splits)
        if worlds is None:
            return self._rdp_over_splits(always, splits, delta)
        return max(self._quick_cost(multiset, delta) for multiset in worlds.values())

    def _compute_answer(self, charges: tuple[Charge, ...], delta: float) -> Epsilon:
        always, splits = _sort_by_group(charges)
        worlds = _worlds(always, splits)
        if worlds is None:
            value = self._rdp_over_splits(always, splits, delta)
            notes = _notes(_Cost(value, "rdp", 0.0), charges)
            return Epsilon(value, delta, "rdp", 0.0, {"worst part of every split": value}, notes)
        costs = {name: self._cost(multiset, delta) for name, multiset in worlds.items()}
        worst = max(costs.values(), key=lambda cost: cost.value)
        per_group = {name: cost.value for name, cost in costs.items()}
        return Epsilon(worst.value, delta, worst.accountant, worst.tolerance, per_group, _notes(worst, charges))

    def _compute_cost(self, events: _Multiset, delta: float) -> _Cost:
        if not events:
            return _Cost(0.0, "pld", 0.0)
        if any(is_noiseless(event) for event, _ in events):
            return _Cost(math.inf, "pld", 0.0)
        composed = _Cost(self._rdp_epsilon(events, delta), "rdp", 0.0)
        if delta < pld.MIN_DELTA:
            return composed
        by = _sorted(events, delta, composed.value)
        if not by.skellam:
            left = delta - by.reserved
            exact = self._gaussian_cost(by.gaussian, left, composed.value)._replace(near=by.near)
            return min(exact, composed, key=lambda cost: cost.value)
        left = delta / 2 - by.reserved
        if by.gaussian and left >= pld.MIN_DELTA:
            half = self._gaussian_cost(by.gaussian, left, self._rdp_epsilon(by.gaussian, left))
            if half.value <= composed.value:  # the reserve is for no larger ε
                value = half.value + self._rdp_epsilon(by.skellam, delta / 2)
                split = _Cost(value, "pld+rdp", half.tolerance, by.near)
                return min(composed, split, key=lambda cost: cost.value)
        return composed

    def _compute_quick_cost(self, events: _Multiset, delta: float) -> float:
        if not events:
            return 0.0
        if any(is_noiseless(event) for event, _ in events):
            return math.inf
        composed = self._rdp_epsilon(events, delta)
        if delta < pld.MIN_DELTA:
            return composed
        by = _sorted(events, delta, composed)
        if by.skellam:
            return composed
        left = delta - by.reserved
        exact = _gaussian_epsilon(by.gaussian, left)
        if exact is not None:
            return min(composed, exact)
        single, mixed = _between_nodes(by.gaussian)
        return min(composed, self._on_grid(single, mixed, _first_step(composed), left))

    def _rdp_epsilon(self, events: _Multiset, delta: float) -> float:
        return _epsilon_of(self._composed(events), delta, _sampling_error(events))

    def _compute_composed(self, events: _Multiset) -> _Floats:
        total = np.zeros_like(rdp.ORDERS)
        single, mixed = _between_nodes(events)
        for event, count in single:
            total += count * self._divergences(event)
        for group in mixed:
            # log is concave: events at the mean share cost no less than the events at theirs
            number = sum(group.counts)
            share = sum(s * c for s, c in zip(group.shares, group.counts, strict=True)) / number
            total += number * rdp.between(self._divergences(group.first), self._divergences(group.second), share)
        return total

    def _rdp_over_splits(self, always: Counter[Event], splits: "_Splits", delta: float) -> float:
        """Too many combinations to convolve: at each order, the worst part of every split bounds all of them."""
        error = _sampling_error(_multiset(always))
        total = self._composed(_multiset(always)).copy()
        for parts in splits.values():
            multisets = [_multiset(part) for part in parts.values()]
            total += np.max([self._composed(part) for part in multisets], axis=0)
            error += max(_sampling_error(part) for part in multisets)
        return _epsilon_of(total, delta, error)

    def _gaussian_cost(self, events: _Multiset, delta: float, guess: float) -> _Cost:
        """ε by PLD on finer and finer grids. Every grid is pessimistic, so stopping early loses tightness only."""
        exact = _gaussian_epsilon(events, delta)
        if exact is not None:
            return _Cost(exact, "pld", 0.0)
        single, mixed = _between_nodes(events)
        step, refinement = _first_step(guess), _REFINEMENT
        if mixed:  # hundreds of spectra: two grids that are nearly fine enough are quicker than three
            step, refinement = 2.0 ** math.floor(math.log2(max(guess, 1e-5) / (4 * _STEPS_PER_EPSILON))), 2.0
        best, change = math.inf, 1.0
        while True:
            value = self._on_grid(single, mixed, step, delta)
            if math.isinf(value):  # the grid outgrew the memory, or δ is below the rounding allowance
                break
            if math.isfinite(best):
                change = abs(best - value) / value if value > 0 else best
            best = min(best, value)
            if change < _TOLERANCE:
                break
            step /= refinement
        return _Cost(best, "pld", change)

    def _on_grid(
        self, single: Sequence[tuple[Event, int]], mixed: Sequence[pld.Mixed], step: float, delta: float
    ) -> float:
        events = [event for event, _ in single] + pld.events_of(mixed)
        if any(pld.span(event) / step > pld.MAX_EVENT_GRID for event in events):
            return math.inf
        return self._composer.epsilon(single, mixed, step, delta)


_Splits = dict[str, dict[str, Counter[Event]]]


def _sort_by_group(charges: Iterable[Charge]) -> tuple[Counter[Event], _Splits]:
    """What touched every record, and what touched the parts of each split."""
    always: Counter[Event] = Counter()
    splits: _Splits = {}
    for charge in charges:
        event = charge.event
        if isinstance(event, PatientMixture) and event.max_records == 1:
            event = PoissonGaussian(event.sample_rate, event.noise_multiplier)
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
    precision = 0.0
    for event, count in events:
        if not isinstance(event, Gaussian):
            return None
        precision += count / event.noise_multiplier**2
    exact = float(dp_accounting.get_epsilon_gaussian(precision**-0.5, delta))
    return exact * (1 + 1e-9) + 1e-12  # the root is found to 1e-12: round up


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def _first_step(epsilon: float) -> float:
    """A power of the refinement, so that neighbouring ε share their cached grids."""
    wanted = min(max(epsilon / _STEPS_PER_EPSILON, 1e-6), 1.0)
    return float(_REFINEMENT ** math.floor(math.log(wanted, _REFINEMENT)))


@lru_cache(maxsize=16)
def _between_nodes(events: _Multiset) -> tuple[tuple[tuple[Event, int], ...], tuple[pld.Mixed, ...]]:
    """The events as they are, and, where one noise multiplier comes with many rates, in groups between two nodes."""
    numbers = Counter(event.noise_multiplier for event, _ in events if isinstance(event, PoissonGaussian))
    single: list[tuple[Event, int]] = []
    many: dict[float, list[tuple[float, int]]] = {}
    for event, count in events:
        if isinstance(event, PoissonGaussian) and numbers[event.noise_multiplier] > _MANY_RATES:
            many.setdefault(event.noise_multiplier, []).append((event.sample_rate, count))
        else:
            single.append((event, count))
    mixed: list[pld.Mixed] = []
    for sigma, members in many.items():
        rates = np.array([rate for rate, _ in members])
        counts = np.array([count for _, count in members], dtype=object)
        nodes = np.floor(-_NODES_PER_OCTAVE * np.log2(rates)).astype(np.int64)
        nodes -= _node(nodes) < rates  # the logarithm was rounded
        upper, lower = _node(nodes), _node(nodes + 1)
        shares = np.clip((rates - lower) / (upper - lower) * (1 + 1e-12) + 1e-15, 0.0, 1.0)
        for node in np.unique(nodes):
            here = np.flatnonzero(nodes == node)
            first, second = (PoissonGaussian(float(rate), sigma) for rate in (_node(node), _node(node + 1)))
            mixed.append(pld.Mixed(first, second, tuple(shares[here].tolist()), tuple(counts[here].tolist())))
    return tuple(single), tuple(mixed)


def _node(index: NDArray[np.int64]) -> _Floats:
    rates: _Floats = 2.0 ** (-np.maximum(index, 0) / _NODES_PER_OCTAVE)
    return rates


def _sampling_error(events: _Multiset) -> float:
    """Total variation between the noise that was sampled and the Skellam law, over all releases."""
    return sum(
        count * event.dim * event.shares * SAMPLING_ERROR for event, count in events if isinstance(event, Skellam)
    )


def _epsilon_of(divergence: _Floats, delta: float, sampling_error: float) -> float:
    """ε by RDP. A millionth of δ is set aside for the sampler's error η, which adds at most η·(1 + e^ε) to δ."""
    if not sampling_error:
        return rdp.epsilon(divergence, delta)
    value = rdp.epsilon(divergence, delta * (1 - 1e-6))
    if value > 300 or sampling_error * (1 + math.exp(value)) > 1e-6 * delta:
        return math.inf
    return value


def _sorted(events: _Multiset, delta: float, most_epsilon: float) -> _Sorted:
    """The events, Skellam ones as Gaussian ones where they are near enough for a small part of δ.

    Args:
        most_epsilon: a bound of ε by RDP. A larger one is of no interest, so e^ε is no larger.
    """
    shared = [(event, count) for event, count in events if isinstance(event, Skellam)]
    others: list[tuple[Event, int]] = [(event, count) for event, count in events if not isinstance(event, Skellam)]
    near: tuple[tuple[Skellam, int], ...] = ()
    if shared and most_epsilon < 300:
        near = closeness.nearest(shared, _NEAR * delta / (1 + math.exp(most_epsilon)))
    if not near:
        return _Sorted(tuple(others), tuple(shared), 0.0, 0.0)
    coarse = tuple(pair for pair in shared if pair not in near)
    apart = closeness.total_variation(near)
    return _Sorted(_multiset(Counter(dict(others)) + _twins(near)), coarse, apart, apart * (1 + math.exp(most_epsilon)))


def _twins(events: Sequence[tuple[Skellam, int]]) -> Counter[Event]:
    """The Gaussian events that these stand as. Of very many sampled ones, neighbours share the least noise."""
    exact: Counter[Event] = Counter()
    sampled: dict[float, Counter[float]] = {}
    for event, count in events:
        twin = closeness.twin(event)
        if isinstance(twin, Gaussian):
            exact[twin] += count
        else:
            sampled.setdefault(twin.sample_rate, Counter())[twin.noise_multiplier] += count
    for rate, counts in sampled.items():
        multipliers = sorted(counts)
        size = -(-len(multipliers) // _MANY_LEVELS)
        for start in range(0, len(multipliers), size):
            together = multipliers[start : start + size]
            exact[PoissonGaussian(rate, together[0])] += sum(counts[multiplier] for multiplier in together)
    return exact


def _notes(cost: _Cost, charges: Sequence[Charge]) -> tuple[str, ...]:
    if cost.near:
        return (
            f"Skellam noise counts as rounded Gaussian noise, of which it is within {cost.near:.1g} in total "
            "variation: δ makes up for that",
        )
    if any(isinstance(charge.event, Skellam) and charge.event.sample_rate < 1 for charge in charges):
        return ("sampled Skellam noise, too coarse to count as Gaussian: the generic bound of subsampling is loose",)
    return ()
