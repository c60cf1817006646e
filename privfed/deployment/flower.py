"""What runs of a consortium over Flower name: the coordinator as a ServerApp, a site as a ClientApp.

A site's folder stands in its SuperNode's own configuration, the coordinator's in the run's: ``privfed = "/a/folder"``.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privfed import config_io
from privfed.engines.flower import FlowerEngine, client_app
from privfed.folder import RunFolder
from privfed.summary import Summary

from . import files, papers, runs, woken
from .blocks import JOIN_SECONDS, Block, do_block
from .consortium import Consortium
from .files import DeploymentError

HOME, EXPERIMENT, RUN = "privfed", "experiment", "run"
_ALL_ROUNDS = 100_000

logger = logging.getLogger(__name__)
server = ServerApp()


@server.main()  # type: ignore[untyped-decorator, unused-ignore]  # Flower may not be installed
def main(grid: Grid, context: Context) -> None:
    """A run, to its end: a new one of the experiment, else the one named, else the latest, where it stands."""
    config = {key: str(context.run_config.get(key, "")) for key in (HOME, EXPERIMENT, RUN)}
    coordinate(grid, Path(config[HOME]), experiment=config[EXPERIMENT], run=config[RUN])


def coordinate(grid: Grid, home: Path, *, experiment: str = "", run: str = "") -> Summary:
    """As of `main`.

    Args:
        home: the coordinator's folder.
        experiment: path of a TOML file at the coordinator.

    Raises:
        PrivfedError: why it can not go on; what is done stays done.
    """
    consortium = Consortium(home.absolute())
    papers.require_engine(consortium.terms.engine, "flower")
    found = runs.begin(consortium, config_io.load_config(Path(experiment))) if experiment else None
    found = found or runs.find(consortium, run or None)
    engine = FlowerEngine(grid, _nodes(consortium))
    logger.info("run %s", found.path.name)
    with files.locked(found.path / runs.DRIVER, str(found.path)):
        (found.path / runs.STOP).unlink(missing_ok=True)
        block = Block(found.path.name, _ALL_ROUNDS)
        do_block(consortium, block, engine, lambda sites: engine.wait_for(sites, JOIN_SECONDS))
    return _finished(found)


def _nodes(consortium: Consortium) -> dict[str, int]:
    """The nodes of those in the roster: nobody else is asked for anything."""
    nodes = consortium.nodes
    members = [member.name for member in runs.roster_of(consortium).members]
    if missing := [name for name in members if name not in nodes]:
        raise DeploymentError(
            f"nobody said which Flower node is {missing[0]}'s: privfed consortium node {consortium.home} "
            f"{missing[0]} NUMBER"
        )
    return {name: nodes[name] for name in members}


def _finished(found: RunFolder) -> Summary:
    summary = runs.finished(found)
    if summary is None:
        raise DeploymentError(f"the run {found.path.name} was stopped: start one with {RUN} = its name to go on")
    return summary


def answer(node: Mapping[str, Any], request: bytes, deposit: bytes) -> tuple[bytes, bytes]:
    """What a site answers; see `woken.answer`."""
    torch.set_num_threads(1)
    os.umask(0o077)
    home = node.get(HOME)
    if not isinstance(home, str) or not home:
        raise DeploymentError(f"this node does not know its site: start it with --node-config '{HOME}=\"FOLDER\"'")
    return woken.answer(Path(home), request, deposit)


client = client_app(answer)
