"""``privfed study``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exits import FAILED
from .output import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from privfed.study import Cell, Results
    from privfed.study.runner import Done


def command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Seeds, a grid over configuration keys, cases.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The study's folder; an existing one goes on [default: studies/NAME]")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at a time [default: one a core]")
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="loky|ray|dask", help="Where runs go: this machine, or your cluster.")
    ] = "loky",
    address: Annotated[str | None, typer.Option("--address", help="Of the Ray or Dask cluster.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, check them, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress on stderr.")] = False,
) -> None:
    """Many runs, one table with intervals, pictures and a page. Start it again to go on after a kill."""
    from privfed.errors import RunFolderError
    from privfed.study import cells, load_study

    plan = load_study(study)
    todo = cells(plan, study.parent)
    if dry_run:
        for cell in todo:
            typer.echo(f"{cell.id}  {cell.label}")
        typer.echo(f"{len(todo)} runs")
        return

    from privfed.study import collect
    from privfed.study.page import page

    home = out if out is not None else Path("studies") / plan.name
    failed = _run(todo, home, jobs or os.cpu_count() or 1, backend, address)
    results = collect(plan, todo, home)
    try:
        files = results.write(home)
        (home / "study.html").write_text(page(plan, results), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"can not write into {home}: {error.strerror}") from None
    if as_json:
        import json

        print_json(
            {
                "study": plan.name,
                "folder": str(home),
                "runs": len(todo),
                "failed": failed,
                "table": json.loads(results.table.to_json(orient="records")),  # what is no number becomes null
                "claims": results.claims,
                "choosing": results.choosing,
            }
        )
    else:
        _show(results)
        typer.echo(f"study folder: {home} (study.html, {', '.join(file.name for file in files)})")
    if failed:
        raise typer.Exit(FAILED)


def _run(todo: "Sequence[Cell]", home: Path, jobs: int, backend: str, address: str | None) -> int:
    """Run the cells with a bar on a terminal, a line each elsewhere; how many failed."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from privfed.study import run_study

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(todo))

        def told(done: "Done") -> None:
            progress.advance(task)
            if done.error is not None:
                console.print(f"  {done.cell.label}: failed: {done.error}")
            elif not console.is_terminal:
                console.print(f"  {done.cell.label}: done")

        finished = run_study(todo, home, jobs=jobs, backend=backend, address=address, observer=told)
    return sum(done.error is not None for done in finished)


def _show(results: "Results") -> None:
    """The table of settings, and what choosing among them costs."""
    from rich.console import Console
    from rich.table import Table

    from privfed.study.results import shown

    text = shown(results.table)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in text.columns:
        table.add_column(str(column))
    for row in text.to_numpy().tolist():
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    Console(highlight=False, markup=False, width=None if console.is_terminal else 200).print(table)
    typer.echo("".join(f"\n{claim}" for claim in results.claims))
    typer.echo(f"\n{results.choosing}\n")
