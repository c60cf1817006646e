"""``privfed accountant report``: the audit report of ledgers and runs."""

from pathlib import Path
from typing import Annotated

import typer

from .output import write_whole

Targets = Annotated[
    list[Path], typer.Argument(metavar="LEDGER|RUN…", help="Ledger files, and folders of runs that have ended.")
]


def report(
    targets: Targets,
    format: Annotated[str, typer.Option("--format", metavar="html|json|pdf", help="Of the report.")] = "html",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where it goes [default: html and json to stdout, pdf: audit.pdf]"),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", metavar="FILE", help="JSON, name: public key in hex, got from the sites.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="δ that ε is given at [default: the runs' own, else 1e-5].")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="ε that no site may pass [default: the last run's].")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="RUN", help="A run without privacy, for its figures.")
    ] = None,
    about: Annotated[
        Path | None,
        typer.Option("--about", metavar="FILE", help="TOML with the curator's statement: curator, purpose, …"),
    ] = None,
    curator: Annotated[str, typer.Option("--curator", help="Who answers for the data.")] = "",
    purpose: Annotated[str, typer.Option("--purpose", help="What the data are used for.")] = "",
    data_product: Annotated[str, typer.Option("--data-product", help="What is given out.")] = "",
    date: Annotated[str, typer.Option("--date", help="Of the report.")] = "",
    released: Annotated[
        list[str] | None,
        typer.Option("--released", metavar="metrics|personal-models", help="Given out beside the model; repeatable."),
    ] = None,
) -> None:
    """What an auditor reads: verdicts, ε against every adversary, the event ledger. Exit code 4: a file is bad."""
    from privfed.errors import ConfigError

    if format not in ("html", "json", "pdf"):
        raise ConfigError(f"--format {format}: it must be one of html, json, pdf")
    import msgspec

    from privfed import audit_report
    from privfed.audit_report.evidence import check_delta, check_targets

    check_targets([*targets, *([baseline] if baseline else [])])
    check_delta(delta)
    if budget is not None and not budget > 0:
        raise ConfigError(f"--budget must be greater than 0, got {budget:g}")
    unknown = sorted(set(released or ()) - {"metrics", "personal-models"})
    if unknown:
        raise ConfigError(f"--released {unknown[0]}: it must be one of metrics, personal-models")
    statement = audit_report.read_statement(about) if about is not None else audit_report.Statement()
    stated = {
        "curator": curator, "purpose": purpose, "data_product": data_product, "date": date,
        "released": tuple(released or ()), "budget_epsilon": budget,
    }  # fmt: skip
    statement = msgspec.structs.replace(statement, **{name: value for name, value in stated.items() if value})
    made = audit_report.build(targets, keys=keys, delta=delta, statement=statement, baseline=baseline)
    if format == "pdf":
        _write(out or Path("audit.pdf"), audit_report.pdf(made))
    else:
        text = audit_report.html(made) if format == "html" else audit_report.to_json(made)
        if out is None:
            typer.echo(text, nl=False)
        else:
            _write(out, text.encode())
    typer.echo(f"verdict: {made.verdict}", err=True)
    for finding in made.findings:
        if finding.verdict != "CLAIM-SUPPORTED":
            typer.echo(f"  {finding.verdict}: {finding.reason}", err=True)
    if not made.intact:
        from .exits import NOT_VERIFIED

        raise typer.Exit(NOT_VERIFIED)


def _write(path: Path, content: bytes) -> None:
    write_whole(path, content)
    typer.echo(f"report: {path}", err=True)
