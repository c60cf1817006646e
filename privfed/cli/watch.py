"""``privfed watch``: a run as it goes, for who looks on."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exits import INCOMPLETE

if TYPE_CHECKING:
    from rich.console import Group

    from privfed.summary import Summary
    from privfed.watching import Row, View, Watcher

_VISIBLE_ROUNDS = 12
LOOK_SECONDS = 0.5

Once = Annotated[bool, typer.Option("--once", help="Look once, and do not follow.")]
Json = Annotated[bool, typer.Option("--json", help="Print a line of JSON whenever something changed.")]
Web = Annotated[bool, typer.Option("--web", help="Serve a page that shows it, on this machine, until ended.")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Of the page [default: a free one]")]
Host = Annotated[str | None, typer.Option("--host", help="The one address of the page [default: 127.0.0.1]")]
Remote = Annotated[
    bool, typer.Option("--allow-remote", help="Let --host be an address that other machines reach, without encryption.")
]


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, which need not be there yet.")],
    once: Once = False,
    json: Json = False,
    web: Web = False,
    port: Port = None,
    host: Host = None,
    allow_remote: Remote = False,
) -> None:
    """Follow a run until it is over: round, phase, sites, ε, accuracy, faults. It asks no site for anything."""
    from privfed.watching import Watcher

    look_on(
        Watcher(run),
        once=once,
        json=json,
        page=page_options(web, port, host, allow_remote),
        resume=f"privfed run --resume {run}",
    )


def page_options(web: bool, port: int | None, host: str | None, allow_remote: bool) -> tuple[str, int, bool] | None:
    """Address, port and whether it may be remote, of the page; None where none is asked for."""
    if not web and (port is not None or host is not None or allow_remote):
        raise typer.BadParameter("--port, --host and --allow-remote are of the page: give --web too")
    return (host or "127.0.0.1", port or 0, allow_remote) if web else None


def look_on(watcher: "Watcher", *, once: bool, json: bool, page: tuple[str, int, bool] | None, resume: str) -> None:
    """Show a run in the form that was asked for.

    Args:
        resume: the command that goes on with it.
    """
    if page is not None:
        if once or json:
            raise typer.BadParameter("--web stands alone: --once and --json are of the terminal")
        _serve(watcher, *page)
        return
    views = (watcher.look() for _ in range(1)) if once else watcher.follow(lambda: time.sleep(LOOK_SECONDS))
    last = show(watcher, views, json=json)
    summary = watcher.summary
    if summary is not None and not json:
        finish(watcher.path, summary)
    if last is not None and last.state == "idle" and not once:
        typer.echo(f"nobody works on it: {resume}", err=True)
    if last is not None and last.state == "not begun":
        typer.echo(f"there is no run in {watcher.path} yet", err=True)
        raise typer.Exit(INCOMPLETE)
    if not once and (summary is None or not summary.complete):
        raise typer.Exit(INCOMPLETE)


def finish(path: Path, summary: "Summary") -> None:
    """The last line about a run that is over."""
    spent, delta = summary.privacy.epsilon.max, summary.privacy.delta
    epsilon = "no claim" if spent is None else f"ε = {spent:.3f} at δ = {delta:g}, any site, all its runs"
    typer.echo(f"{summary.rounds} of {summary.rounds_planned} rounds; {epsilon}; {path}", err=True)


def _serve(watcher: "Watcher", host: str, port: int, allow_remote: bool) -> None:
    from privfed.web.serve import serve

    def tell(address: str, local: bool) -> None:
        typer.echo(address)
        typer.echo("whoever has this address sees the run; it changes with every start. Ctrl-C ends the page", err=True)
        if not local:
            typer.echo("other machines reach it, and it is not encrypted: who is on the line reads it too", err=True)

    serve(watcher, host=host, port=port, allow_remote=allow_remote, tell=tell)


def show(watcher: "Watcher", views: "Iterable[View]", *, json: bool) -> "View | None":
    """Show the views as they come; the last one. Lines of JSON, a live table on a terminal, else plain lines."""
    import msgspec
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, soft_wrap=True)
    last: View | None = None
    if json:
        for last in views:
            typer.echo(msgspec.json.encode(last).decode())
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for last in views:
                live.update(picture(last, watcher.rows), refresh=True)
    else:
        told, before = 0, None
        for last in views:
            for row in watcher.rows[told:]:
                console.print(line(row))
            told = len(watcher.rows)
            sites = (last.sites_in, last.sites_out)
            console.print(standing(last, names=sites != before))  # a log of 50 sites by name, every round, reads nobody
            before = sites
    return last


def picture(view: "View", rows: "Sequence[Row]") -> "Group":
    """The live table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("round", "sites", view.metric, "personalised", "ε", "seconds", "faults"):
        table.add_column(heading, overflow="fold")
    for row in rows[-_VISIBLE_ROUNDS:]:
        table.add_row(*_cells(row), "; ".join(row.faults))
    return Group(Text(standing(view)), table, *(Text(fault) for fault in view.faults))


def standing(view: "View", *, names: bool = True) -> str:
    """Where it stands, in one line.

    Args:
        names: of the sites; else how many.
    """
    from privfed.watching import named
    from privfed.wire import printable

    words = [f"{printable(view.run)}: {view.state}", f"{view.done} of {view.planned} rounds"]
    words += [view.phase] if view.phase else []
    told = named if names else len
    words += [f"in: {told(view.sites_in)}"] if view.sites_in else []
    if view.sites_out and view.sites_in:
        words += [f"out: {told(view.sites_out)}"]
    elif view.sites_out:
        words += [f"no site was asked yet, of {len(view.sites_out)}"]
    return "; ".join(words)


def line(row: "Row") -> str:
    """A round in one line, and a line for each fault."""
    number, sites, score, _, epsilon, seconds = _cells(row)
    words = [f"round {number}: {sites} sites"]
    words += [f"global {score}"] if score != "–" else []
    words += [f"ε {epsilon}"] if epsilon != "–" else []
    return "\n".join([", ".join([*words, f"{seconds} s"]), *(f"  {fault}" for fault in row.faults)])


def _cells(row: "Row") -> tuple[str, str, str, str, str, str]:
    return (
        str(row.round + 1),
        f"{row.contributed} of {row.invited}",
        "–" if row.score is None else f"{row.score:.4f}",
        "–" if row.personalized is None else f"{row.personalized:.4f}",
        "–" if row.epsilon is None else f"{row.epsilon:.3f}",
        f"{row.seconds:.2f}",
    )
