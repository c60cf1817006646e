"""``privfed accountant``: what a mechanism costs, and what stands in ledgers."""

import typer

from . import ledger

app = typer.Typer(help="What a mechanism costs; what stands in ledgers.", no_args_is_help=True, rich_markup_mode=None)
app.command("show")(ledger.show)
app.command("verify")(ledger.verify)
app.command("export")(ledger.export)
app.command("compose")(ledger.compose)
app.command("keygen")(ledger.keygen)
