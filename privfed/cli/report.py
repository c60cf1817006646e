"""``privfed report``."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write the page [default: RUN/report.html]")
    ] = None,
) -> None:
    """Make the page about a run again, from its folder alone."""
    from privfed import report
    from privfed.errors import RunFolderError
    from privfed.folder import REPORT, RunFolder

    page = report.render(run)
    target = out if out is not None else run / REPORT
    try:
        RunFolder(target.parent).write(target.name, page)
    except OSError as error:
        raise RunFolderError(f"can not write {target}: {error.strerror}; give another place with --out FILE") from None
    typer.echo(f"report: {target}")
