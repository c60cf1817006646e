"""Was it done as it was booked: run folders beside the ledger."""

import math
from collections.abc import Sequence

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import NoiseSite, PoissonGaussian, Skellam
from privfed.privacy.ledger import Recorded
from privfed.verification import Spends

from ..accounts import Account
from ..evidence import RunEvidence, base_run
from ..exposures import deployment_in
from ..model import Finding
from .finding import AGREES, ROUNDING, SUPPORTED, UNDECIDED, UNSOUND, finding, named


def folders_are_given(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    given = {run.run: {line.round for line in run.history.rounds} for run in runs}
    missing = [f"run {name}" for name in sorted({base_run(line.entry.run) for line in lines} - given.keys())]
    booked = {(line.entry.run, line.entry.round) for line in lines if line.entry.run in given}
    missing += [f"run {run}, round {number}" for run, number in sorted(booked) if number not in given[run]]
    if not missing:
        return None
    return finding(
        "folders of all runs are given",
        UNDECIDED,
        "A ledger does not say what else was released: figures, personal models, or who saw which sums.",
        missing,
        "Give the folder of every run on the ledger too.",
    )


def secure_sum_stood(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    shared = {base_run(line.entry.run) for line in lines if line.entry.noise is NoiseSite.DISTRIBUTED}
    plain = [
        f"run {run.run}: aggregation.kind = {run.history.config.aggregation.kind!r}"
        for run in runs
        if run.run in shared and run.history.config.aggregation.kind == "plain"
    ]
    for line in lines:
        how = deployment_in(line)
        if line.entry.noise is NoiseSite.DISTRIBUTED and how is not None and not how.secure_sum:
            plain.append(f"{named(line)}: booked without a secure sum")
    if plain:
        return finding(
            "noise in shares has a secure sum",
            UNSOUND,
            "The noise is in shares, but the server saw every site's vector under that site's share alone.",
            plain,
            "Use aggregation.kind = 'masked' or 'homomorphic'.",
        )
    return None


def booked_as_configured(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    """No event with more noise, a smaller sample or more shares than the run had."""
    if not any(run.private for run in runs):
        return None
    contributed = {
        (run.run, line.round): len(line.contributed) for run in runs for line in run.history.rounds if line.contributed
    }
    facts = {run.run: run for run in runs}
    levels = {
        (run.run, line.round): line.noise_multiplier
        for run in runs
        for line in run.history.rounds
        if run.history.config.privacy.schedule == "spend"
    }
    wrong = []
    for line in lines:
        entry = line.entry
        run = facts.get(entry.run)
        if run is None:  # figures and moments have noise of their own
            continue
        rate = run.history.config.privacy.rate
        noise = levels.get((entry.run, entry.round), run.facts.noise_multiplier)
        for charge in entry.charges:
            event = charge.event
            if isinstance(event, Skellam):
                most = contributed.get((entry.run, entry.round))
                if entry.kind == "settle" and most is not None and event.shares > most:
                    wrong.append(f"{named(line)}: {event.shares} shares of noise booked, {most} sites in the sum")
                booked = math.sqrt(event.variance / event.l2_squared) if entry.kind != "settle" else 0.0
            else:
                booked = event.noise_multiplier
                if isinstance(event, PoissonGaussian) and event.sample_rate < rate * (1 - ROUNDING):
                    wrong.append(f"{named(line)}: sample rate {event.sample_rate:g} booked, {rate:g} configured")
            if booked > noise * (1 + AGREES):
                wrong.append(f"{named(line)}: noise multiplier {booked:.4g} booked, {noise:.4g} configured")
    if wrong:
        return finding(
            "booked as configured",
            UNSOUND,
            "The ledger books more protection than the run was configured to give.",
            wrong,
            "Correct what writes the ledger; the true ε is larger.",
        )
    return finding(
        "booked as configured",
        SUPPORTED,
        "No entry books more noise, a smaller sample or more shares of noise than its run was configured with.",
    )


def contributions_are_booked(lines: Sequence[Recorded], runs: Sequence[RunEvidence]) -> Finding | None:
    if not any(run.private for run in runs):
        return None
    booked = {(line.entry.run, line.entry.site, line.entry.round) for line in lines}
    missing = [
        f"{site}, run {run.run}, round {line.round}"
        for run in runs
        if run.private
        for line in run.history.rounds
        for site in line.contributed
        if (run.run, site, line.round) not in booked
    ]
    if missing:
        return finding(
            "every contribution is booked",
            UNSOUND,
            "The run's record of its rounds names contributions that no ledger entry pays for.",
            missing,
            "Give the ledger that the run used. If this is it, entries are missing.",
        )
    return finding(
        "every contribution is booked", SUPPORTED, "Every contribution that the runs report is paid for in the ledger."
    )


def summary_agrees(accounts: Sequence[Account], runs: Sequence[RunEvidence], accountant: Accountant) -> Finding | None:
    """What a run says it cost, against its ledger as far as its own last entry."""
    wrong, asked = [], False
    for run in runs:
        if not run.private:
            continue
        privacy = run.history.summary.privacy
        for account in accounts:
            said = privacy.epsilon.per_site.get(account.site)
            own = [line.sequence for line in account.lines if base_run(line.entry.run) == run.run]
            if not own or account.book.path.resolve() != run.ledger.resolve():
                continue
            chain = account.book.chains[account.site]
            charges = Spends(chain, account.dataset, account.audience).upto(max(own))
            found, asked = accountant.epsilon(charges, privacy.delta).value, True
            if said is None or said < found * (1 - AGREES):
                shown = "no ε" if said is None else f"ε = {said:.4g}"
                wrong.append(f"{account.site}, run {run.run}: the summary says {shown}, its events give {found:.4g}")
    if wrong:
        return finding(
            "summary agrees with the ledger",
            UNSOUND,
            "A run's own summary states a smaller ε than the events in its ledger cost.",
            wrong,
            "State the ε of this report instead.",
        )
    if not asked:
        return None
    return finding(
        "summary agrees with the ledger", SUPPORTED, "No run states a smaller ε than the events in its ledger cost."
    )
