"""Connections of the page: who has shown the token keeps one, and the others can not fill the room."""

from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_STRANGERS = 64
"""Connections that have not asked with the token yet; the oldest of more has to go."""

ADMIT = "admit"
"""In the state of a request: call it when the token is right."""


def visitors() -> Any:
    """What makes the connections of one server.

    Guarantees:
        A new connection is always taken, however many are held open by whoever does not know the token: without a
        word, with half a request, or with one that is refused. The newest `MOST_STRANGERS` of them are kept.
    """
    return partial(_Visitor, {})


class _Visitor(H11Protocol):  # type: ignore[misc, unused-ignore]  # uvicorn may not be installed
    def __init__(self, strangers: "dict[_Visitor, None]", **given: Any) -> None:
        super().__init__(**given)
        self._strangers = strangers  # in the order in which they came
        self.app_state = {**self.app_state, ADMIT: lambda: strangers.pop(self, None)}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._strangers[self] = None
        if len(self._strangers) > MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._strangers.pop(self, None)
        super().connection_lost(exc)
