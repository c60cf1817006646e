"""What the engines' suite has FLARE run: a controller that exchanges for the test, and a site that echoes."""

from multiprocessing.connection import Listener
from pathlib import Path

from privfed.engines.contract import Handler
from privfed.engines.nvflare import ExchangeController, ExchangeExecutor, FlareEngine
from tests.privfed.engines.echo import Echo


class RemoteControlled(ExchangeController):
    """Hands the suite's exchanges to the engine, through a socket in the job's text."""

    def coordinate(self, engine: FlareEngine, job: str, local: Path) -> None:
        with Listener(job.strip(), family="AF_UNIX") as listener, listener.accept() as connection:
            while not engine.stopped:
                try:
                    method, arguments = connection.recv()
                except EOFError:
                    return
                result = getattr(engine, method)(*arguments)
                connection.send(dict(result) if method == "exchange" else result)


class Echoing(ExchangeExecutor):
    def open_handler(self, site: str, job: str, local: Path) -> Handler:
        return Echo(site)
