"""``privfed data``: the known sets, and a look at one's own table."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .exits import FAILED
from .output import print_json

app = typer.Typer(
    help="Known data sets, a check of your own table, and simulated sites.", no_args_is_help=True, rich_markup_mode=None
)

_SITES_TOLD = 50


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
    name: Annotated[str, typer.Argument(help="A name from `privfed data list`, or a database file (.toml).")],
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Layout, licence, checksums and where to get a known data set; or the columns of a database's query."""
    import dataclasses
    import difflib

    from privfed.data import catalog
    from privfed.data.databases import is_database
    from privfed.errors import ConfigError

    if is_database(name):
        _describe_database(name, json=json)
        return
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


def _describe_database(file: str, *, json: bool) -> None:
    import dataclasses

    from privfed.data.queries import describe

    columns = describe(file)
    if json:
        print_json([dataclasses.asdict(column) for column in columns])
        return
    typer.echo(f"{file}: the query has {len(columns)} columns (no record was read)")
    for column in columns:
        typer.echo(f"  {column.name:<32} {column.type or 'of a type that the database does not tell'}")


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="A CSV (also .gz), Parquet or database file (.toml).")],
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


@app.command()
def split(
    file: Annotated[str, typer.Argument(help="A CSV (also .gz) or Parquet file.")],
    out: Annotated[Path, typer.Option("--out", help="The assignment: a new CSV file of row numbers and sites.")],
    kind: Annotated[str, typer.Option("--kind", help="column, iid, dirichlet, quantity or feature.")] = "iid",
    sites: Annotated[int | None, typer.Option("--sites", help="How many simulated sites.", min=1)] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="dirichlet, quantity: concentration.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="column, feature: the column.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="feature: 1 sorts, 0 is chance.", min=0, max=1)] = 0.8,
    label: Annotated[str | None, typer.Option("--label", help="The column to predict.")] = None,
    patient: Annotated[str | None, typer.Option("--patient", help="Its records stay together.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Public.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option("--plot", help="A picture: .svg, .png or .pdf.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", help="A new folder: the records too, one file a site.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Cut one table into sites. Writes who is where; records are copied only with --copy."""
    import dataclasses

    import msgspec

    from privfed.data.partition import Partition
    from privfed.data.split import PICTURES, draw
    from privfed.data.split import split as cut
    from privfed.errors import ConfigError

    kinds: dict[str, dict[str, object]] = {
        "column": {"--by": by},
        "iid": {"--sites": sites},
        "dirichlet": {"--sites": sites, "--alpha": alpha, "--label": label},
        "quantity": {"--sites": sites, "--alpha": alpha},
        "feature": {"--sites": sites, "--by": by},
    }
    if kind not in kinds:
        raise ConfigError(f"--kind must be one of {', '.join(kinds)}, got {kind!r}")
    if missing := [name for name, value in kinds[kind].items() if value is None]:
        raise ConfigError(f"--kind {kind} needs {' and '.join(missing)}")
    given = {"--sites": sites, "--alpha": alpha, "--by": by}
    if idle := [name for name, value in given.items() if value is not None and name not in kinds[kind]]:
        raise ConfigError(f"--kind {kind} does not read {' and '.join(idle)}: leave it out, or name another kind")
    if plot is not None and plot.suffix not in PICTURES:  # before anything is written
        raise ConfigError(f"can not draw {plot.name}: end its name in .svg, .png or .pdf")
    settings = {"kind": kind, "sites": sites, "alpha": alpha, "column": by, "strength": strength}
    wanted: dict[str, tuple[str, ...]] = {
        "iid": (),
        "dirichlet": ("alpha",),
        "quantity": ("alpha",),
        "feature": ("column", "strength"),
    }
    partition: Partition | str
    if kind == "column":
        partition = str(by)
    else:
        try:
            asked = {name: settings[name] for name in ("kind", "sites", *wanted[kind])}
            partition = msgspec.convert(asked, Partition)
        except msgspec.ValidationError as error:
            raise ConfigError(f"privfed data split: {error}") from None
    for path in (out, plot, copy):
        if path is not None and path.exists():
            raise ConfigError(f"{path} exists: name a new one")
    found = cut(file, partition, seed=seed, label=label, patient=patient)
    found.write(out)
    if plot is not None:
        draw(found, plot)
    if copy is not None:
        found.copy(copy)
    if json:
        rows = [dataclasses.asdict(site) for site in found.sites]
        print_json({"records": len(found.names), "seed": seed, "out": str(out), "sites": rows})
        return
    typer.echo(f"{file}: {len(found.names)} records in {len(found.sites)} sites; who is where: {out}")
    for site in found.sites[:_SITES_TOLD]:
        labels = "".join(f"  {name}: {count}" for name, count in site.labels.items())
        typer.echo(f"  {site.name:<16} {site.records:>7}{labels}")
    if len(found.sites) > _SITES_TOLD:
        typer.echo(f"  … and {len(found.sites) - _SITES_TOLD} more (--json tells of all)")
    if sites is not None and len(found.sites) < sites:
        typer.echo(f"  note: {sites - len(found.sites)} of the {sites} sites got no record, and do not exist in a run")
    typer.echo(f'in a run: data.partition = {{ kind = "file", file = "{out}" }}, without data.site')
