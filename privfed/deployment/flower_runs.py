"""Both sides of a run over Flower, once a process that is for one of them has begun."""

import logging
import os
from pathlib import Path

import torch
from flwr.serverapp import Grid

from privfed import config_io
from privfed.engines.flower import FlowerEngine
from privfed.folder import RunFolder
from privfed.summary import Summary

from . import files, papers, runs, woken
from .blocks import JOIN_SECONDS, Block, do_block
from .consortium import Consortium
from .files import DeploymentError
from .signed import reminding

_ALL_ROUNDS = 100_000

logger = logging.getLogger(__name__)


def coordinate(grid: Grid, home: Path, *, experiment: str = "", run: str = "") -> Summary:
    """A run, to its end: a new one of the experiment, else the one named, else the latest, where it stands.

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
        with reminding(engine, consortium) as signing:
            do_block(consortium, block, signing, lambda sites: engine.wait_for(sites, JOIN_SECONDS))
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
        raise DeploymentError(f"the run {found.path.name} was stopped: start one with run = its name to go on")
    return summary


def answer_here(home: Path, request: bytes, deposit: bytes) -> tuple[bytes, bytes]:
    """`woken.answer_signed`, in a process of Flower's."""
    torch.set_num_threads(1)
    os.umask(0o077)
    return woken.answer_signed(home, request, deposit)
