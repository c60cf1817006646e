"""Privacy-focused federated learning.

>>> import privfed
>>> result = privfed.run(privfed.load_config())  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Run, resume, run
    from .config import Config
    from .config_io import load_config

__version__ = "0.1.0"
__all__ = ["Config", "Run", "__version__", "load_config", "resume", "run"]

_HOMES = {"Run": ".api", "run": ".api", "resume": ".api", "Config": ".config", "load_config": ".config_io"}


def __getattr__(name: str) -> Any:
    # Lazy: `import privfed` must not pull in torch, so that `privfed --help` answers at once.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
