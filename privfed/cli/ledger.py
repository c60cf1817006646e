"""``privfed accountant show | verify | export | compose | keygen``: what stands in ledgers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import check_delta
from .exits import NOT_VERIFIED
from .output import print_json, write_whole

if TYPE_CHECKING:
    from privfed.privacy.ledger import Recorded
    from privfed.statements import StatedAudit

Target = Annotated[Path, typer.Argument(metavar="LEDGER|RUN", help="A ledger file, or the folder of a run.")]
Delta = Annotated[float, typer.Option("--delta", help="δ that ε is given at.")]
Keys = Annotated[
    Path | None, typer.Option("--keys", metavar="FILE", help="JSON, name: public key in hex, got from the sites.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def show(
    target: Target,
    delta: Delta = 1e-5,
    entries: Annotated[bool, typer.Option("--entries", help="Every entry too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Who has spent what, over all runs on a ledger."""
    import json

    from privfed import statements, verification
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.ledger import Ledger
    from privfed.seals import COORDINATOR

    check_delta(delta)
    accountant, rows = Accountant(), list[dict[str, Any]]()
    with Ledger(verification.find_book(target).path) as ledger:
        audits = [_audit(stated) for stated in statements.audits_in(ledger.entries(COORDINATOR))]
        for site in ledger.sites():
            chain = ledger.entries(site)
            spends = [line.entry for line in chain if line.entry.charges]
            cost = verification.spent(ledger, site, delta, accountant)
            rows.append(
                {
                    "site": site,
                    "entries": len(chain),
                    "runs": sorted({line.entry.run for line in chain}),
                    "units": sorted({entry.unit.value for entry in spends}),
                    "noise": sorted({entry.noise.value for entry in spends}),
                    "epsilon": _finite(cost.value) if spends else None,
                    "accountant": cost.accountant if spends else None,
                    "void": any(entry.insecure_seed for entry in spends),
                    "head": ledger.head(site),
                }
            )
        listed = [_plain(line) for line in ledger.entries()] if entries else []
        about = {"ledger": ledger.id, "delta": delta, "sites": rows, "audits": audits}
    if as_json:
        print_json({**about, "entries": listed} if entries else about)
        return
    typer.echo(f"ledger {about['ledger']}, ε at δ = {delta:g}")
    for row in rows:
        unit, noise = ", ".join(row["units"]) or "–", ", ".join(row["noise"]) or "–"
        bound = f"ε = {_bound(row['epsilon'])}" if row["accountant"] else "nothing spent"
        void = "  VOID: a known seed made the noise" if row["void"] else ""
        typer.echo(f"  {row['site']:<24} {bound:<16} {unit} unit, {noise} noise, {len(row['runs'])} runs{void}")
    for audit in audits:
        typer.echo(f"  audit of {audit['run']}, level {audit['level']}, {audit['name']}: {_result(audit)}")
    for line in listed:
        typer.echo(f"  {line['site']} {line['sequence']:>5}  {line['time']}  {line['kind']:<8} {line['run']}", nl=False)
        typer.echo(f" round {line['round']}  {json.dumps(line['charges']) if line['charges'] else ''}".rstrip())


def verify(
    target: Target,
    delta: Delta = 1e-5,
    keys: Keys = None,
    since: Annotated[
        Path | None,
        typer.Option("--since", metavar="EXPORT", help="An export that you kept: all of it must still be there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every hash, signature, root, ε, and a run's files. Exit code 4 names the first that does not hold.

    With --keys, every entry must be covered by a word that is signed with one of these keys.
    """
    import dataclasses

    from privfed import exports, verification
    from privfed.errors import RunChanged
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.errors import LedgerCorrupt

    check_delta(delta)
    book = verification.find_book(target, keys)
    try:
        found = verification.verify(book, delta=delta, accountant=Accountant())
        notes = (*found.notes, *verification.verify_files(book, found))
        if keys is not None:
            verification.require_signed(book, found)
        if since is not None:
            exports.require_since(book.path, since)
    except (LedgerCorrupt, RunChanged) as error:
        if not as_json:
            raise
        print_json({"verified": False, "entry": getattr(error, "entry", None), "reason": str(error)})
        raise typer.Exit(NOT_VERIFIED) from None
    rows = [
        {
            **{name: getattr(site, name) for name in ("name", "entries", "signed", "words", "insecure")},
            "epsilon": _finite(site.epsilon.value) if site.epsilon else None,
            "accountant": site.epsilon.accountant if site.epsilon else None,
        }
        for site in found.sites
    ]
    if as_json:
        print_json({**dataclasses.asdict(found), "notes": notes, "sites": rows, "delta": delta, "verified": True})
        return
    total = sum(site.entries for site in found.sites)
    typer.echo(
        f"verified: {total} entries of {len(rows)} chains, {found.rounds} rounds witnessed, {found.audits} audits; "
        f"ledger {found.ledger}"
    )
    for row in rows:
        bound = f"ε = {_bound(row['epsilon'])} at δ = {delta:g}" if row["accountant"] else "the coordinator"
        typer.echo(f"  {row['name']:<24} {row['entries']:>6} entries, signed up to {row['signed']:>6}   {bound}")
    if book.home is not None:
        typer.echo(f"  files of {book.home}: as the ledger has them")
    for note in notes:
        typer.echo(f"  note: {note}")


def export(
    target: Target,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Instead of stdout.")] = None,
) -> None:
    """Canonical JSON lines of a ledger that verifies, for anybody's own check (docs/check_export.py)."""
    from privfed import exports, verification

    text = "\n".join(exports.lines(verification.find_book(target).path)) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    write_whole(out, text.encode())
    typer.echo(f"export: {out}")


def compose(
    targets: Annotated[list[Path], typer.Argument(metavar="LEDGER|RUN…", help="Two or more.")],
    delta: Delta = 1e-5,
    as_json: AsJson = False,
) -> None:
    """ε of several ledgers together, if sites of one name hold the same people in all of them."""
    from contextlib import ExitStack

    from privfed import verification
    from privfed.errors import ConfigError
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.ledger import Ledger
    from privfed.seals import COORDINATOR

    check_delta(delta)
    if len(targets) < 2:
        raise ConfigError("compose takes two or more ledgers; for one, use privfed accountant show")
    accountant = Accountant()
    with ExitStack() as stack:
        books = [stack.enter_context(Ledger(verification.find_book(target).path)) for target in targets]
        if len({book.id for book in books}) < len(books):
            raise ConfigError("the same ledger was given twice: its spends would count twice")
        names = sorted({site for book in books for site in book.sites()} - {COORDINATOR})
        together = {name: verification.charges_of(books, name) for name in names}
    rows: list[dict[str, Any]] = [
        {"site": name, "epsilon": _finite(cost.value), "accountant": cost.accountant}
        for name, charges in together.items()
        for cost in [accountant.epsilon(charges, delta)]
    ]
    if as_json:
        print_json({"delta": delta, "ledgers": [str(target) for target in targets], "sites": rows})
        return
    typer.echo(f"{len(targets)} ledgers together, ε at δ = {delta:g} (worst case: every data set of a site, everybody)")
    for row in rows:
        typer.echo(f"  {row['site']:<24} ε = {_bound(row['epsilon'])} ({row['accountant']})")


def keygen(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Where the private key goes, for its owner alone.")],
    as_json: AsJson = False,
) -> None:
    """A new Ed25519 key for signing ledgers: FILE (mode 0600) and FILE.pub, which others need."""
    import os
    import secrets

    from privfed.crypto import keys
    from privfed.errors import RunFolderError

    private = secrets.token_bytes(keys.KEY_BYTES)
    public = keys.verification_key(private).hex()
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(private.hex() + "\n")
        Path(f"{out}.pub").write_text(public + "\n")
    except FileExistsError:
        raise RunFolderError(f"{out} is there already: a key is never overwritten; give another name") from None
    except OSError as error:
        raise RunFolderError(f"can not write {out}: {error.strerror}") from None
    if as_json:
        print_json({"private_key_file": str(out), "public_key_file": f"{out}.pub", "public_key": public})
        return
    typer.echo(f"private key: {out} (keep it)\npublic key:  {public}")


def _audit(stated: "StatedAudit") -> dict[str, Any]:
    import msgspec

    hidden = {"note", "figures", "roc", "groups"}  # a ledger has none of them
    fields = {name: value for name, value in msgspec.to_builtins(stated.headline).items() if name not in hidden}
    return {"run": stated.run, "config_sha256": stated.config, "sha256": stated.digest, **fields}


def _result(audit: dict[str, Any]) -> str:
    claim = "no claim" if audit["claimed_epsilon"] is None else f"claimed ε = {audit['claimed_epsilon']:.4g}"
    if audit["level"] == 2:  # it tests the noise's law, and bounds nothing
        return f"{audit['verdict'].upper()}, {claim}"
    sure = f"{100 * audit['confidence']:g} % confidence"
    return f"{audit['verdict'].upper()}, ε ≥ {audit['epsilon_lower']:.4g} with {sure}, {claim}"


def _plain(line: "Recorded") -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(line.entry)
    return {**fields, "sequence": line.sequence, "time": line.time, "hash": line.hash}


def _finite(value: float) -> float | None:
    import math

    return value if math.isfinite(value) else None


def _bound(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"
