"""Files that are whole or not there, and for their owner alone where they hold a secret."""

import os
import secrets
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomlkit

from privfed.errors import PrivfedError

T = TypeVar("T")


class DeploymentError(PrivfedError):
    """A consortium's, a site's or a coordinator's folder is not what a command needs. The message says what to do."""


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """A file replaced in one step, mode 0600 if it is private."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise DeploymentError(f"can not write {path}: {error.strerror}") from None


def read(path: Path, *, private: bool = False) -> bytes:
    """A file's bytes.

    Raises:
        DeploymentError: it is not there, or others may read what is private.
    """
    try:
        if private and path.stat().st_mode & 0o077:
            raise DeploymentError(f"{path} can be read by others: chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"can not read {path}: {error.strerror}") from None


def write_toml(path: Path, value: msgspec.Struct, *, comment: str, private: bool = False) -> None:
    text = f"# {comment}\n\n{toml_text(msgspec.to_builtins(value))}"
    write(path, text.encode(), private=private)


def toml_text(table: dict[str, Any]) -> str:
    """TOML, a line for each key that has a value."""
    return tomlkit.dumps(_without_none(table))


def toml_keys(text: bytes) -> frozenset[str]:
    """The keys that a text gives, of one that `parse_toml` has read."""
    return frozenset(tomllib.loads(text.decode()))


def parse_toml(text: bytes, kind: type[T], where: object) -> T:
    """A struct from TOML, strictly. Raises `DeploymentError` naming the key."""
    try:
        return msgspec.convert(tomllib.loads(text.decode()), kind, strict=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{where}: {error}") from None


@contextmanager
def locked(path: Path, what: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds ``path`` for one process; the system lets go of it when the process ends, however it ends.

    Args:
        what: it stands for, in words.
        wait_seconds: how long another process may take to let go.

    Raises:
        DeploymentError: another process has it.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        end = time.monotonic() + wait_seconds
        while True:
            try:
                flock(file, LOCK_EX | LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    reason = f"another process is at work in {what}: wait for it, or stop it"
                    raise DeploymentError(reason) from None
            time.sleep(0.1)
        yield


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
