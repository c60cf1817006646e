"""``privfed run``."""

from pathlib import Path
from typing import Annotated

import typer

from .exits import INCOMPLETE


def command(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file. Without one: the main job on the embedded data.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress on stderr.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for the results [default: runs/NAME-TIME]")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="Go on with this ledger: ε composes over runs.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the interrupted run in this folder.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set privacy.target_epsilon=2. Repeatable.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective configuration with comments and stop.")
    ] = False,
) -> None:
    """Train a federation privately and report utility beside ε."""
    from privfed import config_io

    if resume is not None and (config or out or ledger or set_ or print_config):
        raise typer.BadParameter("--resume takes the run's own configuration, folder and ledger: give it alone")
    settings = config_io.load_config(config, set_ or ())
    if print_config:
        typer.echo(config_io.to_toml(settings), nl=False)
        return

    from privfed import api, folder

    from .display import Display

    if resume is None and out is not None:
        folder.require_empty(out)  # before the waiting, not after it
    display = Display(to_stderr=json)
    with display.waiting("reading the records and calibrating the noise"):
        if resume is not None:
            prepared = api.prepare_resumed(resume)
        else:
            prepared = api.prepare(settings)
    display.start(prepared)
    with display:
        if resume is not None:
            result = api.resume(resume, observer=display.round, watch=display.step, prepared=prepared)
        else:
            result = api.run(
                settings, out=out, ledger=ledger, observer=display.round, watch=display.step, prepared=prepared
            )
    if json:
        typer.echo(result.summary.to_json())
    display.finish(result)
    if not result.summary.complete:
        raise typer.Exit(INCOMPLETE)
