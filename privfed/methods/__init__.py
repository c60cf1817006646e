"""Federated methods, one paper a file. A method's frozen settings are the method."""

from .fedavg import FedAvg
from .fedsgd import FedSGD
from .fomaml import Fomaml
from .local import Local
from .method import FederatedMethod, Queries, SingleQuery, State
from .reptile import Reptile

__all__ = ["FedAvg", "FedSGD", "FederatedMethod", "Fomaml", "Local", "Queries", "Reptile", "SingleQuery", "State"]
