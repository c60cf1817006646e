"""Networks, one kind a file, and which of their parameters are what."""

from .cnn import CNN
from .embedding import Embedding
from .factory import Factory
from .layout import Layout, Part, layout, pieces
from .mlp import MLP, mlp
from .network import Inputs
from .signal import Signal

Network = MLP | CNN | Signal | Embedding | Factory

__all__ = [
    "CNN",
    "MLP",
    "Embedding",
    "Factory",
    "Inputs",
    "Layout",
    "Network",
    "Part",
    "Signal",
    "layout",
    "mlp",
    "pieces",
]
