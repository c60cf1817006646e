"""The ``privfed`` command: its groups, its exit codes, its errors."""

import sys
from typing import Annotated

import typer

from . import accountant, audit, consortium, coordinator, data, export, predict, report, run, site, study, watch
from .exits import BAD_USAGE, FAILED, exit_code

try:
    from typer.exceptions import TyperException
except ImportError:  # an older typer, which Flower wants, raises click's own
    from click import ClickException as TyperException  # type: ignore[assignment]

app = typer.Typer(
    name="privfed",
    help="Federated learning that hospitals can sign: differential privacy, secure aggregation, a ledger.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.command)
app.command("study")(study.command)
app.command("watch")(watch.command)
app.command("report")(report.command)
app.command("predict")(predict.command)
app.command("audit")(audit.command)
app.add_typer(accountant.app, name="accountant")
app.add_typer(data.app, name="data")
app.add_typer(export.app, name="export")
app.add_typer(consortium.app, name="consortium")
app.add_typer(site.app, name="site")
app.add_typer(coordinator.app, name="coordinator")


def _version(asked: bool) -> None:
    if asked:
        from privfed import __version__

        typer.echo(f"privfed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


_AFTER = {
    "run": "before the first round nothing was spent; after it go on with privfed run --resume FOLDER (--out, or the "
    "newest in runs/): what was spent stands in its ledger",
    "watch": "the run goes on",
    "export": "what was written stands: give the command again",
    "study": "give the command again to go on: what is done is kept",
    "audit": "no result was recorded unless it says so above: give the command again, its seed makes the same audit",
    "accountant": "no ledger was changed: give the command again",
}


def main() -> None:
    """Run the command line; errors go to stderr with what to do next, and never as a traceback."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except TyperException as error:  # typer brings its own copy of click: click's exceptions are never raised
        code = _say(error.format_message(), BAD_USAGE)
    except BrokenPipeError:
        code = FAILED
    except Exception as error:
        known = exit_code(error)
        if known is None:
            raise
        code = _say(str(error), known)
    if code == 130:  # typer swallows the interrupt itself
        _say(f"interrupted; {_AFTER.get(next(iter(sys.argv[1:]), ''), 'nothing is lost: give the command again')}", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    typer.echo(f"privfed: {message}", err=True)
    return code
