"""``privfed export``: a run's rounds for TensorBoard and MLflow."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .watch import LOOK_SECONDS

if TYPE_CHECKING:
    from privfed.watching import View, Watcher

app = typer.Typer(help="Give a run's rounds to TensorBoard or MLflow.", no_args_is_help=True, rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; the run may still go on.")]
Follow = Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")]


@app.command()
def tensorboard(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="LOGDIR", help="TensorBoard's folder; the run gets one in it.")],
    follow: Follow = False,
) -> None:
    """Write or bring up to date a run's event file: loss, accuracy, ε, sites, clip, a step a round."""
    from privfed.trackers import tensorboard
    from privfed.watching import Watcher

    watcher = Watcher(run)
    _each(watcher, follow, lambda view: typer.echo(f"{tensorboard.write(watcher, out)}: {view.done} rounds"))


@app.command()
def mlflow(
    run: Run,
    uri: Annotated[str, typer.Option("--tracking-uri", help="The one address that anything is sent to.")],
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="Its name there [default: the run's configured name]")
    ] = None,
    follow: Follow = False,
) -> None:
    """Write or bring up to date a run on an MLflow tracking server: the same figures, its settings as parameters."""
    from privfed.trackers.mlflow import Tracker
    from privfed.watching import Watcher

    watcher, tracker = Watcher(run), Tracker(uri, experiment)
    _each(watcher, follow, lambda view: typer.echo(f"run {tracker.write(watcher, view)}: {view.done} rounds"))


def _each(watcher: "Watcher", follow: bool, write: "Callable[[View], None]") -> None:
    if not follow:
        write(watcher.look())
        return
    done = -1
    for view in watcher.follow(lambda: time.sleep(LOOK_SECONDS)):
        if view.done != done or view.state != "at work":
            write(view)
            done = view.done
