"""The embedded engine: every site in this process, the same bytes that a network would carry."""

from collections.abc import Mapping
from typing import Protocol


class Engine(Protocol):
    """Carries bytes between the coordinator and the sites; it knows nothing of what they mean."""

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        """Send each site its request; give the replies that came within the deadline, by site."""
        ...


class Handler(Protocol):
    """What an engine needs of a site."""

    def handle(self, request: bytes) -> bytes: ...


class LocalEngine:
    """Asks the sites one after the other. Nothing can be late here, so the deadline does not matter."""

    def __init__(self, sites: Mapping[str, Handler]) -> None:
        self._sites = dict(sites)

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        return {name: self._sites[name].handle(request) for name, request in requests.items()}
