"""Parameters that are none any more."""

from torch import nn


def freeze(network: nn.Module) -> nn.Module:
    """The network with constants in the place of its parameters.

    Constants and not parameters without gradient: those would still stand in every parameter vector, and switching them
    under one Opacus module raises.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return network.eval()
