"""What a site demands, whatever a coordinator asks for."""

from datetime import datetime, time

from privfed.privacy.events import NoiseSite, PrivacyUnit

from .architecture import Schema, network_size, opened, parameter_count
from .config import Config, Policy
from .errors import PrivfedError
from .terms import KEY_HOLDER, claimed_colluders, cohort_in, needs_key_holder, shares_noise
from .wire import RoundPlan


class PolicyRefusal(PrivfedError):
    """The plan asks for less protection than the site's own policy demands."""


class OutsideHours(PolicyRefusal):
    """Not now. The same plan may come again in the hours that the site's policy names."""


def check_hours(policy: Policy, now: datetime) -> None:
    """Return if the site begins rounds at ``now``, its local time.

    Raises:
        OutsideHours: names the line, and what time it is here.
    """
    if policy.hours is None:
        return
    begin, end = map(time.fromisoformat, policy.hours.split("-"))
    at = now.time()
    open_now = begin <= at < end if begin < end else at >= begin or at < end  # the same twice: all day
    if not open_now:
        raise OutsideHours(f"policy.hours = {policy.hours}, here it is {at:%H:%M}")


def check_policy(plan: RoundPlan, policy: Policy, *, insecure: bool) -> None:
    """Return if the plan keeps the site's policy.

    Args:
        plan: what the coordinator asks for.
        policy: the site's own.
        insecure: the site was started with a noise seed that others know, for a reproducible study.

    Raises:
        PolicyRefusal: names the line of the policy and what the plan asked for.
    """
    config, n = plan.config, len(plan.cohort)
    secure = config.aggregation.kind != "plain"
    summed = secure and config.method.sends
    if config.method.sends and n < policy.minimum_cohort:
        raise PolicyRefusal(f"policy.minimum_cohort = {policy.minimum_cohort}, the plan invites {n}")
    if summed and plan.minimum_cohort < policy.minimum_cohort:
        raise PolicyRefusal(
            f"policy.minimum_cohort = {policy.minimum_cohort}, the plan would release a sum of {plan.minimum_cohort}"
        )
    if config.privacy.unit is PrivacyUnit.NONE and config.method.sends:
        if policy.require_privacy:
            raise PolicyRefusal("policy.require_privacy = true, the plan has privacy.unit = 'none'")
        for line in ("max_epsilon", "max_epsilon_per_run", "minimum_noise_multiplier"):
            if (limit := getattr(policy, line)) is not None:
                raise PolicyRefusal(f"policy.{line} = {limit:g}, the plan has privacy.unit = 'none'")
    if policy.require_secure_aggregation and not secure:
        raise PolicyRefusal("policy.require_secure_aggregation = true, the plan has aggregation.kind = 'plain'")
    check_names(config, policy)
    if config.privacy.delta > policy.max_delta:
        raise PolicyRefusal(f"policy.max_delta = {policy.max_delta:g}, the plan has delta = {config.privacy.delta:g}")
    if config.privacy.insecure_seed is not None and not insecure:
        raise PolicyRefusal("the plan has privacy.insecure_seed, but this site's noise comes from the system source")
    _check_noise(plan, policy)
    if (
        summed
        and config.aggregation.kind == "masked"
        and plan.degree is None
        and 2 * plan.threshold <= n + plan.colluders
    ):
        # Below this, two disjoint groups of share holders exist, and a server could unmask two views of one round.
        raise PolicyRefusal(
            f"threshold must be above (cohort + colluders) / 2 = {(n + plan.colluders) / 2:g}, the plan has "
            f"{plan.threshold}"
        )


def check_names(config: Config, policy: Policy) -> None:
    """Return if a configuration names nothing that the site's policy does not know: before anything of it is opened.

    Raises:
        PolicyRefusal: names the line.
    """
    asked = {
        "methods": str(type(config.method).__struct_config__.tag),
        "models": str(type(config.model).__struct_config__.tag),
        "units": config.privacy.unit.value,
        "aggregations": config.aggregation.kind,
    }
    if needs_key_holder(config):
        asked["key_holders"] = config.aggregation.key_holder or KEY_HOLDER
    for line, name in asked.items():
        allowed = getattr(policy, line)
        if allowed is not None and name not in allowed:
            raise PolicyRefusal(f"policy.{line} = {', '.join(allowed) or 'none'}, the plan has {name!r}")
    for name in opened(config):
        if name not in policy.trusted:
            raise PolicyRefusal(f"the plan names {name!r}, which policy.trusted of this site does not list")


def check_size(config: Config, schema: Schema, policy: Policy) -> int:
    """How many parameters the run trains, if the site builds a model of that size.

    Raises:
        PolicyRefusal: it is too large.
    """
    size = parameter_count(config, schema)
    largest = max(size, network_size(config, schema))
    if largest > policy.max_parameters:
        raise PolicyRefusal(f"policy.max_parameters = {policy.max_parameters}, the plan's model has {largest}")
    return size


def _check_noise(plan: RoundPlan, policy: Policy) -> None:
    """Return if what the plan releases has the noise that its configuration claims and that the policy demands."""
    config = plan.config
    if (plan.clip is None) != (config.privacy.clip == "fixed"):
        raise PolicyRefusal(f"the plan has clip = {plan.clip}, its configuration clip = {config.privacy.clip!r}")
    fixed = config.privacy.noise_multiplier
    if config.privacy.unit is not PrivacyUnit.NONE and config.method.sends:
        if plan.noise_multiplier == 0 or (fixed is not None and plan.noise_multiplier != fixed):
            raise PolicyRefusal(
                f"the plan has noise_multiplier = {plan.noise_multiplier:g}, which is not what its configuration claims"
            )
        least, target = policy.minimum_noise_multiplier, config.privacy.target_epsilon
        for what, given in (
            ("noise_multiplier", plan.noise_multiplier),
            ("noise on figures", plan.side_noise.figures),
            ("noise on moments of the inputs", plan.side_noise.inputs),
        ):
            if least is not None and 0 < given < least:
                raise PolicyRefusal(f"policy.minimum_noise_multiplier = {least:g}, the plan has {what} = {given:g}")
        most = policy.max_epsilon_per_run
        if most is not None and fixed is None and target > most * (1 + 1e-6):
            raise PolicyRefusal(f"policy.max_epsilon_per_run = {most:g}, the plan has target_epsilon = {target:g}")
        if config.privacy.noise is NoiseSite.CENTRAL and policy.refuse_central_noise:
            raise PolicyRefusal("policy.refuse_central_noise = true, the plan has privacy.noise = 'central'")
        if shares_noise(config):
            covered = {"noise covers": claimed_colluders(config, cohort_in(plan))}
            if config.aggregation.kind == "masked":
                covered["masks cover"] = plan.colluders
            elif config.aggregation.key_holder is not None:
                covered["key, which a site holds, covers"] = 0  # that site and the server open every vector
            for what, colluders in covered.items():
                if colluders < policy.minimum_colluders:
                    raise PolicyRefusal(
                        f"policy.minimum_colluders = {policy.minimum_colluders}, the plan's {what} {colluders}"
                    )
