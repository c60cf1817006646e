"""The embedded engine: every site in this process, the same bytes that a network would carry."""

from collections.abc import Mapping

from .contract import Handler


class LocalEngine:
    """Asks the sites one after the other. Nothing can be late here, so the deadline does not matter."""

    def __init__(self, sites: Mapping[str, Handler]) -> None:
        self._sites = dict(sites)

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        here = {name: request for name, request in requests.items() if name in self._sites}
        return {name: self._sites[name].handle(request) for name, request in here.items()}
