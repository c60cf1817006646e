"""The two sides that every engine connects; what it promises stands in the package's docstring."""

from collections.abc import Mapping
from typing import Protocol


class Engine(Protocol):
    """Carries bytes between the coordinator and the sites; it knows nothing of what they mean."""

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        """Send each site its request; give the replies that came within the deadline, by site."""
        ...


class Handler(Protocol):
    """What an engine needs of a site. It answers whatever bytes come, and never raises."""

    def handle(self, request: bytes) -> bytes: ...
