"""Models as flat vectors."""

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def to_vector(model: nn.Module) -> Tensor:
    """float32[P]: a copy of the model's parameters, in the order of ``model.parameters()``."""
    return parameters_to_vector(model.parameters()).detach().clone()


def load_vector(model: nn.Module, vector: Tensor) -> None:
    """Write a copy of float32[P] into the model's parameters: what changes them does not change the vector."""
    vector_to_parameters(vector.clone(), model.parameters())


def encode(state: Mapping[str, Tensor]) -> bytes:
    """Named tensors as safetensors bytes: what a site receives. Deterministic for equal tensors."""
    return save({name: tensor.contiguous() for name, tensor in sorted(state.items())})


def decode(data: bytes) -> dict[str, Tensor]:
    """Named tensors from safetensors bytes. The format holds numbers alone: nothing in it can run.

    Raises:
        ValueError: the bytes are not safetensors, or hold a number that is not finite.
    """
    try:
        state = load(data)
    except Exception as error:  # safetensors raises its own SafetensorError and plain ones
        raise ValueError(f"not a safetensors message: {type(error).__name__}") from None
    if not all(tensor.dtype in (torch.float32, torch.float64, torch.int64) for tensor in state.values()):
        raise ValueError("the model holds numbers of an unknown kind")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise ValueError("the model holds numbers that are not finite")
    return state
