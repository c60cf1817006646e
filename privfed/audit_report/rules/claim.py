"""Is the claim sound, by what the ledger says."""

from collections.abc import Sequence

from privfed.privacy.adversaries import check_supported
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import PoissonGaussian, PrivacyUnit, Skellam, is_noiseless
from privfed.privacy.ledger import Recorded

from ..accounts import Account
from ..evidence import RunEvidence
from ..model import Finding
from .finding import SUPPORTED, UNDECIDED, UNSOUND, finding, named

_MOST_DELTA = 1e-3  # as a site's policy.max_delta by default


def something_is_claimed(lines: Sequence[Recorded]) -> Finding | None:
    if lines:
        return None
    return finding(
        "something is claimed",
        UNDECIDED,
        "No spend could be read: there is no claim to support.",
        remedy="Give the ledger, or the folder, of a run that released something.",
    )


def delta_is_small(delta: float) -> Finding | None:
    """ε falls as δ rises: at a large δ any mechanism has a small ε, and so has giving whole records away at random."""
    if delta <= _MOST_DELTA:
        return None
    return finding(
        "δ is small",
        UNSOUND,
        "δ is the chance that the promise fails altogether. At this size some records may be given away outright.",
        [f"δ = {delta:g}, and at most {_MOST_DELTA:g} is sensible"],
        "State ε at a δ far below one over the number of records.",
    )


def seed_is_secret(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding:
    known = [named(line) for line in lines if line.entry.insecure_seed]
    known += [f"run {run.run}: privacy.insecure_seed" for run in runs if run.history.summary.privacy.insecure_seed]
    if known:
        return finding(
            "seed is secret",
            UNSOUND,
            "The noise was made from a known seed: whoever knows it takes the noise away. Every ε is void.",
            known,
            "Run again without privacy.insecure_seed, on records that were never released this way.",
        )
    return finding("seed is secret", SUPPORTED, "No entry says that its noise came from a known seed.")


def every_release_has_noise(lines: Sequence[Recorded]) -> Finding:
    bare = [named(line) for line in lines if any(is_noiseless(charge.event) for charge in line.entry.charges)]
    if bare:
        return finding(
            "every release has noise",
            UNSOUND,
            "Something was released without noise: ε of these records is infinite, whatever else was done.",
            bare,
            "Nothing takes a release back. Do not state an ε for these records.",
        )
    return finding("every release has noise", SUPPORTED, "Every release in the ledger is booked with noise.")


def one_unit_is_claimed(accounts: Sequence[Account]) -> Finding | None:
    mixed = [f"{account.site}: {', '.join(account.units)}" for account in accounts if len(account.units) > 1]
    if not mixed:
        return None
    return finding(
        "one unit is claimed",
        UNSOUND,
        "One data set was charged for different units, and the costs of different units do not add up.",
        mixed,
        "Keep to one unit for a data set and audience.",
    )


def combination_has_a_guarantee(lines: Sequence[Recorded]) -> Finding | None:
    refused: dict[str, str] = {}
    for line in lines:
        entry = line.entry
        if entry.unit is PrivacyUnit.NONE:
            continue
        try:
            check_supported(entry.unit, entry.noise)
        except NoGuarantee as refusal:
            refused.setdefault(str(refusal), named(line))
    if not refused:
        return None
    return finding(
        "unit and noise have a guarantee",
        UNSOUND,
        "The unit claimed and the place where the noise is added go with no guarantee.",
        [f"{where}: {why}" for why, where in refused.items()],
        "Use a combination that the toolkit supports.",
    )


def amplification_is_earned(lines: Sequence[Recorded]) -> Finding | None:
    """Selection of sites hides a site only from whoever can not see who took part, and here everybody inside can."""
    claimed = [
        named(line)
        for line in lines
        if line.entry.unit is PrivacyUnit.CLIENT
        for charge in line.entry.charges
        if isinstance(charge.event, PoissonGaussian | Skellam) and charge.event.sample_rate < 1
    ]
    if not claimed:
        return None
    return finding(
        "amplification is earned",
        UNSOUND,
        "ε counts on a secret choice of sites, but the cohort of every round is exposed to the server and the sites.",
        claimed,
        "Book every participation at its full price.",
    )
