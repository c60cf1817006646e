"""What a site's own books say, and what it would say to an experiment. Nothing here asks anybody."""

from collections import Counter
from datetime import datetime

import msgspec

from privfed import wire
from privfed.architecture import parameter_count
from privfed.cohort import cohort_of, held_out
from privfed.config import Config
from privfed.crypto.errors import AggregationError
from privfed.data.tables import Table
from privfed.errors import PrivfedError
from privfed.keyring import ledger_key, site_key
from privfed.noise_levels import noise_levels
from privfed.policy import check_hours, check_names, check_policy, check_size
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import PrivacyError
from privfed.privacy.ledger import Ledger, utc_now
from privfed.terms import key_holder_of, plan_encoding, planned_charges

from . import papers
from .hospital import KIT, LEDGER, Hospital
from .papers import schema_of


class RunLine(msgspec.Struct, frozen=True):
    """One run at this site.

    Args:
        rounds: charged as they were answered.
        last: the time of its last entry.
        caught_up: `account.catch_up` has charged all its rounds.
    """

    run: str
    rounds: int
    last: str | None
    caught_up: bool = False


class SiteStatus(msgspec.Struct, frozen=True):
    """What ``privfed site status --json`` prints."""

    name: str
    roster: int
    epsilon: float
    delta: float
    max_epsilon: float | None
    runs: tuple[RunLine, ...]
    refusals: tuple[str, ...]


def read(hospital: Hospital) -> SiteStatus:
    """A site's ledger and log, read; a running site is not disturbed."""
    policy, name = hospital.policy, hospital.file.name
    hospital.require_ledger()
    key = ledger_key(hospital.home / LEDGER)
    dataset = noise.derive_key(site_key(key, name, "fingerprint"), b"ledger", name.encode()).hex()
    with Ledger(hospital.home / LEDGER) as book:
        lines, charges = book.entries(name), book.charges(name, dataset)
    spent = Accountant().epsilon(charges, policy.delta).value if charges else 0.0
    rounds = Counter(run for run, _ in {(line.entry.run, line.entry.round) for line in lines if line.entry.charges})
    caught_up = {run for line in lines if (run := line.entry.metadata.get("charged")) is not None}
    last = {
        line.entry.metadata.get("charged", line.entry.run): line.time
        for line in lines
        if "account" not in line.entry.metadata  # that it was caught up is no run
    }
    return SiteStatus(
        name=name,
        roster=hospital.roster.version,
        epsilon=spent,
        delta=policy.delta,
        max_epsilon=policy.max_epsilon,
        runs=tuple(RunLine(run, rounds[run], last[run], run in caught_up) for run in last),
        refusals=_refusals(hospital),
    )


def would_refuse(hospital: Hospital, config: Config, now: datetime | None = None) -> str | None:
    """Why this site would not take part in an experiment; None if it would, as far as policy and budget say.

    Args:
        now: the site's local time; default its clock's.

    Raises:
        PrivfedError, PrivacyError: the site's own folder or books can not be read; the message names local files.
    """
    terms, policy = hospital.terms, hospital.policy
    if not isinstance(config.data, Table) or papers.agreed(config.data) != terms.data or config.task != terms.task:
        return "it reads another table, or predicts something else, than the consortium agreed on"
    hospital.require_current()
    accountant, spent = Accountant(), read(hospital).epsilon
    try:
        check_names(config, policy)  # before a module that it names is imported for its size
        plan = _first_plan(hospital, config, accountant)
        check_policy(plan, policy, insecure=hospital.file.study is not None)
        check_size(config, schema_of(terms), policy)
        if (reason := _beyond_budget(hospital, plan, spent, accountant)) is not None:
            return reason
        check_hours(policy, now or utc_now().astimezone())
    except (PrivfedError, PrivacyError, AggregationError, ValueError) as error:
        return str(error)
    return None


def _first_plan(hospital: Hospital, config: Config, accountant: Accountant) -> wire.RoundPlan:
    """What the coordinator would ask for in the first round, if all sites of the roster are there."""
    roster, terms = hospital.roster, hospital.terms
    names = [member.name for member in roster.members]
    cohort = tuple(index for index, name in enumerate(names) if name not in held_out(config, names))
    schema = schema_of(terms)
    numbers = cohort_of(config, len(cohort))
    noise_multiplier, side_noise = noise_levels(config, numbers, schema, accountant)
    return wire.RoundPlan(
        run="policy check",
        round=0,
        attempt=0,
        cohort=cohort,
        threshold=numbers.threshold,
        minimum_cohort=numbers.minimum_cohort,
        colluders=numbers.colluders,
        degree=numbers.degree,
        noise_multiplier=noise_multiplier,
        side_noise=side_noise,
        clip=None if config.privacy.clip == "fixed" else config.privacy.max_update_norm,
        features=schema.features,
        config=config,
        roster_version=roster.version,
        key_holder=key_holder_of(config, roster),
    )


def _beyond_budget(hospital: Hospital, plan: wire.RoundPlan, spent: float, accountant: Accountant) -> str | None:
    """What of the site's budget the whole run would not fit into."""
    config, policy = plan.config, hospital.policy
    limit, target = policy.max_epsilon, config.privacy.target_epsilon
    if (most := policy.max_epsilon_per_run) is not None and config.privacy.noise_multiplier is not None:
        encoding = plan_encoding(plan, parameter_count(config, schema_of(hospital.terms)))
        charges = planned_charges(config, encoding, plan.noise_multiplier, config.rounds)
        cost = accountant.epsilon(charges, policy.delta).value if charges else 0.0
        if cost > most * (1 + 1e-6):
            return f"policy.max_epsilon_per_run = {most:g}, all rounds of the run would spend {cost:.4g}"
    if limit is not None and spent + target > limit * 1.0000001 and spent > 0:
        return (
            f"ε = {spent:.3g} of policy.max_epsilon = {limit:g} is spent: the run's {target:g} "
            "does not fit beside it for sure; its last rounds may be refused"
        )
    if limit is not None and target > limit:
        return f"policy.max_epsilon = {limit:g}, the run would spend {target:g}"
    return None


def _refusals(hospital: Hospital) -> tuple[str, ...]:
    """The last refusals in the logs of this site's jobs."""
    found: list[str] = []
    for path in sorted((hospital.home / KIT).glob("*/log.txt")):
        found += [
            wire.printable(line.strip())
            for line in path.read_text(errors="replace").splitlines()
            if " refuses: " in line
        ]
    return tuple(found[-10:])
