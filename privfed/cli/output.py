"""What commands print for programs, and the files that they leave."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

import typer


def print_json(value: object) -> None:
    """One JSON value on stdout, in the same form from every command."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, whatever interrupts: written under another name, then renamed.

    Raises:
        RunFolderError: it can not be written; what stood there stands.
    """
    from privfed.errors import RunFolderError

    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)  # a pipe, a terminal: there is nothing to rename
            return
        final = path.resolve()
        draft = final.with_name(f".{final.name}.{secrets.token_hex(4)}.new")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                if final.exists():
                    os.fchmod(file.fileno(), final.stat().st_mode & 0o777)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, final)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        raise RunFolderError(f"can not write {path}: {error.strerror}; give another place with --out FILE") from None
