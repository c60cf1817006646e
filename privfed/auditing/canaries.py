"""Records that carry a gradient of one's choice through the real door."""

import itertools
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privfed.privacy.events import PrivacyUnit
from privfed.privacy.oracle.door import ALL, NoisedDoor

from ..architecture import Schema
from ..config import Config
from ..data.records import SiteData
from ..doors import Split, private_door
from ..errors import ConfigError
from ..methods import State

LOUD = 10.0  # a canary's norm over the clip: a clip that is missing shows at once


def carrier(dim: int) -> tuple[nn.Module, "LinearLoss"]:
    """A network of ``dim`` parameters and a loss under which a record's gradient is the record itself, wherever."""
    return nn.Linear(dim, 1, bias=False), LinearLoss()


class LinearLoss:
    """float[B]: the output, whatever the target."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]


@dataclass(frozen=True)
class Stage:
    """One site's records with and without a canary, and where the canary shows.

    Attributes:
        part: of the method's records, the one that the canary is in.
        direction: float64[dim], unit vector: where one release moves for it.
        sides: included → records.
    """

    part: str
    direction: NDArray[np.float64] = field(repr=False)
    sides: dict[bool, Split] = field(repr=False)


def carriers(gradients: NDArray[np.float64], units: NDArray[np.uint64]) -> SiteData:
    """Records that carry ``gradients`` float64[n, dim], of ``units`` uint64[n]."""
    inputs = torch.from_numpy(gradients).float()
    return SiteData(np.arange(len(units), dtype=np.uint64), inputs, torch.zeros(len(units), dtype=torch.int64), units)


def copies_of(config: Config) -> int:
    """Records of one unit: of a patient more than may count, so that a door shows whether it clips them together."""
    return (config.privacy.max_records or 1) + 2 if config.privacy.unit is PrivacyUnit.PATIENT else 1


def records_of(config: Config, gradients: NDArray[np.float64], units: NDArray[np.uint64], parts: list[str]) -> Split:
    """Training records that carry ``gradients`` float64[n, dim], of ``units`` uint64[n], in ``parts`` (n names)."""
    everyone = carriers(gradients, units)
    rows = {ALL: torch.arange(len(units))}
    for name in config.method.parts:
        rows[name] = torch.tensor([row for row, part in enumerate(parts) if part == name], dtype=torch.int64)
    return Split(everyone, everyone.rows(np.zeros(len(units), dtype=bool)), rows)


def door_of(config: Config, schema: Schema, records: Split, *, noise_multiplier: float, key: bytes) -> NoisedDoor:
    """The run's own door, over records that carry gradients."""
    dim = records.train.inputs.shape[1]
    return private_door(config, schema, records, noise_multiplier=noise_multiplier, key=key, network=carrier(dim))


def stage(config: Config, schema: Schema, state: State) -> Stage:
    """A canary of gradient norm 10 C, in the part of the method's records whose answers it shows in.

    Args:
        config: with noise of its own at the site, or in shares.
        state: what the server sends; it gives the dimension.
    """
    dim = len(state["theta"])
    privacy = config.privacy
    copies = copies_of(config)
    canary = LOUD * privacy.max_grad_norm * np.eye(dim)[:1].repeat(copies, axis=0)
    others = privacy.max_grad_norm * np.eye(dim)[1:3]
    parts = list(config.method.parts) or [ALL]
    found: list[tuple[float, Stage]] = []
    for part in parts:
        around = list(itertools.islice(itertools.cycle(parts), len(others)))
        units = np.r_[np.arange(len(others)), np.full(copies, 9)].astype(np.uint64)
        sides = {
            True: records_of(config, np.vstack([others, canary]), units, around + [part] * copies),
            False: records_of(config, others, units[: len(others)], around),
        }
        moved = exact_update(config, schema, sides[True], state) - exact_update(config, schema, sides[False], state)
        length = float(np.linalg.norm(moved))
        found.append((length, Stage(part, moved / max(length, 1e-300), sides)))
    length, best = max(found, key=lambda one: one[0])
    if length < 1e-12:
        raise ConfigError(f"no canary shows in what method {type(config.method).__name__} sends: it can not be audited")
    return best


def exact_update(config: Config, schema: Schema, records: Split, state: State) -> NDArray[np.float64]:
    """float64[dim]: the update from all records, clipped, with noise a billionth of the clip."""
    dim = records.train.inputs.shape[1]
    door = door_of(everyone_drawn(config), schema, records, noise_multiplier=1e-9, key=bytes(32))
    update, _ = config.method.contribute(state, at_first(config, dim), door)
    return update[0].double().numpy()


def at_first(config: Config, dim: int) -> State:
    """A site's shared state before its first round, for a model of ``dim`` numbers without any parts."""
    everything, nothing = torch.ones(dim, dtype=torch.bool), torch.zeros(dim, dtype=torch.bool)
    return config.method.init_site(torch.zeros(dim), {"head": nothing, "body": everything, "norm": nothing})[0]


def everyone_drawn(config: Config) -> Config:
    """The same run with a sample rate of 1."""
    return msgspec.structs.replace(config, privacy=msgspec.structs.replace(config.privacy, sample_rate=1.0))
