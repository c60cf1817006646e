"""``privfed predict``."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    file: Annotated[Path, typer.Argument(help="CSV or Parquet with the run's input columns.")],
    site: Annotated[str | None, typer.Option("--site", help="This site's personal model, not the global one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the CSV here [default: stdout]")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of CSV.")] = False,
) -> None:
    """Predict new records with a run's global model or a site's personal one."""
    from privfed.prediction import predict

    if out is not None and out.exists():  # before the waiting, not after it
        raise typer.BadParameter(f"{out} exists already: nothing was changed; give another --out")
    predictions = predict(run, file, site=site)
    for note in predictions.notes:
        typer.echo(f"note: {note}", err=True)
    text = predictions.table.to_json(orient="records") if json else predictions.table.to_csv(index=False)
    if out is None:
        typer.echo(text.rstrip("\n"))
        return
    with open(out, "x", encoding="utf-8") as written:
        written.write(text.rstrip("\n") + "\n")
    typer.echo(f"{len(predictions.table)} predictions in {out}", err=True)
