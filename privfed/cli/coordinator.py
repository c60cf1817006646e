"""``privfed coordinator``: the server and the runs of a consortium."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import watch
from .exits import FAILED, INCOMPLETE
from .output import print_json

if TYPE_CHECKING:
    from privfed.federation import RoundReport

app = typer.Typer(help="Run a consortium's server and its experiments.", no_args_is_help=True, rich_markup_mode=None)

Home = Annotated[Path, typer.Argument(help="The coordinator's folder.")]
Name = Annotated[str | None, typer.Argument(help="A run's name [default: the latest]")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Block = Annotated[int, typer.Option("--block", min=1, help="Rounds in a job: a site that was away joins the next one.")]

Join = Annotated[
    int, typer.Option("--join-seconds", min=1, help="How long a job waits for sites to come before its first round.")
]


@app.command()
def start(
    home: Home,
    address: Annotated[
        str | None, typer.Option("--address", help="The one address to listen on [default: 127.0.0.1 for localhost]")
    ] = None,
) -> None:
    """Run the server until the process is ended."""
    from privfed.deployment import kits, papers, processes
    from privfed.deployment.consortium import ORGANISATION, SERVER, Consortium
    from privfed.deployment.files import DeploymentError

    consortium = Consortium(home.absolute())
    papers.require_engine(consortium.terms.engine, "nvflare")
    if address is None and consortium.terms.host != "localhost":
        raise DeploymentError(f"{consortium.terms.host} is not this machine alone: say where to listen with --address")
    kits.harden(consortium.home / SERVER, "server", consortium.home)
    typer.echo(f"the server waits for sites until it is stopped; its log: {consortium.home / SERVER}/log.txt")
    processes.become(
        processes.server_command(consortium.home / SERVER, organisation=ORGANISATION, address=address or "127.0.0.1")
    )


@app.command()
def preflight(
    home: Home,
    experiment: Annotated[Path | None, typer.Argument(help="A TOML file that is to be run.")] = None,
    json: Json = False,
) -> None:
    """Check certificates, clocks, versions, tables and connections, and have all sites add up zeros. Spends nothing."""
    from privfed import config_io
    from privfed.deployment.consortium import Consortium
    from privfed.deployment.papers import require_engine
    from privfed.deployment.preflight import check

    from .deployment import show

    require_engine(Consortium(home.absolute()).terms.engine, "nvflare")
    config = config_io.load_config(experiment) if experiment else None
    findings = check(Consortium(home.absolute()), config, waiting=lambda what: typer.echo(f"{what} …", err=True))
    if json:
        print_json(findings)
    else:
        show(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def submit(
    home: Home,
    experiment: Annotated[Path, typer.Argument(help="A TOML file, as for privfed run.")],
    block: Block = 10,
    join_seconds: Join = 30,
    json: Json = False,
) -> None:
    """Begin a run and do it to its end. Ended in between, it goes on with resume."""
    from privfed import config_io
    from privfed.deployment import papers, runs
    from privfed.deployment.consortium import Consortium

    consortium = Consortium(home.absolute())
    papers.require_engine(consortium.terms.engine, "nvflare")
    made = runs.begin(consortium, config_io.load_config(experiment))
    typer.echo(f"run {made.path.name}", err=True)
    _drive(home, made.path.name, block, join_seconds, json)


@app.command()
def resume(home: Home, run: Name = None, block: Block = 10, join_seconds: Join = 30, json: Json = False) -> None:
    """Go on with a run where its checkpoint stands."""
    _drive(home, run, block, join_seconds, json)


@app.command("watch")
def watch_run(
    home: Home,
    run: Name = None,
    once: watch.Once = False,
    json: watch.Json = False,
    web: watch.Web = False,
    port: watch.Port = None,
    host: watch.Host = None,
    allow_remote: watch.Remote = False,
) -> None:
    """Follow a run until it is over: round, phase, sites, ε, accuracy, faults. It asks no site for anything."""
    from privfed.deployment import runs
    from privfed.deployment.consortium import Consortium
    from privfed.deployment.watching import watcher

    page = watch.page_options(web, port, host, allow_remote)
    consortium = Consortium(home.absolute())
    found = runs.find(consortium, run)
    resume = f"privfed coordinator resume {home} {found.path.name}"
    watch.look_on(watcher(consortium, found), once=once, json=json, page=page, resume=resume)


@app.command()
def stop(home: Home, run: Name = None) -> None:
    """End a run after the round that is under way."""
    from privfed.deployment import files, runs
    from privfed.deployment.consortium import Consortium

    found = runs.find(Consortium(home.absolute()), run)
    files.write(found.path / runs.STOP, b"")
    typer.echo(f"{found.path.name} ends after this round; privfed coordinator resume goes on")


def _drive(home: Path, run: str | None, block: int, join_seconds: int, json: bool) -> None:
    from privfed.deployment import papers, runs, submission
    from privfed.deployment.consortium import Consortium

    consortium = Consortium(home.absolute())
    papers.require_engine(consortium.terms.engine, "nvflare")
    found = runs.find(consortium, run)
    summary = submission.drive(consortium, found, block=block, join_seconds=join_seconds, observer=_tell)
    if json:
        typer.echo(summary.to_json())
    watch.finish(found.path, summary)
    if not summary.complete:
        raise typer.Exit(INCOMPLETE)


def _tell(report: "RoundReport") -> None:
    from privfed.watching import row_of

    typer.echo(watch.line(row_of(report)), err=True)
