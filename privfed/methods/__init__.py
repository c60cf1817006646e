"""Federated methods, one paper a file. A method's frozen settings are the method."""

from .anil import Anil
from .ditto import Ditto
from .fedavg import FedAvg
from .fedbabu import FedBABU
from .fedper import FedPer
from .fedprox import FedProx
from .fedrep import FedRep
from .fedsgd import FedSGD
from .fomaml import Fomaml
from .local import Local
from .local_norm import LocalNorm
from .maml import Maml
from .meta_sgd import MetaSGD
from .method import FederatedMethod, Queries, SingleQuery, State
from .mr_mtl import MRMTL
from .per_fedavg import PerFedAvg
from .pfedme import PFedMe
from .reptile import Reptile
from .scaffold import Scaffold
from .weighted import Weighted

Method = (
    FedAvg
    | FedProx
    | Scaffold
    | MRMTL
    | Ditto
    | Reptile
    | Fomaml
    | PerFedAvg
    | Maml
    | Anil
    | MetaSGD
    | PFedMe
    | FedRep
    | FedPer
    | FedBABU
    | LocalNorm
    | FedSGD
    | Weighted
    | Local
)

__all__ = [
    "MRMTL",
    "Anil",
    "Ditto",
    "FedAvg",
    "FedBABU",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedSGD",
    "FederatedMethod",
    "Fomaml",
    "Local",
    "LocalNorm",
    "Maml",
    "MetaSGD",
    "Method",
    "PFedMe",
    "PerFedAvg",
    "Queries",
    "Reptile",
    "Scaffold",
    "SingleQuery",
    "State",
    "Weighted",
]
