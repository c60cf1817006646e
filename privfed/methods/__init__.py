"""Federated methods, one paper a file. A method's frozen settings are the method."""

from .fedavg import FedAvg
from .fomaml import Fomaml
from .local import Local
from .method import FederatedMethod, Queries, State
from .reptile import Reptile

__all__ = ["FedAvg", "FederatedMethod", "Fomaml", "Local", "Queries", "Reptile", "State"]
