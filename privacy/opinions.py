"""The same events through several accountants, side by side: ours, dp-accounting's, and Opacus's.

Three libraries, so that a mistake in one shows; only for Gaussians without sampling does ours ask dp-accounting itself.
An accountant that does not bound an event says so; nobody answers for it.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import msgspec
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from . import closeness, pld
from .accountant import Accountant
from .errors import NoGuarantee, PrivacyError
from .events import ALL_RECORDS, Adjacency, Charge, Gaussian, PoissonGaussian, Skellam, to_dp_event

_PLD_STEP = 1e-4
_PRV_ERROR = 0.01
_MOST_PRV_STEPS = 10_000_000

METHODS = ("pld", "rdp", "prv")


class Opinion(msgspec.Struct, frozen=True):
    """What one accountant says.

    Attributes:
        accountant: its name and whose it is.
        epsilon: an upper bound; None where it has none.
        tolerance: how far ε may still be from the true one by its own approximation, relatively; 0 where it is exact
            arithmetic on a bound.
        note: why there is none, or what to know.
    """

    accountant: str
    epsilon: float | None
    tolerance: float
    note: str = ""


def replaced(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """The charges as they cost for neighbours that replace one unit, where that is known exactly.

    Raises:
        NoGuarantee: an event whose loss under replacement no accountant here bounds.
    """
    answer = []
    for charge in charges:
        event = charge.event
        if isinstance(event, PoissonGaussian) and event.sample_rate == 1.0:
            event = Gaussian(event.noise_multiplier)
        if not isinstance(event, Gaussian):
            raise NoGuarantee(
                f"adjacency {Adjacency.REPLACE_ONE.value!r} is bounded for the Gaussian mechanism without sampling "
                f"alone, got {type(event).__name__}: dp-accounting 0.6 forgets under RDP that a replaced record moves "
                "the sum by 2C (ε 4.73 where 9.997 is exact). Use add-or-remove-one"
            )
        # A replaced unit moves the sum by 2C: half the noise, in units of what it moves
        answer.append(msgspec.structs.replace(charge, event=Gaussian(event.noise_multiplier / 2)))
    return tuple(answer)


def opinions(charges: Iterable[Charge], delta: float, accountant: Accountant) -> tuple[Opinion, ...]:
    """Every accountant's answer for one unit's charges, ours first.

    Args:
        charges: all to one group.
    """
    charges = tuple(charges)
    if len({charge.group for charge in charges}) > 1:
        raise NoGuarantee("several parts of a split compose in parallel, which the other accountants do not know")
    ours = accountant.epsilon(charges, delta)
    return (
        Opinion(f"privfed, the least: {ours.accountant.upper()}", ours.value, ours.tolerance, "; ".join(ours.notes)),
        _asked("PLD, dp-accounting", _PLD_STEP, lambda: by_pld(charges, delta, accountant)),
        _asked("RDP, privfed", 0.0, lambda: accountant.rdp_epsilon(charges, delta)),
        _asked("RDP, dp-accounting", 0.0, lambda: _dp_accounting(RdpAccountant, charges, delta)),
        _asked("PRV, Opacus", _PRV_ERROR, lambda: _prv(charges, delta)),
    )


def by_pld(charges: Sequence[Charge], delta: float, accountant: Accountant) -> float:
    """ε by dp-accounting's PLD, Skellam noise standing as the rounded Gaussian noise that it is near to.

    Raises:
        UnsupportedEvent: Skellam noise that is not near enough.
        NoGuarantee: dp-accounting's answer is above the one that the noise is near enough for.
    """
    if not any(isinstance(charge.event, Skellam) for charge in charges):
        return _dp_accounting(PLDAccountant, charges, delta)
    most = accountant.rdp_epsilon(charges, delta)
    standing, left = closeness.stand_in(charges, delta, most)
    precision = math.fsum(c.count / c.event.noise_multiplier**2 for c in standing if isinstance(c.event, Gaussian))
    sampled = [charge for charge in standing if not isinstance(charge.event, Gaussian)]
    together = [Charge(Gaussian(precision**-0.5))] if precision else []  # unsampled Gaussians compose to one
    value = _dp_accounting(PLDAccountant, [*sampled, *together], left)
    if value > most:
        raise NoGuarantee("PLD finds more than RDP here, and δ was set aside for no larger ε")
    return value


def epsilon_by(method: str, charges: Iterable[Charge], delta: float, accountant: Accountant) -> Opinion:
    """One accountant's answer, by its short name in `METHODS`.

    Raises:
        NoGuarantee: it has none for these events at this δ.
    """
    charges = tuple(charges)
    if method == "rdp":
        return Opinion("rdp", accountant.rdp_epsilon(charges, delta), 0.0)
    if method == "prv":
        return Opinion("prv", _prv(charges, delta), _PRV_ERROR)
    if delta < pld.MIN_DELTA and not all(isinstance(charge.event, Gaussian) for charge in charges):
        raise NoGuarantee(
            f"δ = {delta:g} is below {pld.MIN_DELTA:g}, where the rounding errors of a PLD's Fourier transforms are no "
            "longer small against it: use --accountant rdp"
        )
    ours = accountant.epsilon(charges, delta)
    return Opinion(ours.accountant, ours.value, ours.tolerance, "; ".join(ours.notes))


def delta_for(epsilon: float, charges: Iterable[Charge], accountant: Accountant) -> float:
    """The least δ found at which the charges cost at most ``epsilon``; never below the true one. 1 if there is none.

    By bisection over log δ, to three digits.
    """
    charges = tuple(charges)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")

    def fits(log: float) -> bool:
        return accountant.epsilon(charges, math.exp(log)).value <= epsilon

    low, high = math.log(1e-30), math.log1p(-1e-9)
    if not fits(high):
        return 1.0
    if fits(low):
        return math.exp(low)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.exp(high)


def _asked(name: str, tolerance: float, answer: Callable[[], float]) -> Opinion:
    try:
        return Opinion(name, answer(), tolerance)
    except (PrivacyError, ValueError) as refusal:
        return Opinion(name, None, 0.0, str(refusal))


def _dp_accounting(kind: type, charges: Sequence[Charge], delta: float) -> float:
    accountant = kind()
    for charge in charges:
        accountant.compose(to_dp_event(charge.event), charge.count)
    return float(accountant.get_epsilon(delta))


def _prv(charges: Sequence[Charge], delta: float) -> float:
    """Gopi, Lee and Wutschitz 2021, as Opacus computes it: its upper estimate."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    for charge in charges:
        event = charge.event
        if not isinstance(event, PoissonGaussian | Gaussian) or event.noise_multiplier == 0:
            raise NoGuarantee(f"Opacus's PRV accountant has no {type(event).__name__}")
        rate = event.sample_rate if isinstance(event, PoissonGaussian) else 1.0
        accountant.history.append((event.noise_multiplier, rate, charge.count))
    if sum(charge.count for charge in charges) > _MOST_PRV_STEPS:
        raise NoGuarantee(f"Opacus's PRV accountant outgrows the memory beyond {_MOST_PRV_STEPS:g} steps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy, about its own integration
        try:
            value = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
        except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
            raise NoGuarantee(f"Opacus's PRV accountant fails here: {error}") from None
    if not math.isfinite(value):
        raise NoGuarantee("Opacus's PRV accountant fails here")
    return value


def segments(
    noise_multipliers: Sequence[float], sample_rates: Sequence[float], steps: Sequence[int], group: str = ALL_RECORDS
) -> tuple[Charge, ...]:
    """Charges from columns: equally long, or of one number that counts for all.

    Raises:
        ValueError: columns of different lengths.
    """
    columns: list[Sequence[float]] = [noise_multipliers, sample_rates, steps]
    longest = max(map(len, columns))
    if any(len(column) not in (1, longest) for column in columns):
        raise ValueError(
            "noise multipliers, sample rates and steps must be equally many, or one for all: got "
            f"{', '.join(str(len(column)) for column in columns)}"
        )
    rows = zip(*(list(column) * (longest if len(column) == 1 else 1) for column in columns), strict=True)
    return tuple(
        Charge(Gaussian(z) if rate == 1.0 else PoissonGaussian(rate, z), int(count), group) for z, rate, count in rows
    )
