"""The network that a configuration comes to: its pieces, its start, its size, and what of it leaves a site.

A site and the coordinator derive the same from the same configuration. Nothing here has seen a record.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import torch
from torch import Tensor, nn

from .config import Config
from .errors import ConfigError
from .methods import State
from .models import Factory, Inputs, Layout, Part, layout, pieces
from .models import Network as Kind
from .models.network import seeded
from .parameters import load_vector, to_vector
from .transfer import Everything, Transfer
from .transfer.base import start_from, tensors_of


@dataclass(frozen=True)
class Schema:
    """What is public about every site's table.

    Args:
        features: the model's inputs.
        classes: what it tells apart; 0 where the task has none.
        ranges: [low, high] of each input; empty where nobody needs them.
    """

    features: int
    classes: int
    ranges: tuple[tuple[float, float], ...] = ()


def build_model(config: Config, schema: Schema) -> nn.Module:
    """What the run trains, at its public start parameters: for records that `divided`'s first half has seen, if any."""
    return divided(config, schema)[1]


def divided(config: Config, schema: Schema) -> tuple[nn.Module | None, nn.Module]:
    """What records pass first, if anything; and what is trained on what it gives. See `Everything.divided`."""
    whole = whole_network(config, schema)
    if config.transfer.base is not None:
        start_from(
            whole,
            tensors_of(config.transfer.base, config.transfer.sha256 or ""),
            fresh_head=config.transfer.fresh_head,
        )
    with seeded(config.seed):
        return config.transfer.divided(whole)


def whole_network(config: Config, schema: Schema) -> nn.Module:
    """The network of ``[model]``, whatever of it is trained."""
    return config.model.build(inputs_of(config, schema.features), outputs_of(config, schema), seed=config.seed)


def start_vector(config: Config, schema: Schema) -> Tensor:
    """float32[P]: the public start parameters of what the run trains; the caller's own copy."""
    return _start(msgspec.msgpack.encode(config), schema).clone()


@lru_cache(maxsize=4)  # all sites of a simulation start alike
def _start(encoded: bytes, schema: Schema) -> Tensor:
    return to_vector(build_model(msgspec.msgpack.decode(encoded, type=Config), schema))


def finished(config: Config, schema: Schema, theta: Tensor) -> nn.Module:
    """The whole network with what was trained, float32[P], in it: it takes records as they are."""
    return finisher(config, schema)(theta)


def finisher(config: Config, schema: Schema) -> Callable[[Tensor], nn.Module]:
    """`finished` of one vector after the other. It gives the same network each time, refilled."""
    whole, trained = whole_network(config, schema), build_model(config, schema)
    if config.transfer.base is not None:
        start_from(whole, tensors_of(config.transfer.base, config.transfer.sha256 or ""), fresh_head=True)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}

    def refilled(theta: Tensor) -> nn.Module:
        whole.load_state_dict(start)  # whoever had it last may have changed it
        load_vector(trained, theta)
        config.transfer.merge(trained, whole)
        return whole

    return refilled


def opened(config: Config) -> tuple[str, ...]:
    """What a party imports or reads because the configuration names it, as ``policy.trusted`` lists it."""
    transfer = config.transfer
    named = [config.model.factory] if isinstance(config.model, Factory) else []
    named += [transfer.sha256 or transfer.base] if transfer.base is not None else []
    if transfer.public_source is not None:
        named.append(transfer.source_sha256 or "transfer.public_source")
    return tuple(named)


def inputs_of(config: Config, features: int) -> Inputs:
    """What the run's network is told of its ``features``."""
    return Inputs(features, config.data.items_at)


def outputs_of(config: Config, schema: Schema) -> int:
    """How many outputs the run's network has."""
    return config.task.outputs(schema.classes)


@lru_cache(maxsize=64)
def _pieces(model: Kind, transfer: Transfer, inputs: Inputs, outputs: int) -> tuple[tuple[Part, int], ...]:
    """Part and size of each parameter that is trained. On the meta device, where a network takes no room."""
    with torch.device("meta"):
        return pieces(transfer.trained(model.build(inputs, outputs, seed=0)))


def parameter_count(config: Config, schema: Schema) -> int:
    """How many parameters the run trains, without building its network."""
    inputs, outputs = inputs_of(config, schema.features), outputs_of(config, schema)
    return sum(size for _, size in _pieces(config.model, _way(config), inputs, outputs))


def _way(config: Config) -> Transfer:
    """What of the network is trained, without the files that it starts from."""
    return msgspec.structs.replace(config.transfer, base=None, public_source=None)


def network_size(config: Config, schema: Schema) -> int:
    """How many parameters the run's network has in all, trained or not, without building it."""
    inputs, outputs = inputs_of(config, schema.features), outputs_of(config, schema)
    return sum(size for _, size in _pieces(config.model, Everything(), inputs, outputs))


def model_layout(config: Config, features: int, parameters: int) -> Layout:
    """Which of the ``parameters`` of the run's network are its head, its body and its normalisation.

    Raises:
        ValueError: the run's network has another number of them.
    """
    outputs = config.task.outputs(len(config.data.classes))
    found = _pieces(config.model, _way(config), inputs_of(config, features), outputs)
    if (size := sum(size for _, size in found)) != parameters:
        raise ValueError(f"the run's network has {size} parameters, not {parameters}")
    return layout(found)


def first_states(config: Config, schema: Schema) -> tuple[State, State]:
    """A site's shared and private state before its first round: the same at every site."""
    start = start_vector(config, schema)
    return config.method.init_site(start, model_layout(config, schema.features, len(start)))


def _name(config: Config) -> str:
    """The method's, as a user types it."""
    return str(type(config.method).__struct_config__.tag)


def sent(config: Config, features: int, parameters: int) -> Tensor:
    """bool[method.blocks · P]: what of an update leaves the site.

    Raises:
        ConfigError: the model has none of a part that stays, or nothing else.
    """
    parts = model_layout(config, features, parameters)
    leaves = torch.ones(parameters, dtype=torch.bool)
    for part in config.method.stays:
        leaves &= ~parts[part]
        if not parts[part].any():
            raise ConfigError(
                f"method {_name(config)!r} keeps the model's {part} at the sites, and this model has "
                "none: set model.hidden and model.norm = 'group', or a model.name with GroupNorm"
            )
    if not leaves.any():
        raise ConfigError(
            f"method {_name(config)!r} keeps the model's last layer at the sites, and this model has no "
            "other: set model.hidden"
        )
    return leaves.repeat(config.method.blocks)


def update_size(config: Config, features: int, parameters: int) -> int:
    """How many numbers an update of a network of ``parameters`` has."""
    return int(sent(config, features, parameters).sum())
