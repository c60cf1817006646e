"""ε against each adversary: what each one sees, and whose noise it knows.

One release protects differently against different observers. A curious site knows the noise it added itself; a server
that works with c sites knows theirs; who breaks the secure sum sees every share alone. The ledger books what happened;
here the same charges are read through the eyes of each adversary.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Literal

import msgspec

from .accountant import Accountant, Epsilon
from .errors import NoGuarantee
from .events import Charge, Gaussian, NoiseSite, PoissonGaussian, PrivacyUnit, Skellam


class Adversary(StrEnum):
    """Who tries to learn about a unit. All follow the protocol, and keep what they see."""

    MODEL_USER = "external model user"
    SERVER = "curious server"
    OTHER_SITE = "one other site"
    COALITION = "server and colluding sites"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """The public facts of a run that decide what each adversary sees.

    Args:
        unit, noise: what the run claims, and where its noise is added.
        secure_sum: whether the server sees sums only (masked or encrypted), or every site's vector.
        threshold: how many colluding sites can open a single site's vector; None without a secure sum.
        selection: how the sites of a round are chosen: all of them, each by its own coin, or otherwise.
        selection_rate: the probability of that coin.
        cohort_hidden: nobody outside the federation learns who took part in a round. The server and the sites always
            learn it: a secure sum shows them its cohort.
    """

    unit: PrivacyUnit
    noise: NoiseSite
    secure_sum: bool
    threshold: int | None
    selection: Literal["all", "poisson", "other"] = "all"
    selection_rate: float = 1.0
    cohort_hidden: bool = False


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: ε against an adversary, or the reason why there is none.

    Attributes:
        adversary: who.
        colluders: how many sites stand by it; it knows their noise.
        epsilon: the bound, None where there is none.
        reason: why there is none, or what the bound rests on.
    """

    adversary: Adversary
    colluders: int
    epsilon: Epsilon | None
    reason: str


_LOCAL = "the site's own noise"
_OWN_SHARE = "the site's own share alone"


def exposures(
    deployment: Deployment,
    charges: Iterable[Charge],
    delta: float,
    accountant: Accountant,
    *,
    colluders: Sequence[int] = (),
    every_round: Iterable[Charge] | None = None,
    others: Iterable[tuple[Deployment, Iterable[Charge]]] = (),
) -> tuple[Exposure, ...]:
    """ε of one site's units against every adversary, and against the server with each number of `colluders`.

    Args:
        deployment: the run's facts.
        charges: the site's, from its ledger.
        delta: in (0, 1).
        colluders: numbers of sites that stand by the server.
        every_round: for hidden Poisson selection alone, what each round of the run would charge a site that took part:
            an adversary who does not know which rounds they were is not charged by participation.
        others: releases about the same records that were made otherwise, by earlier runs or beside the updates. An
            adversary has seen them all, each as it was made: who was trusted with one has no bound over all.

    Raises:
        NoGuarantee: unit × noise is a combination without any guarantee; see `check_supported`.
    """
    check_supported(deployment.unit, deployment.noise)
    own, rounds = tuple(charges), None if every_round is None else tuple(every_round)
    beside = [(how, tuple(more)) for how, more in others]
    parties = [(adversary, 0) for adversary in Adversary if adversary is not Adversary.COALITION]
    lines = []
    for adversary, count in [*parties, *((Adversary.COALITION, count) for count in colluders)]:
        try:
            seen, why = seen_by(adversary, deployment, own, colluders=count, every_round=rounds)
            for how, more in beside:
                also, reason = seen_by(adversary, how, more, colluders=count)
                seen, why = (*seen, *also), why if reason in why else f"{why}; {reason}"
        except NoGuarantee as refusal:
            lines.append(Exposure(adversary=adversary, colluders=count, epsilon=None, reason=str(refusal)))
        else:
            epsilon = accountant.epsilon(seen, delta)
            lines.append(Exposure(adversary=adversary, colluders=count, epsilon=epsilon, reason=why))
    return tuple(lines)


def check_supported(unit: PrivacyUnit, noise: NoiseSite) -> None:
    """Returns if the combination is one that the table of design/privacy.md, section 4, has a column for.

    Raises:
        NoGuarantee: with the reason.
    """
    if unit is PrivacyUnit.NONE:
        raise NoGuarantee("privacy.unit = 'none' claims nothing, so there is no ε to report")
    if unit is PrivacyUnit.CLIENT and noise is NoiseSite.LOCAL:
        raise NoGuarantee(
            "privacy.unit = 'client' with noise = 'local' hides each whole site behind its own noise alone, which "
            "leaves nothing to learn: use noise = 'distributed' or 'central'"
        )
    if unit is not PrivacyUnit.CLIENT and noise is NoiseSite.CENTRAL:
        raise NoGuarantee(
            f"privacy.unit = {unit.value!r} with noise = 'central' sends un-noised sums to the server; the secure sum "
            "with noise = 'distributed' gives the same accuracy without trusting it"
        )


def seen_by(
    adversary: Adversary,
    deployment: Deployment,
    charges: Sequence[Charge],
    *,
    colluders: int = 0,
    every_round: Sequence[Charge] | None = None,
) -> tuple[tuple[Charge, ...], str]:
    """The charges as this adversary may hold them against one site, and what that rests on.

    **Guarantees.** Amplification by the selection of sites is credited only where selection was Poisson *and* hidden
    from this adversary, with central noise; then every round of the run counts, not only those with the site in it.
    Nobody is credited with more shares of noise than those it does not know.

    Raises:
        NoGuarantee: there is no bound against this adversary.
        ValueError: colluders for another adversary than the coalition.
    """
    if colluders < 0 or (colluders and adversary is not Adversary.COALITION):
        raise ValueError(f"colluders must be 0 for {adversary.value!r} and never negative, got {colluders}")
    check_supported(deployment.unit, deployment.noise)
    if deployment.noise is NoiseSite.CENTRAL:
        charges, why = _central(adversary, deployment, charges, every_round)
        return _less_known_shares(adversary, deployment, charges, colluders)[0], why
    seen, shared = _less_known_shares(adversary, deployment, charges, colluders)
    if deployment.noise is NoiseSite.DISTRIBUTED:
        return seen, shared
    in_shares = any(isinstance(charge.event, Skellam) for charge in charges)  # figures released beside the updates
    return seen, f"{_LOCAL}; beside the updates, {shared}" if in_shares else _LOCAL


def _central(
    adversary: Adversary,
    deployment: Deployment,
    charges: Sequence[Charge],
    every_round: Sequence[Charge] | None,
) -> tuple[tuple[Charge, ...], str]:
    if adversary in (Adversary.SERVER, Adversary.COALITION):
        raise NoGuarantee("the server adds the noise and sees the sum without it: it is trusted")
    hidden = adversary is Adversary.MODEL_USER and deployment.cohort_hidden
    if not (hidden and deployment.selection == "poisson" and every_round is not None):
        unearned = "" if deployment.selection == "all" else "; its choice of sites is no secret and earns nothing"
        return tuple(charges), "the server's noise" + unearned
    amplified = []
    for charge in every_round:
        if not isinstance(charge.event, Gaussian):
            raise NoGuarantee(f"selection is accounted for Gaussian noise only, got {type(charge.event).__name__}")
        event = PoissonGaussian(deployment.selection_rate, charge.event.noise_multiplier)
        amplified.append(Charge(event, charge.count, charge.group))
    return tuple(amplified), "the server's noise; sites were selected by secret coins"


def _less_known_shares(
    adversary: Adversary, deployment: Deployment, charges: Sequence[Charge], colluders: int
) -> tuple[tuple[Charge, ...], str]:
    """The charges with the shares that this adversary does not know, whatever of the run was noised in shares."""
    sees_shares = adversary in (Adversary.SERVER, Adversary.COALITION) and (
        not deployment.secure_sum or (deployment.threshold is not None and colluders >= deployment.threshold)
    )
    known = 1 if adversary is Adversary.OTHER_SITE else colluders
    alone = False
    seen = []
    for charge in charges:
        event = charge.event
        if not isinstance(event, Skellam):  # a site's own noise, such as a local release in between
            seen.append(charge)
            continue
        most = event.shares - 1
        hidden = most if sees_shares else min(known, most)
        alone = alone or (hidden == most and most > 0)
        seen.append(Charge(msgspec.structs.replace(event, colluders=hidden), charge.count, charge.group))
    if alone:
        return tuple(seen), _OWN_SHARE
    if adversary is Adversary.OTHER_SITE:
        return tuple(seen), "all shares but its own"
    return tuple(seen), "all shares but theirs" if colluders else "all shares of the noise"
