"""What a site demands, whatever a coordinator asks for."""

from privfed.privacy.events import NoiseSite, PrivacyUnit

from .config import Policy
from .errors import PrivfedError
from .terms import claimed_colluders, cohort_in, opened, shares_noise
from .wire import RoundPlan


class PolicyRefusal(PrivfedError):
    """The plan asks for less protection than the site's own policy demands."""


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
        if policy.max_epsilon is not None:
            raise PolicyRefusal(f"policy.max_epsilon = {policy.max_epsilon:g}, the plan has privacy.unit = 'none'")
    if policy.require_secure_aggregation and not secure:
        raise PolicyRefusal("policy.require_secure_aggregation = true, the plan has aggregation.kind = 'plain'")
    for name in opened(config):
        if name not in policy.trusted:
            raise PolicyRefusal(f"the plan names {name!r}, which policy.trusted of this site does not list")
    if config.privacy.delta > policy.max_delta:
        raise PolicyRefusal(f"policy.max_delta = {policy.max_delta:g}, the plan has delta = {config.privacy.delta:g}")
    if config.privacy.insecure_seed is not None and not insecure:
        raise PolicyRefusal("the plan has privacy.insecure_seed, but this site's noise comes from the system source")
    if (plan.clip is None) != (config.privacy.clip == "fixed"):
        raise PolicyRefusal(f"the plan has clip = {plan.clip}, its configuration clip = {config.privacy.clip!r}")
    fixed = config.privacy.noise_multiplier
    if config.privacy.unit is not PrivacyUnit.NONE and config.method.sends:
        if plan.noise_multiplier == 0 or (fixed is not None and plan.noise_multiplier != fixed):
            raise PolicyRefusal(
                f"the plan has noise_multiplier = {plan.noise_multiplier:g}, which is not what its configuration claims"
            )
        if config.privacy.noise is NoiseSite.CENTRAL and policy.refuse_central_noise:
            raise PolicyRefusal("policy.refuse_central_noise = true, the plan has privacy.noise = 'central'")
        if shares_noise(config):
            covered = {"noise covers": claimed_colluders(config, cohort_in(plan))}
            if config.aggregation.kind == "masked":
                covered["masks cover"] = plan.colluders
            for what, colluders in covered.items():
                if colluders < policy.minimum_colluders:
                    raise PolicyRefusal(
                        f"policy.minimum_colluders = {policy.minimum_colluders}, the plan's {what} {colluders}"
                    )
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
