"""The two sides that every engine connects; what it promises stands in the package's docstring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


class Engine(Protocol):
    """Carries bytes between the coordinator and the sites; it knows nothing of what they mean."""

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        """Send each site its request; give the replies that came within the deadline, by site.

        A request may be made as it is taken: take each once, and keep no more of them than are under way.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work on many sites is.

    Attributes:
        what: the work, for people.
        done, of: sites.
    """

    what: str
    done: int
    of: int


Watch = Callable[[Progress], None]


class Handler(Protocol):
    """What an engine needs of a site. It answers whatever bytes come, and never raises."""

    def handle(self, request: bytes) -> bytes: ...
