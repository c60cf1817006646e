"""A network of the user's own."""

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from torch import nn

from privfed.errors import ConfigError

from .network import Inputs, seeded


class Factory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="factory"):
    """``module:factory``, imported from the machine that runs it: ``factory(inputs: int, outputs: int) -> nn.Module``.

    The module maps float32[B, inputs] to float32[B, outputs]. Only the name travels, never code; a site imports what
    its own policy trusts (``policy.trusted``) and nothing else.
    """

    factory: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$",
            description='"module:factory" on the import path of each party; called with (inputs, outputs)',
        ),
    ]

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Module:
        with seeded(seed):
            network = imported(self.factory, "model.factory")(inputs.features, outputs)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model.factory = {self.factory!r} gave a {type(network).__name__}, not an nn.Module")
        if not any(True for _ in network.parameters()):
            raise ConfigError(f"model.factory = {self.factory!r} gave a network without parameters")
        return network


def imported(name: str, key: str) -> Callable[..., Any]:
    """What ``module:attribute`` names.

    Raises:
        ConfigError: it is not there, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"{key} = {name!r}: can not import it ({error}); have its folder on PYTHONPATH") from None
    if not callable(found):
        raise ConfigError(f"{key} = {name!r}: module {module!r} has no function {attribute!r}")
    result: Callable[..., Any] = found
    return result
