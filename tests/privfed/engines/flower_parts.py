"""What the engines' suite has Flower run: a server that exchanges for the test, and a site that echoes."""

import ast
import json
from collections.abc import Mapping
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privfed.engines.flower import FlowerEngine, client_app
from tests.privfed.engines.echo import Echo

server = ServerApp()


@server.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Grid, context: Context) -> None:
    """Hands the suite's exchanges to the engine, through a socket in the folder that the run names."""
    home = Path(str(context.run_config["home"]))
    engine = FlowerEngine(grid, json.loads((home / "nodes.json").read_text()))
    with Listener(str(home / "exchange.socket"), family="AF_UNIX") as listener, listener.accept() as connection:
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            result = getattr(engine, method)(*arguments)
            connection.send(dict(result) if method == "exchange" else result)


def answer(node: Mapping[str, Any], request: bytes, kept: bytes) -> tuple[bytes, bytes]:
    """Of a site that remembers what it has seen as Flower lets it: in what is kept for it."""
    echo = Echo(str(node["site"]))
    echo._seen = ast.literal_eval(kept.decode() or "[0]")
    reply = echo.handle(request)
    return reply, repr(echo._seen).encode()


client = client_app(answer)
