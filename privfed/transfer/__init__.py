"""Transfer learning: where a network comes from, and what of it a run trains. One way a file."""

from .adapters import LowRank
from .everything import Everything
from .last_layers import LastLayers

Transfer = Everything | LastLayers | LowRank

__all__ = ["Everything", "LastLayers", "LowRank", "Transfer"]
