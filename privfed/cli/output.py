"""What commands print for programs."""

import typer


def print_json(value: object) -> None:
    """One JSON value on stdout, in the same form from every command."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
