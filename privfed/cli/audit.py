"""``privfed audit``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exits import NOT_VERIFIED
from .output import print_json

if TYPE_CHECKING:
    from privfed.privacy.audit.result import Audit, Group

_LEVELS = {1: "mechanism", 2: "noise", 3: "one run", 4: "membership"}


def command(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|CONFIG]", help="A run's folder or a TOML file. Without one: the main job."),
    ] = None,
    level: Annotated[
        list[int] | None,
        typer.Option(
            "--level",
            min=1,
            max=4,
            help="1 mechanism, 2 noise, 3 one run, 4 personal models. Repeatable. [all that apply]",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Level 1: releases; 3: canaries; 4: shadow models of a site."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="Level 4: also by the groups of this input. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Everything random derives from it.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress on stderr.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the results here [default: audit.json in the run's folder]")
    ] = None,
) -> None:
    """Attack a run's privacy: lower bounds of ε beside the claim, in the run's ledger too. Exit code 4: a violation."""
    if out is not None and out.exists():  # before the waiting, not after it
        raise typer.BadParameter(f"{out} exists already: nothing was changed; give another --out")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from privfed import auditing

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print("reading the records and calibrating the noise …")
    target = auditing.target_of(source)
    auditing.require_recordable(target)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[int, object] = {}

        def shown(which: int, done: int, total: int) -> None:
            if which not in tasks:
                tasks[which] = bar.add_task(f"level {which}, {_LEVELS[which]}", total=total)
                if not console.is_terminal:
                    console.print(f"level {which}, {_LEVELS[which]} …")
            bar.update(tasks[which], completed=done, total=total)  # type: ignore[arg-type]

        found = auditing.audit(target, levels=level, trials=trials, by=by or (), seed=seed, progress=shown)
    auditing.record(target, found)
    if target.home is not None:  # at once: whoever is interrupted from here on is to know it
        typer.echo(f"stands in the ledger, signed: {target.home.ledger()}", err=True)
    path = auditing.write(target, found, out)
    if json:
        print_json(found)
    else:
        for one in found.audits:
            typer.echo(_line(one))
    if path is not None:
        typer.echo(f"written to {path}", err=True)
    if found.violated:
        raise typer.Exit(NOT_VERIFIED)


def _line(audit: "Audit") -> str:
    """An audit for people: the bound, the claim, the verdict and the reason."""
    claim = "no claim" if audit.claimed_epsilon is None else f"claimed ε = {audit.claimed_epsilon:.4g}"
    bound = f"ε ≥ {audit.epsilon_lower:.4g} with {audit.confidence:.2%} confidence"
    if audit.level == 2:
        bound = (
            f"{audit.figures['checks'] - audit.figures['failed']:.0f} of {audit.figures['checks']:.0f} checks passed"
        )
    power = "" if audit.power is None else f"; would have caught noise ÷ 2 with probability {audit.power:.2f}"
    shown = [
        f"level {audit.level}, {audit.name}: {audit.verdict.upper()}",
        f"  {bound}; {claim} at δ = {audit.delta:g}{power}",
    ]
    if "auc" in audit.figures:
        figures = audit.figures
        shown.append(
            f"  membership: AUC {figures['auc']:.3f}, TPR {figures['tpr_at_1_percent_fpr']:.3f} at 1 % FPR "
            f"({figures['tpr_low']:.3f} to {figures['tpr_high']:.3f})"
        )
    for by in dict.fromkeys(group.by for group in audit.groups):
        least, most = (
            choose((group for group in audit.groups if group.by == by), key=lambda group: group.auc)
            for choose in (min, max)
        )
        shown.append(f"  by {by}: AUC from {_area(least)} to {_area(most)}")
    return "\n".join([*shown, f"  {audit.note}. Seed {', '.join(map(str, audit.seeds))}"])


def _area(group: "Group") -> str:
    return f"{group.auc:.3f} ({group.auc_low:.3f} to {group.auc_high:.3f}; {group.name})"
