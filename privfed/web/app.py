"""The server's side of the page: five read-only addresses behind a token, and who waits for a change."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from privfed.errors import PrivfedError
from privfed.watching import View, Watcher

from .page import Renderer
from .visitors import ADMIT

LOOK_SECONDS = 0.5
_PING_SECONDS = 15
_MOST_AT_ONCE = 64  # requests with the token; a page that is open has one
_SEND_SECONDS = 10.0  # a browser that takes nothing for so long has left

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Board:
    """What the page shows now, looked up once for all who watch.

    Args:
        ending: whether the server is about to end, and streams with it.
    """

    def __init__(self, watcher: Watcher, ending: Callable[[], bool] = lambda: False) -> None:
        self._watcher, self._ending = watcher, ending
        self._renderer = Renderer()
        self._shown: tuple[View, int, bool] | None = None
        self._changed = asyncio.Condition()
        self.parts: Mapping[str, str] = {}

    def page(self) -> str:
        return self._renderer.page(self._watcher.path.name, self.parts)

    async def refresh(self) -> None:
        """Look once, beside the server's own work, and tell who waits."""
        parts = await anyio.to_thread.run_sync(self._look)
        if parts != self.parts or self._ending():
            async with self._changed:
                self.parts = parts
                self._changed.notify_all()

    async def keep(self) -> None:
        """Look again and again."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            await self.refresh()

    async def follow(self) -> AsyncIterator[ServerSentEvent]:
        """All parts, then those that change. Who is slow gets the newest, and nothing is kept for them."""
        sent: Mapping[str, str] = {}
        while not self._ending():
            parts = self.parts
            for name, text in parts.items():
                if sent.get(name) != text:
                    yield ServerSentEvent(data=text, event=name)
            sent = parts
            async with self._changed:
                while self.parts is sent and not self._ending():
                    await self._changed.wait()

    def _look(self) -> Mapping[str, str]:
        try:
            view = self._watcher.look()
            shown = (view, len(self._watcher.rows), self._watcher.summary is not None)
            if shown == self._shown:
                return self.parts
            self._shown = shown
            return self._renderer.parts(self._watcher, view)
        except (PrivfedError, OSError) as error:
            self._shown = None
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            path = self._watcher.path
            return self._renderer.broken(path.name, reason.replace(str(path), path.name))


def app(
    watcher: Watcher, *, token: str, hosts: Sequence[str], ending: Callable[[], bool] = lambda: False
) -> Callable[..., Any]:
    """The ASGI application.

    Args:
        token: the first part of every address.
        hosts: names in requests that it answers to.
        ending: as of `Board`.

    Guarantees:
        Nothing is changed by any request: other methods than GET and HEAD are refused. Without the token, or under
        another name of this machine (DNS rebinding), nothing is told. The page loads from here alone and runs no script
        but its own (Content-Security-Policy).
    """
    board = Board(watcher, ending)

    async def page(request: Request) -> Response:
        return HTMLResponse(board.page())

    async def events(request: Request) -> Response:
        return EventSourceResponse(board.follow(), ping=_PING_SECONDS, send_timeout=_SEND_SECONDS)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await board.refresh()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(board.keep)
            yield
            tasks.cancel_scope.cancel()

    routes = [Route("/", page), Route("/events", events), *map(_file, ("style.css", "watch.js", "icon.svg"))]
    inside: Callable[..., Any] = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(_guarded, token=token),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
    )
    return inside


def _file(name: str) -> Route:
    kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
    own = files("privfed.web") / "templates"
    text = (own / name.replace("style", "watch")).read_text(encoding="utf-8")
    if name == "style.css":  # the report's own look, and what moves on top
        text = (files("privfed.report") / "templates" / "report.css").read_text(encoding="utf-8") + text

    async def answer(request: Request) -> Response:
        return Response(text, media_type=kind)

    return Route(f"/{name}", answer)


def _guarded(inner: Any, token: str) -> Any:
    """Asks every request for the token, and gives every answer its headers."""
    under_way = 0

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in known]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        given, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(given.encode(), token.encode()):
            await PlainTextResponse("nothing is here", status_code=404)(scope, receive, sending)
            return
        nonlocal under_way
        if under_way >= _MOST_AT_ONCE:
            await PlainTextResponse("too many look on", status_code=503)(scope, receive, sending)
            return
        scope.get("state", {}).get(ADMIT, lambda: None)()
        under_way += 1
        try:
            await inner({**scope, "path": f"/{rest}"}, receive, sending)
        finally:
            under_way -= 1

    return guarded
