"""What runs of a consortium over Flower name: the coordinator as a ServerApp, a site as a ClientApp.

Each side's place stands in its own configuration: the coordinator's folder in the run's, a site's in its SuperNode's,
as ``privfed = "/a/folder"`` or, better, as ``privfed-socket = "/a/socket"`` at which `privfed site serve` answers.
Flower starts a process for each message: nothing is imported here that a relay does not need.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privfed.engines import relay
from privfed.engines.flower import client_app
from privfed.errors import PrivfedError

HOME, SOCKET, EXPERIMENT, RUN = "privfed", "privfed-socket", "experiment", "run"

server = ServerApp()


@server.main()  # type: ignore[untyped-decorator, unused-ignore]  # Flower may not be installed
def main(grid: Grid, context: Context) -> None:
    """A run, to its end: a new one of the experiment, else the one named, else the latest, where it stands."""
    from .flower_runs import coordinate

    config = {key: str(context.run_config.get(key, "")) for key in (HOME, EXPERIMENT, RUN)}
    coordinate(grid, Path(config[HOME]), experiment=config[EXPERIMENT], run=config[RUN])


def answer(node: Mapping[str, Any], request: bytes, deposit: bytes) -> tuple[bytes, bytes]:
    """What this node's site answers; see `woken.answer`."""
    if at := node.get(SOCKET):
        return relay.ask(Path(str(at)), request, deposit)
    if at := node.get(HOME):
        from .flower_runs import answer_here

        return answer_here(Path(str(at)), request, deposit)
    raise PrivfedError(f"this node does not know its site: start it with --node-config '{SOCKET}=\"PATH\"'")


client = client_app(answer)
