"""What a deployment looks like on a terminal: the findings of a preflight, and a run as it goes."""

from collections.abc import Iterable, Sequence

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from privfed.deployment.survey import Finding
from privfed.deployment.watching import View, Watcher, faults
from privfed.federation import RoundReport

_VISIBLE_ROUNDS = 12


def show(findings: Sequence[Finding]) -> None:
    """A table of findings, with what to do next below those that need it."""
    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "checked", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row("ok" if finding.ok else "FAIL", finding.what, finding.found)
        if finding.next:
            table.add_row("", "", f"→ {finding.next}")
    console.print(table)


def watch(watcher: Watcher, views: Iterable[View], *, json: bool) -> View | None:
    """Show the views as they come; the last one. Lines of JSON, a live table on a terminal, else plain lines."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    last: View | None = None
    if json:
        for last in views:
            typer.echo(msgspec.json.encode(last).decode())
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for last in views:
                live.update(picture(last, watcher.reports), refresh=True)
    else:
        told = 0
        for last in views:
            for report in watcher.reports[told:]:
                console.print(line(report))
            told = len(watcher.reports)
            console.print(standing(last))
    return last


def picture(view: View, reports: Sequence[RoundReport]) -> Group:
    """The live table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "sites", view.metric, "ε", "seconds", "faults"):
        table.add_column(heading, overflow="fold")
    for report in reports[-_VISIBLE_ROUNDS:]:
        table.add_row(*_cells(report), "; ".join(faults(report)))
    return Group(Text(standing(view)), table, *(Text(fault) for fault in view.faults))


def standing(view: View) -> str:
    """Where it stands, in one line."""
    words = [f"{view.run}: {view.state}", f"{view.done} of {view.planned} rounds"]
    words += [view.phase] if view.phase else []
    words += [f"in: {', '.join(view.sites_in)}"] if view.sites_in else []
    words += [f"out: {', '.join(view.sites_out)}"] if view.sites_out else []
    return "; ".join(words)


def line(report: RoundReport) -> str:
    """A round in one line, and a line for each fault."""
    number, sites, score, epsilon, seconds = _cells(report)
    words = [f"round {number}: {sites} sites"]
    words += [f"global {score}"] if score != "–" else []
    words += [f"ε {epsilon}"] if epsilon != "–" else []
    return "\n".join([", ".join([*words, f"{seconds} s"]), *(f"  {fault}" for fault in faults(report))])


def _cells(report: RoundReport) -> tuple[str, str, str, str, str]:
    figure = report.figures("global_score")
    score = report.released.score if report.released else figure.mean if figure else None
    return (
        str(report.round + 1),
        f"{len(report.contributed)} of {len(report.invited)}",
        "–" if score is None else f"{score:.4f}",
        "–" if report.epsilon is None else f"{report.epsilon:.3f}",
        f"{report.seconds:.2f}",
    )
