"""A hospital's database: the site's own file that says where it is and what is asked, and a connection that only reads.

What a database answers may quote a record, a parameter or the address with its password. So no text of its errors is
ever shown: only which kind of error it was, and what that means.
"""

import logging
import os
import re
import socket
import sqlite3
import stat
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta

from privfed.errors import DataError

from .files import find_file

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

SUFFIX = ".toml"
_LOG = "privfed"
_SECRET = re.compile(r"(pass(word|wd)?|pwd|secret|token)\s*=", re.IGNORECASE)
_SQLITE_STEPS = 10_000
_PROBE_SECONDS = 5.0
"""Steps of SQLite's machine between two looks at the clock: some milliseconds."""


class Database(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A database file: a site's own, in TOML. No password stands in it."""

    url: Annotated[
        str, Meta(min_length=1, description="postgresql://USER@HOST:PORT/NAME, sqlite:///FILE; never with a password")
    ]
    query: Annotated[str, Meta(min_length=1, description="one SELECT that gives the agreed columns, by their names")]
    password_file: Annotated[
        Annotated[str, Meta(min_length=1)] | None, Meta(description="a file of mode 0600 with the password alone")
    ] = None
    password_env: Annotated[
        Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*$")] | None,
        Meta(description="an environment variable with the password, instead"),
    ] = None
    timeout_seconds: Annotated[int, Meta(ge=1, le=86400, description="how long the database may take altogether")] = 600
    read_only_account: Annotated[
        bool,
        Meta(
            description="other than PostgreSQL and SQLite: you have seen to it that the account can only read; nothing "
            "else prevents a query that writes"
        ),
    ] = False


def is_database(file: str) -> bool:
    """Whether a table's name is that of a database file."""
    return Path(file).suffix == SUFFIX


def read_database(file: str) -> tuple[Database, Path]:
    """A database file, and the folder that relative paths in it start from.

    Raises:
        DataError: there is none, or it is not as it should be; no value in it is shown.
    """
    path = find_file(file)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := sorted(set(table) - set(Database.__struct_fields__)):
            raise DataError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(Database.__struct_fields__)}")
        return msgspec.convert(table, Database), path.absolute().parent
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"at line \d+", str(error))
        raise DataError(f"{path} is not valid TOML{f' ({where[0]})' if where else ''}") from None
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can not read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None


@contextmanager
def connected(
    file: str, clock: Callable[[], float] = time.monotonic
) -> "Iterator[tuple[Connection, Database, Callable[[], None]]]":
    """A connection in a transaction that can only read, what is to be asked over it, and a call that ends it when late.

    Args:
        file: the database file.
        clock: seconds; what ``timeout_seconds`` is measured by.

    Raises:
        DataError: it can not be reached or read, in the body too; says what to do, and no text of the database's.

    Guarantees:
        Over PostgreSQL and SQLite nothing is written, whatever the query is. No record and no password is in a log, a
        repr or a message, also where logging is set to DEBUG for everything.
    """
    settings, folder = read_database(file)
    try:
        import sqlalchemy
    except ModuleNotFoundError:
        raise DataError(f"{file} is a database: pip install -c constraints.txt '.[sql]'") from None
    deadline = clock() + settings.timeout_seconds
    step = "connect"

    def require_time() -> None:  # the statement's own timeout holds for one portion of rows
        if clock() > deadline:
            raise TimeoutError

    try:
        url = _address(file, settings.url, sqlalchemy.make_url)
        engine = _engine(file, url, settings, folder, lambda: clock() > deadline)
        options = {"postgresql_readonly": True} if url.get_backend_name() == "postgresql" else {}
        with engine.connect().execution_options(**options) as connection:
            _prepare(connection, settings)
            step = "ask"
            yield connection, settings, require_time
    except DataError:
        raise
    except Exception as error:  # drivers have their own, and quote records, parameters and addresses
        raise DataError(f"{file}: {_reason(error, step, settings)}") from None


def _address(file: str, text: str, parse: Callable[[str], "URL"]) -> "URL":
    """The URL, if no password stands in it."""
    try:
        url = parse(text)
    except Exception:  # its message may quote the text
        raise DataError(f"{file}: url is none; postgresql://USER@HOST:PORT/NAME, sqlite:///FILE") from None
    if url.password is not None or any(_SECRET.search(f"{key}={value}") for key, value in url.query.items()):
        raise DataError(
            f"{file}: a password stands in url: take it out, change it, and name password_file or password_env"
        )
    if url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    return url


def _engine(file: str, url: "URL", settings: Database, folder: Path, late: Callable[[], bool]) -> "Engine":
    from sqlalchemy import NullPool, create_engine, event

    # SQLAlchemy logs statements at INFO and whole rows at DEBUG, where an application sets that for everything
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOG}").setLevel(logging.CRITICAL)
    given: dict[str, Any] = {"poolclass": NullPool, "hide_parameters": True, "logging_name": _LOG}
    password = _password(file, settings, folder)
    if url.get_backend_name() == "sqlite":
        path = folder / (url.database or "")
        if not path.is_file():
            raise DataError(f"{file}: there is no SQLite file where url says (relative to {folder})")
        return create_engine("sqlite://", creator=lambda: _open_sqlite(path, late), **given)
    if url.drivername == "postgresql+psycopg":
        _require_encryption(file, url)
        given["connect_args"] = {"connect_timeout": 15} if "connect_timeout" not in url.query else {}
    elif not settings.read_only_account:
        raise DataError(
            f"{file}: privfed can not keep a query over {url.drivername!r} from writing. Give the account nothing but "
            "SELECT on the view, then set read_only_account = true"
        )
    try:
        engine = create_engine(url, **given)
    except Exception as error:
        name = "psycopg" if "psycopg" in url.drivername else f"the driver of {url.drivername!r}"
        raise DataError(f"{file}: {name} is not installed ({type(error).__name__}): pip install it") from None

    def let_in(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
        if password is not None:  # here, and in no URL
            parameters["password"] = password

    event.listen(engine, "do_connect", let_in)
    if url.drivername == "postgresql+psycopg":
        event.listen(engine, "connect", _keep_digits)
    return engine


def _require_encryption(file: str, url: "URL") -> None:
    """Return unless the server is another machine and nobody has said how the way to it is protected.

    Left to itself the driver sends records in clear where no TLS is offered, and a password to whoever asks for it.
    """
    told = "sslmode" in url.query or "service" in url.query or "PGSSLMODE" in os.environ
    asked = url.query.get("host", ())
    hosts = [url.host, *([asked] if isinstance(asked, str) else asked)]
    away = [host for host in hosts if host and not host.startswith(("/", "127.")) and host not in ("localhost", "::1")]
    if away and not told:
        raise DataError(
            f"{file}: url says nothing of encryption, and the server is another machine: add "
            "?sslmode=verify-full&sslrootcert=FILE (sslmode=disable only on a wire that is yours alone)"
        )


def _keep_digits(connection: Any, _record: Any) -> None:
    """Numbers as the texts that the server sends: they become texts again, and Python's numbers are slow to make."""
    from psycopg.types.string import TextLoader

    for kind in ("int2", "int4", "int8", "float4", "float8", "numeric"):
        connection.adapters.register_loader(kind, TextLoader)


def _open_sqlite(path: Path, late: Callable[[], bool]) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    connection.execute("PRAGMA query_only = ON")
    connection.set_progress_handler(late, _SQLITE_STEPS)
    return connection


def _prepare(connection: "Connection", settings: Database) -> None:
    """The transaction's own settings; what a pooler hands to the next client is left as it was."""
    if connection.dialect.name != "postgresql" or connection.dialect.driver != "psycopg":
        return
    # A SELECT: after the first one, no transaction can be made to write any more
    if connection.exec_driver_sql("SELECT current_setting('transaction_read_only')").scalar() != "on":
        raise DataError("the database has begun no read-only transaction: nothing was asked")
    for setting, value in (
        ("statement_timeout", f"{settings.timeout_seconds}s"),
        ("client_min_messages", "error"),  # a function's notice may quote a record, and goes to a log
        ("datestyle", "ISO"),
    ):
        connection.exec_driver_sql(f"SET LOCAL {setting} = '{value}'")


def _password(file: str, settings: Database, folder: Path) -> str | None:
    if settings.password_env is not None and settings.password_file is not None:
        raise DataError(f"{file}: password_env or password_file, not both")
    if settings.password_env is not None:
        if not (found := os.environ.get(settings.password_env)):
            raise DataError(f"{file}: the environment variable {settings.password_env} is not set")
        return found
    if settings.password_file is None:
        return None  # the database knows the account otherwise, or the driver finds a password in its own place
    path = folder / settings.password_file
    try:
        with path.open("rb") as opened:
            # Of the open file: another can not be put in its place in between
            mode = os.fstat(opened.fileno()).st_mode
            if not stat.S_ISREG(mode) or mode & 0o077:
                raise DataError(f"{file}: {path} can be read by others: chmod 600 {path}, and change the password")
            return opened.read(4096).decode().strip("\r\n")
    except OSError as error:
        raise DataError(f"{file}: can not read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: {path} is not UTF-8 text") from None


_MEANING = {
    "25006": "the query writes, and this connection only reads: a query is one SELECT",
    "SQLITE_READONLY": "the query writes, and this connection only reads: a query is one SELECT",
    "57014": "it took longer than timeout_seconds, or was cancelled",
    "SQLITE_INTERRUPT": "it took longer than timeout_seconds",
    "42P01": "the query names a table or view that is not there, or not in the account's search path",
    "42703": "the query names a column that is not there",
    "42501": "the account may not read what the query asks for: GRANT SELECT on the view to it",
    "42601": "the query is not valid SQL; it must be one SELECT",
    "SQLITE_ERROR": "the query is not valid SQL, names what is not there, or is not one SELECT",
    "SQLITE_NOTADB": "it is no SQLite file",
    "SQLITE_CORRUPT": "the SQLite file is damaged",
    "SQLITE_CANTOPEN": "the SQLite file can not be opened for reading",
    "SQLITE_BUSY": "another process is writing to the SQLite file: try again",
}


def _reason(error: Exception, step: str, settings: Database) -> str:
    """Which kind of error it was, and what that means: its own text may quote a record."""
    own = getattr(error, "orig", None) or error
    if isinstance(own, TimeoutError):
        return f"it took longer than timeout_seconds = {settings.timeout_seconds}"
    code = getattr(own, "sqlstate", None) or getattr(own, "sqlite_errorname", None) or ""
    kind = f"{type(own).__name__}{f' {code}' if code else ''}"
    if code in _MEANING:
        return f"{_MEANING[code]} ({kind})"
    if code.startswith("22"):
        return f"the query can not be computed on some record: a cast or a calculation fails ({kind})"
    if step == "connect":
        return f"can not connect ({kind}): {_who_answers(settings.url)}"
    return f"the database refused the query ({kind}); try it as the same account in the database's own client"


def _who_answers(address: str) -> str:
    """Why a server let nobody in, as far as its port tells: the driver's own words are not shown."""
    from sqlalchemy import make_url

    url = make_url(address)
    port = url.port or (5432 if url.get_backend_name() == "postgresql" else None)
    if url.host is None or port is None:
        return "is the server up, are host, port, name and account in url right, and the password where the file says?"
    try:
        socket.create_connection((url.host, port), timeout=_PROBE_SECONDS).close()
    except (socket.gaierror, UnicodeError):  # no name at all
        return "no machine has the name that url gives"
    except OSError:
        return "nothing answers at url's host and port: is the server up, and does a firewall let this machine through?"
    return (
        "a server answers there, and refuses: are the account, the database's name and sslmode in url right, and the "
        "password where the file says? The server's own log has the reason"
    )
