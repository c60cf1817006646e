"""The same events asked of other accountants."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import msgspec
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import (
    ALL_RECORDS,
    Charge,
    Gaussian,
    Skellam,
)
from privfed.privacy.opinions import opinions

from .accounts import bounded, multiplier
from .model import (
    Opinion,
)

_MOST_EVENTS = 24  # of a chain that the slow ones are asked about


def second_opinions(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Opinion, ...]:
    """Other accountants on the chain that has spent most; no one answers for an accountant that has no bound."""
    if not charges or any(multiplier(charge.event) == 0 for charge in charges):
        return ()
    charges = _dearest_history(charges, delta, accountant)
    with _quiet():
        if any(isinstance(charge.event, Skellam) for charge in charges):
            return _second_on_skellam(charges, delta, accountant)
        if len({charge.group for charge in charges}) > 1 or len({charge.event for charge in charges}) > _MOST_EVENTS:
            value = accountant.rdp_epsilon(charges, delta)
            note = "parts of a split, or many different events: the other accountants were not asked"
            return (Opinion(accountant=_OUR_RDP, epsilon=bounded(value), tolerance=0.0, note=note),)
        return tuple(
            Opinion(accountant=line.accountant, epsilon=line.epsilon, tolerance=line.tolerance, note=line.note)
            for line in opinions(charges, delta, accountant)[1:]
        )


def _dearest_history(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Charge, ...]:
    """What touched the records of the parts that cost most, if one can tell: the others have no say in ε."""
    per_group = accountant.epsilon(charges, delta).per_group
    parts = {ALL_RECORDS, *max(per_group, key=lambda name: per_group[name]).split()}
    if not parts <= {ALL_RECORDS, *(charge.group for charge in charges)}:
        return tuple(charges)
    return tuple(msgspec.structs.replace(charge, group=ALL_RECORDS) for charge in charges if charge.group in parts)


_OUR_RDP = "RDP, privfed"
_NEAR = "PLD, dp-accounting; Skellam noise as the rounded Gaussian noise it is near to"
_ORDERS = [*range(2, 64), *range(64, 512, 8), 1024, 2048]


def _second_on_skellam(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Opinion, ...]:
    """dp-accounting has no Skellam noise: its RDP bound is written out here again, and converted by dp-accounting.
    Where the noise is near to rounded Gaussian noise, dp-accounting's PLD is asked about that.

    Source: Agarwal, Kairouz and Liu 2021, Theorem 3.5, for integer orders α: αΔ₂²/2μ + min{((2α−1)Δ₂²+6Δ₁)/4μ²,
    3Δ₁/2μ}. Gaussian noise costs α/2σ².
    """
    name, note = "RDP, dp-accounting; Skellam's bound written out again", ""
    ours = Opinion(accountant=_OUR_RDP, epsilon=bounded(accountant.rdp_epsilon(charges, delta)), tolerance=0.0, note="")
    total = dict.fromkeys(_ORDERS, 0.0)
    for charge in charges:
        event = charge.event
        for order in _ORDERS:
            if isinstance(event, Skellam) and event.sample_rate == 1 and charge.group == charges[0].group:
                mu, square, l1 = event.variance, event.l2_squared, event.l1
                rounding = min(((2 * order - 1) * square + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
                total[order] += charge.count * (order * square / (2 * mu) + rounding)
            elif isinstance(event, Gaussian) and charge.group == charges[0].group:
                total[order] += charge.count * order / (2 * event.noise_multiplier**2)
            else:
                note = "sampling, or parts of a split, beside noise in shares: it has no bound"
    near = Opinion(accountant=_NEAR, epsilon=None, tolerance=0.0, note="parts of a split, or many different events")
    sampled = {charge.event for charge in charges if isinstance(charge.event, Skellam) and charge.event.sample_rate < 1}
    if len({charge.group for charge in charges}) == 1 and len(sampled) <= _MOST_EVENTS:
        by_pld = opinions(charges, delta, accountant)[1]
        near = Opinion(accountant=_NEAR, epsilon=by_pld.epsilon, tolerance=by_pld.tolerance, note=by_pld.note)
    if note:
        return (Opinion(accountant=name, epsilon=None, tolerance=0.0, note=note), ours, near)
    value, _ = compute_epsilon(list(total), list(total.values()), delta)
    return (Opinion(accountant=name, epsilon=bounded(float(value)), tolerance=0.0, note=""), ours, near)


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting reports orders that it leaves out; the report has no use for that."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def versions() -> dict[str, str]:
    """The accounting packages' versions."""
    found = {}
    for package in ("privfed", "dp-accounting", "opacus", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
