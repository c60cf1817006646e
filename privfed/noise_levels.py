"""How much noise a run's target needs: for its updates, and for what it releases beside them."""

import math
from collections.abc import Callable
from functools import partial

import msgspec

from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import noise_multiplier_for
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, PrivacyUnit
from privfed.privacy.oracle.door import ALL

from . import wire
from .architecture import Schema, parameter_count, update_size
from .cohort import Cohort
from .config import Config, SideNoise
from .errors import ConfigError
from .schedule import ahead, check_schedule
from .terms import count_sum, counts_of, side_charge, whole_group

_FAINTEST = 1e-3  # integers of variance 1, which may cost less than a generous target
_CLIENT_SHARE = 0.2  # of the target for figures that can not be paid beside the updates


def noise_levels(config: Config, cohort: Cohort, schema: Schema, accountant: Accountant) -> tuple[float, SideNoise]:
    """σ/C of the updates and of what is released beside them, so that all together cost one site target_epsilon.

    ε is that of a site which takes part in every round, at the smallest cohort that may be summed.

    Raises:
        ConfigError: the target can not be met.
    """
    privacy = config.privacy
    check_schedule(config)
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        try:
            counts_of(config)
        except NoGuarantee as refusal:
            raise ConfigError(str(refusal)) from None
        if privacy.standardise_epsilon is not None:
            raise ConfigError("privacy.standardise_epsilon is part of a claim, and this run makes none: leave it out")
        return 0.0, SideNoise()
    if privacy.noise_multiplier is None and math.isinf(privacy.target_epsilon):
        raise ConfigError("privacy needs a finite target_epsilon (calibrates the noise) or noise_multiplier (fixes it)")
    size = update_size(config, schema.features, parameter_count(config, schema))

    side_charges = partial(_side_charges, config, cohort, schema)

    def least(key: str, target: float, charges: Callable[[float], tuple[Charge, ...]]) -> float:
        try:
            return noise_multiplier_for(target, privacy.delta, charges, accountant)
        except NoGuarantee as refusal:
            raise ConfigError(str(refusal)) from None
        except ValueError as error:
            raise ConfigError(f"{key} = {target:g}: {error}") from None

    def beside_least(key: str, target: float, purpose: wire.Purpose) -> float:
        cheapest = side_charges(purpose, _FAINTEST)
        if accountant.epsilon(cheapest, privacy.delta).value <= target:
            return _FAINTEST
        return least(key, target, lambda z: side_charges(purpose, z))

    figures = inputs = 0.0
    try:
        if counts_of(config) is not None:
            target = figures_target(config)
            figures = beside_least("evaluation.target_epsilon", target, "figures")
    except NoGuarantee as refusal:
        raise ConfigError(str(refusal)) from None
    if privacy.standardise_epsilon is not None:
        target = privacy.standardise_epsilon
        inputs = beside_least("privacy.standardise_epsilon", target, "inputs")
    levels = SideNoise(figures=figures, inputs=inputs)
    beside = side_plan(config, cohort, schema, levels)

    with_training = meets_training(config, beside)

    def plan(noise_multiplier: float) -> tuple[Charge, ...]:
        return (*ahead(config, cohort, size, noise_multiplier, config.rounds), *with_training)

    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier, levels
    spent = accountant.epsilon(beside, privacy.delta).value if beside else 0.0
    if spent > privacy.target_epsilon:
        parts = ("privacy.standardise_epsilon", levels.inputs), ("evaluation.target_epsilon", levels.figures)
        raise ConfigError(
            f"privacy.target_epsilon = {privacy.target_epsilon:g} is the budget of the whole run, and what is released "
            f"beside the updates costs {spent:.3g}: lower {' or '.join(key for key, level in parts if level)}, or "
            "raise the target"
        )
    return least("privacy.target_epsilon", privacy.target_epsilon, plan), levels


def side_plan(config: Config, cohort: Cohort, schema: Schema, levels: SideNoise) -> tuple[Charge, ...]:
    """What is released beside the updates, over the whole run and at its worst."""
    return (
        *(_side_charges(config, cohort, schema, "figures", levels.figures) if levels.figures else ()),
        *(_side_charges(config, cohort, schema, "inputs", levels.inputs) if levels.inputs else ()),
    )


def _side_charges(
    config: Config, cohort: Cohort, schema: Schema, purpose: wire.Purpose, noise_multiplier: float
) -> tuple[Charge, ...]:
    encoding = count_sum(config, cohort, purpose, schema.features, noise_multiplier)
    count = evaluations(config) if purpose == "figures" else 1
    return (msgspec.structs.replace(side_charge(config, encoding, purpose), count=count),)


def meets_training(config: Config, beside: tuple[Charge, ...]) -> tuple[Charge, ...]:
    """Those charges that the training records meet. What is about the test records alone never adds to the updates:
    the larger of the two counts."""
    return tuple(charge for charge in beside if charge.group in (ALL, whole_group(config)))


def figures_target(config: Config) -> float:
    """ε for all figures of the run together."""
    if config.evaluation.target_epsilon is not None:
        return config.evaluation.target_epsilon
    # Test records are none of the training records: both together cost the larger. A whole site holds both.
    share = _CLIENT_SHARE if config.privacy.unit is PrivacyUnit.CLIENT else 1.0
    return share * config.privacy.target_epsilon


def evaluations(config: Config) -> int:
    """After how many rounds a whole run measures."""
    return -(-config.rounds // config.evaluation.every)
