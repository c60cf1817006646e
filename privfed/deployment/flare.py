"""What a job of ours names: the coordinator in the server's job process, a site in its own. Nothing else may run."""

import logging
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from privfed import wire
from privfed.engines.contract import Handler
from privfed.engines.nvflare import EngineStopped, ExchangeController, ExchangeExecutor, FlareEngine
from privfed.errors import PrivfedError

from . import files, kits, preflight
from .blocks import JOIN_SECONDS, Block, do_block
from .consortium import LAST, Consortium
from .history import Reminded
from .hospital import Hospital
from .inspection import Inspector, Order
from .signed import SignedHandler, SigningEngine, coordinator_key, reminding

LEAVE_SECONDS = 20.0
"""How long an earlier job of the same site may take to end."""

logger = logging.getLogger(__name__)


class CoordinatorController(ExchangeController):
    """One block of rounds. Its own folder has everything; the job says but which run, and how many rounds."""

    def coordinate(self, engine: FlareEngine, job: str, local: Path) -> None:
        home = kits.owner_of(local)

        if (order := _preflight(job)) is not None:
            with suppress(EngineStopped):
                consortium = Consortium(home)
                signing = SigningEngine(engine, consortium.terms, coordinator_key(home))
                preflight.answer(consortium, order, signing, lambda sites: engine.wait_for(sites, JOIN_SECONDS))
            return
        note(home, "")
        try:
            block = files.parse_toml(job.encode(), Block, "the job")
            with reminding(engine, Consortium(home)) as signing:
                do_block(Consortium(home), block, signing, lambda sites: engine.wait_for(sites, block.join_seconds))
        except EngineStopped:
            logger.info("the block was ended")
        except PrivfedError as error:
            logger.error("the block ended: %s", error)
            note(home, str(error))
        except Exception as error:
            note(home, f"unexpected {type(error).__name__} at the coordinator: see the server's log")
            raise


class SiteExecutor(ExchangeExecutor):
    """A site, for as long as a job runs. Of what the job says one thing counts: whether it has rounds, or but looks."""

    def open_handler(self, site: str, job: str, local: Path) -> Handler:
        torch.set_num_threads(1)
        self._open = ExitStack()
        try:
            home = kits.owner_of(local)
            hospital = _own(home, site)
            if _preflight(job) is not None:
                return SignedHandler(Inspector(lambda: _own(home, site)), hospital.terms, site)
            opened = self._open.enter_context(hospital.opened(wait_seconds=LEAVE_SECONDS))
            return SignedHandler(opened, hospital.terms, site, admit=Reminded(hospital))
        except Exception as error:  # the others go on without this site, and its people find out why
            self._open.close()
            # It may name local files: they stay in this log
            reason = str(error) if isinstance(error, PrivfedError | ValueError) else type(error).__name__
            logger.error("this site can not work: %s", reason)
            return Refusing("the site can not open its own folder; its log says why")

    def close_handler(self) -> None:
        self._open.close()


def _own(home: Path, site: str) -> Hospital:
    """The site in this folder, if the certificate is its own. Raises `DeploymentError`."""
    hospital = Hospital.open(home)
    if hospital.file.name != site:
        raise files.DeploymentError("the certificate is of another site than this folder")
    return hospital


class Refusing:
    """Answers everything with one reason."""

    def __init__(self, reason: str) -> None:
        self._reply = wire.encode(wire.Refusal("error", reason, final=False))

    def handle(self, request: bytes) -> bytes:
        return self._reply


def _preflight(job: str) -> Order | None:
    """The order of a job that looks at the sites; None of one with rounds."""
    with suppress(files.DeploymentError):
        return files.parse_toml(job.encode(), Order, "the job")
    return None


def note(home: Path, reason: str) -> None:
    """Leave word for `privfed coordinator` of why a block ended."""
    files.write(home / LAST, (reason + "\n").encode())
