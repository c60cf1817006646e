"""Inputs of mean 0 and deviation 1, by moments that all sites release together through noise."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privfed.privacy.events import PrivacyUnit
from privfed.privacy.releases import Standardisation

from . import wire
from .architecture import Schema
from .config import Config
from .data.records import SiteData
from .methods import State

MEAN, DEVIATION = "input_mean", "input_deviation"
"""Names in the server's state, float32[F] each; absent where inputs are not standardised."""

_LEAST = 0.005  # of half an input's range; what the release can give is twice that


def inputs_range(schema: Schema) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest value of each input, float64[F] each, from what is public."""
    low, high = np.array(schema.ranges, dtype=np.float64).T
    return low, high


def unit_means(config: Config, train: SiteData) -> NDArray[np.float64]:
    """float64[units, F]: each record's inputs, or the mean of each patient's, who then counts as one."""
    table = train.inputs.numpy().astype(np.float64)
    if config.privacy.unit is not PrivacyUnit.PATIENT:
        return table
    assert train.patients is not None  # `doors.check_units`
    _, owner, count = np.unique(train.patients, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), table.shape[1]))
    np.add.at(sums, owner, table)
    means: NDArray[np.float64] = sums / count[:, None]
    return means


def standardisation(schema: Schema, release: Standardisation, total: NDArray[np.int64]) -> dict[str, Tensor]:
    """What the server's state gains from the noised sum int64[2 F + 1]."""
    low, high = inputs_range(schema)
    mean, deviation = Standardisation(lower=low, upper=high, steps=release.steps).decode(total)
    return {MEAN: torch.from_numpy(mean).float(), DEVIATION: torch.from_numpy(deviation).float()}


def check_standardisation(config: Config, schema: Schema, state: State) -> None:
    """Return if the state standardises no inputs, or does so by numbers that such a release can give.

    Raises:
        WireError: inputs would leave the range in which gradients keep their digits.
    """
    if MEAN not in state and DEVIATION not in state:
        return
    low, high = (torch.from_numpy(bound).float() for bound in inputs_range(schema))
    mean, deviation = (state.get(name, torch.zeros(0)) for name in (MEAN, DEVIATION))
    room = 1e-3 * (high - low)  # float32 rounds
    fits = config.privacy.standardise_epsilon is not None and mean.shape == deviation.shape == low.shape
    if (
        not fits
        or bool((deviation < _LEAST * (high - low) / 2).any())
        or bool(((mean < low - room) | (mean > high + room)).any())
    ):
        raise wire.WireError("the state standardises inputs otherwise than the run's release can")


def fold(model: nn.Module, state: State) -> None:
    """Have the model take inputs as they are: W (x − m) / d + b is another first layer."""
    if MEAN not in state:
        return
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        first.weight.div_(state[DEVIATION])
        first.bias.sub_(first.weight @ state[MEAN])
