"""What a deployment looks like on a terminal: the findings of a preflight."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from privfed.deployment.survey import Finding


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
