"""``privfed data``: the known sets, and a look at one's own table."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .exits import FAILED
from .output import print_json

app = typer.Typer(help="Known data sets, and a check of your own table.", no_args_is_help=True, rich_markup_mode=None)


def _folder() -> Path:
    from privfed.data.files import DATA_FOLDER

    return Path(os.environ.get(DATA_FOLDER) or "data")


@app.command("list")
def list_(json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False) -> None:
    """The data sets that the toolkit knows, and whether their files are here."""
    from privfed.data import catalog

    rows = []
    for known in catalog.KNOWN:
        states = {catalog.state_of(file, _folder()) for file in known.files}
        state = "ok" if states == {"ok"} else "missing" if "missing" in states else "another version"
        rows.append({"name": known.name, "title": known.title, "state": state, "example": known.example})
    if json:
        print_json(rows)
        return
    typer.echo(f"in {_folder()} (the folder that PRIVFED_DATA names; nothing is downloaded)")
    for row in rows:
        typer.echo(f"  {row['name']:<16} {row['state']:<16} {row['title']}")
    typer.echo("more: privfed data describe NAME")


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A name from `privfed data list`.")],
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Layout, licence, checksums and where to get a known data set."""
    import dataclasses
    import difflib

    from privfed.data import catalog
    from privfed.errors import ConfigError

    known = next((one for one in catalog.KNOWN if one.name == name), None)
    if known is None:
        names = [one.name for one in catalog.KNOWN]
        near = difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
        raise ConfigError(f"no data set {name!r}: {remedy}")
    states = {file.name: catalog.state_of(file, _folder()) for file in known.files}
    if json:
        print_json(dataclasses.asdict(known) | {"state": states})
        return
    typer.echo(f"{known.name}: {known.title}")
    for heading in ("layout", "traps", "licence", "obtain", "example"):
        if text := getattr(known, heading):
            typer.echo(f"  {heading:<8} {text}")
    for file in known.files:
        typer.echo(f"  {states[file.name]:<8} {_folder() / file.name}")
        typer.echo(f"           sha256 {file.sha256}")


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="A CSV (also .gz) or Parquet file.")],
    label: Annotated[str | None, typer.Option("--label", help="The column to predict.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="The column that names the hospital.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Look at your own table: problem columns and rows (by number, never by value), and a proposed [data] section."""
    import dataclasses

    from privfed.data.check import check as look

    found = look(file, label=label, site=site)
    if json:
        print_json(
            {
                "records": found.records,
                "problems": len(found.problems),
                "findings": [dataclasses.asdict(finding) for finding in found.findings],
                "proposal": found.proposal,
            }
        )
    else:
        typer.echo(f"{file}: {found.records} records", err=True)
        for finding in found.findings:
            column = f"column {finding.column!r} " if finding.column else ""
            typer.echo(f"  {'PROBLEM' if finding.problem else 'note   '} {column}{finding.text}", err=True)
        typer.echo("proposed section, for review (ranges must be public knowledge):", err=True)
        typer.echo(found.proposal, nl=False)
    if found.problems:
        raise typer.Exit(FAILED)
