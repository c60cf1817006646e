"""The network that a run starts from, read from a file that is known by its digest."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from privfed.data.files import find_file
from privfed.errors import ConfigError, DataError
from privfed.models import pieces
from privfed.parameters import decode


def digest_of(file: str) -> str:
    """The SHA-256 of a file, hexadecimal.

    Raises:
        DataError: it is not there.
    """
    with find_file(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def require_digest(file: str, sha256: str | None, key: str) -> None:
    """Return if the file is the one that the configuration names: of this machine's own user, who may learn its digest.

    Raises:
        ConfigError: it is another one, or none is named.
    """
    found = digest_of(file)
    if found != sha256:
        raise ConfigError(f"{key} must be the SHA-256 of {file!r}: set {key} = {found!r}")


@lru_cache(maxsize=4)
def tensors_of(file: str, sha256: str) -> Mapping[str, Tensor]:
    """The named tensors of a safetensors file, which holds numbers alone: nothing in it can run.

    Raises:
        DataError: there is no such file, or it is another one. One message for both: a plan may name any file.
    """
    try:
        data = find_file(file).read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return decode(data)
    except (DataError, ValueError, OSError):
        pass
    raise DataError("transfer.base is not here, or is not the file that transfer.sha256 names")


def told_by(file: str) -> dict[str, Any]:
    """What the file says of the run that made it: its name, and what it claimed for its records; empty without."""
    with safe_open(find_file(file), framework="pt") as opened:
        facts = opened.metadata() or {}
    try:
        return {"run": facts["run"], **json.loads(facts["claim"])} if "claim" in facts else {}
    except (KeyError, ValueError, TypeError):
        return {}


def start_from(network: nn.Module, tensors: Mapping[str, Tensor], *, fresh_head: bool) -> None:
    """Give the network the base's parameters, by name; with ``fresh_head`` all but the last layer's.

    Raises:
        ConfigError: they are another network's; names the first that does not fit.
    """
    parts = [part for part, _ in pieces(network)]
    with torch.no_grad():
        for part, (name, parameter) in zip(parts, network.named_parameters(), strict=True):
            if fresh_head and part == "head":
                continue
            found = tensors.get(name)
            if found is None or found.shape != parameter.shape:
                shape, other = list(parameter.shape), "has none" if found is None else f"has shape {list(found.shape)}"
                remedy = "set transfer.fresh_head = true" if part == "head" else "set [model] as the base was made"
                raise ConfigError(
                    f"transfer.base: the network's {name!r} has shape {shape}, the base {other}: {remedy}"
                )
            parameter.copy_(found)
