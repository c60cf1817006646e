"""Records from a database: read as a table's are, never written to, and nothing of it in any message or log."""

import itertools
import json
import logging
import random
import sqlite3
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import privfed
from privfed import config_io
from privfed.cli.app import app
from privfed.data import queries
from privfed.data.check import check
from privfed.data.columns import Categorical, Numeric
from privfed.data.databases import connected
from privfed.data.partition import Alike
from privfed.data.queries import Query, at_site, describe, misfits, read_query
from privfed.data.records import Sites
from privfed.data.split import split as cut
from privfed.data.tables import Table
from privfed.deployment import papers, survey
from privfed.deployment.hospital import Hospital
from privfed.deployment.inspection import About, Inspector, decode_reply
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError, DataError
from privfed.tasks import Classification
from tests.privfed.deployment import house
from tests.privfed.test_tables import settings, split

pytestmark = pytest.mark.skipif(find_spec("sqlalchemy") is None, reason="the extra [sql] is not installed")

SECRET = "Xk7Plantedcell"
ROWS = [("ABC"[i % 3], 20 + i, "MF"[i % 2], i // 2 % 2) for i in range(24)]
ODD = [("A", None, "F", 1), ("B", 900, "M", 0), ("C", 41.5, "x", 1), ("C", -3, None, 0)]
MAXIMUM = {"maximum_rows": 1000}


def database(folder: Path, rows: Sequence[Sequence[Any]] = ROWS, *, query: str = "SELECT * FROM t", **more: Any) -> str:
    """A SQLite database with a database file beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "t.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "t.db") as connection:
        connection.execute("CREATE TABLE t (hospital TEXT, age, sex TEXT, out INTEGER)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return written(folder, query=query, **{"url": "sqlite:///t.db", **more})


def written(folder: Path, **keys: Any) -> str:
    """A database file."""
    path = folder / "t.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return str(path)


def told(file: str, **changes: Any) -> str:
    """The message of a refusal, which holds no cell, and no library's words."""
    with pytest.raises(DataError) as refusal:
        Query(file=file, **settings(**changes)).load(seed=0)
    assert refusal.value.__cause__ is None  # a chained error would quote a cell
    assert SECRET not in str(refusal.value) and "t.toml" in str(refusal.value)
    return str(refusal.value)


def as_csv(folder: Path, rows: Sequence[Sequence[Any]]) -> Sites:
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
    path = folder / "t.csv"
    path.write_text("\n".join(["hospital,age,sex,out", *lines]) + "\n")
    return Table(file=str(path), **settings()).load(seed=0)


def fingerprints(sites: Sites) -> dict[str, str]:
    return {name: data.fingerprint(bytes(32)) for name, data in sites.sites.items()}


def test_a_query_gives_what_the_same_csv_file_gives(tmp_path: Path) -> None:
    """Missing, unknown and out of range too, and the same place in the split."""
    rows = [*ROWS, *ODD, ODD[0]]
    found = Query(file=database(tmp_path, rows), **settings()).load(seed=0)
    assert split(found) == split(as_csv(tmp_path, rows))
    assert (found.inputs, found.ranges, found.classes) == (
        ("age", "sex=M", "sex=F"),
        ((-2.0, 2.0), (0.0, 1.0), (0.0, 1.0)),
        ("no", "yes"),
    )


def test_the_order_that_a_database_gives_rows_in_changes_nothing(tmp_path: Path) -> None:
    rows = [*ROWS, *ODD]
    shuffled = random.Random(1).sample(rows, len(rows))
    changed = [("A", 20.5, "M", 0), *rows[1:]]
    before, after, other = (
        fingerprints(Query(file=database(tmp_path / name, given), **settings()).load(seed=0))
        for name, given in (("a", rows), ("b", shuffled), ("c", changed))
    )
    assert before == after
    assert {name for name in before if before[name] != other[name]} == {"A"}


def test_rows_come_in_portions_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_query(database(tmp_path, [*ROWS, *ODD]), None, **MAXIMUM)
    monkeypatch.setattr(queries, "_PORTION_ROWS", 5)
    assert read_query(str(tmp_path / "t.toml"), None, **MAXIMUM).equals(whole) and len(whole) == 28
    with pytest.raises(DataError, match="more than 27 rows"):
        read_query(str(tmp_path / "t.toml"), None, maximum_rows=27)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("A", SECRET, "M", 1), "column 'age' is numeric, but row"),
        (("A", 1, "M", SECRET), "are in none of data.classes"),
        ((None, 1, SECRET, 1), "name no site"),
        (("A", float("inf"), "M", 1), "hold no finite number"),
    ],
)
def test_bad_records_are_refused_as_a_files_are(tmp_path: Path, row: tuple[Any, ...], message: str) -> None:
    assert message in told(database(tmp_path, [*ROWS, row]))


def test_an_id_column_must_name_each_record_once(tmp_path: Path) -> None:
    query = f"SELECT *, '{SECRET}' AS mark FROM t"
    assert "share an id" in told(database(tmp_path, query=query), id="mark")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT hospital, age, sex FROM t", "column 'out' missing"),
        ("SELECT * FROM t WHERE 0", "gives no record"),
        (f"SELECT * FROM {SECRET}", "names what is not there"),
        (f"SELECT {SECRET} FROM t", "names what is not there"),
        (f"SELECT '{SECRET}", "not valid SQL"),
        ("DELETE FROM t", "not one SELECT"),
        ("SELECT * FROM t; DELETE FROM t", "not one SELECT"),
        ("SELECT 1) AS a; DELETE FROM t; --", "refused the query"),
        ("WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x", "not one SELECT"),
        ("SELECT abs(-9223372036854775808) AS age, hospital, sex, out FROM t", "not valid SQL"),
    ],
)
def test_bad_queries_are_refused_and_nothing_is_written(tmp_path: Path, query: str, message: str) -> None:
    assert message in told(database(tmp_path, query=query))
    assert len(read_query(database_again(tmp_path), None, **MAXIMUM)) == len(ROWS)


def database_again(folder: Path) -> str:
    """Another question to the database that is there."""
    return written(folder, url="sqlite:///t.db", query="SELECT * FROM t")


def test_a_connection_to_sqlite_can_not_write_whatever_it_is_told(tmp_path: Path) -> None:
    file = database(tmp_path)
    for switch in ("SELECT 1", "PRAGMA query_only = OFF"):
        with pytest.raises(DataError, match="this connection only reads"), connected(file) as (connection, _, _):
            connection.exec_driver_sql(switch)
            connection.exec_driver_sql("DELETE FROM t")
    assert len(read_query(file, None, **MAXIMUM)) == len(ROWS)


def test_signs_in_a_query_are_its_own(tmp_path: Path) -> None:
    query = "SELECT *, 'a:b %s :c::d 5%' AS \"Odd:name %\" FROM t WHERE sex LIKE '%' -- and no more;"
    frame = read_query(database(tmp_path, query=query), ["Odd:name %"], **MAXIMUM)
    assert set(frame["Odd:name %"]) == {"a:b %s :c::d 5%"}


def test_columns_are_described_and_no_record_is_read(tmp_path: Path) -> None:
    file = database(tmp_path, query="SELECT abs(-9223372036854775808 + out) AS age, sex FROM t")
    assert [column.name for column in describe(file)] == ["age", "sex"]
    with pytest.raises(DataError):  # so it would have been seen
        read_query(file, None, **MAXIMUM)
    table = Query(file=file, **settings())
    assert misfits(table, Classification(), describe(file)) == {"out": "missing", "hospital": "missing"}
    assert misfits(table, Classification(), describe(file), site="A") == {"out": "missing"}


def test_a_query_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) AS age FROM c"
    with pytest.raises(DataError, match="longer than timeout_seconds"):
        read_query(database(tmp_path, query=endless, timeout_seconds=1), None, **MAXIMUM)
    hours = itertools.count(0.0, 3600.0)
    with pytest.raises(DataError, match="longer than timeout_seconds"):  # between two portions
        read_query(database(tmp_path), None, clock=lambda: next(hours), **MAXIMUM)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@db/x",
        f"postgresql://me@db/x?password={SECRET}",
        f"postgresql://me@db/x?sslpassword={SECRET}",
        f"mssql+pyodbc://me@db/x?PWD={SECRET}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Dme%3BPwd%3D{SECRET}",
    ],
)
def test_a_password_in_the_url_is_refused_and_not_told(tmp_path: Path, url: str) -> None:
    assert "a password stands in url" in told(written(tmp_path, url=url, query="SELECT 1"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"url": f"{SECRET}"}, "url is none"),
        ({"url": "sqlite:///none.db"}, "no SQLite file"),
        ({"url": "sqlite:///t.toml", "query": "SELECT * FROM t"}, "it is no SQLite file"),
        ({"url": "sqlite://"}, "no SQLite file"),
        ({"url": "postgresql://me@db/x", "password_env": "PRIVFED_NOT_SET"}, "PRIVFED_NOT_SET is not set"),
        ({"url": "postgresql://me@db/x", "password_file": "none"}, "No such file"),
        ({"url": "postgresql://me@db/x", "password_file": "a", "password_env": "B"}, "not both"),
        ({"url": "mysql+pymysql://me@db/x"}, "read_only_account = true"),
        ({"url": "nosuch://me@db/x", "read_only_account": True}, "is not installed"),
        ({"url": "sqlite:///t.db", "password": SECRET}, "unknown key 'password'; known are url, query"),
        ({"url": 5}, "Expected `str`"),
        ({"url": "sqlite:///t.db", "timeout_seconds": 0}, "timeout_seconds"),
    ],
)
def test_bad_database_files_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    assert message in told(written(tmp_path, **{"query": f"SELECT '{SECRET}'", **keys}))


def test_a_database_file_that_is_no_toml_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(f'url = "{SECRET}\n')
    assert "not valid TOML (at line 1)" in told(str(tmp_path / "t.toml"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_password_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    secret = tmp_path / "password"
    secret.write_text(SECRET)
    secret.chmod(mode)
    file = written(tmp_path, url="postgresql://me@db/x", query="SELECT 1", password_file="password")
    with pytest.raises(DataError, match="chmod 600") as refusal:
        read_query(file, None, **MAXIMUM)
    assert SECRET not in str(refusal.value)


def test_nothing_is_logged_even_where_everything_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, ("A", 33, SECRET, 1)]
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("sqlalchemy").setLevel(logging.DEBUG)
        logging.getLogger("sqlalchemy.engine.Engine.privfed").setLevel(logging.NOTSET)  # as logging.config may
        try:
            found = Query(file=database(tmp_path, rows), **settings()).load(seed=0)
            told(database(tmp_path, [*rows, ("A", SECRET, "M", 1)]))
        finally:
            logging.getLogger("sqlalchemy").setLevel(logging.NOTSET)
    assert SECRET not in caplog.text and SECRET not in repr(found) and "SELECT" not in caplog.text


def experiment(file: str) -> dict[str, Any]:
    ages = {"name": "age", "range": [20, 60]}
    return {
        "name": "db",
        "rounds": 1,
        "data": {
            "source": "sql",
            "file": file,
            "site": "hospital",
            "label": "out",
            "classes": {"no": ["0"], "yes": ["1"]},
            "numeric": [ages],
            "categorical": [{"name": "sex", "values": ["M", "F"]}],
        },
        "evaluation": {"local_steps": 5},
    }


def test_an_experiment_names_the_database_file_and_nothing_of_what_stands_in_it(tmp_path: Path) -> None:
    config = config_io.decode(experiment(database(tmp_path)))
    text = config_io.to_toml(config)
    assert config_io.decode(tomllib.loads(text)) == config
    assert "SELECT" not in text and "sqlite" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "t.csv"}, "reads a database file"),
        ({"header": ["a"]}, "of CSV files"),
        ({"separator": ";"}, "of CSV files"),
        ({"query": "SELECT 1"}, "unknown"),
        ({"url": "sqlite:///t.db"}, "unknown"),
        ({"site": None, "partition": {"kind": "file", "file": "who.csv"}}, "row numbers"),
    ],
)
def test_what_an_experiment_can_not_say_of_a_database(changes: dict[str, Any], message: str) -> None:
    table = experiment("t.toml")
    table["data"] = {key: value for key, value in (table["data"] | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        config_io.decode(table)


def test_a_csv_source_never_opens_a_database(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column"):
        Table(file=database(tmp_path), **settings()).load(seed=0)


def test_a_run_on_a_database_leaves_no_cell_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("ABC"[i % 3], 20 + i % 40 + 0.81612735, "MF"[i % 2], i // 2 % 2) for i in range(120)]
    with caplog.at_level(logging.DEBUG):
        config = config_io.decode(experiment(database(tmp_path, rows)))
        done = privfed.run(config, out=tmp_path / "run")
    assert done.summary.complete
    left = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(left) > 5
    for planted in (b".816127", b"SELECT *", b"sqlite:"):
        assert not any(planted in content for content in left) and planted.decode() not in caplog.text


def test_check_and_describe_know_a_database(tmp_path: Path) -> None:
    rows = [("ABC"[i % 3], 20 + i * 7 % 31, "MF"[i % 2], i // 2 % 2) for i in range(60)]
    file = database(tmp_path, rows)
    found = check(file, label="out", site="hospital")
    assert found.records == 60 and not found.problems and 'source = "sql"' in found.proposal
    filled = tomllib.loads(found.proposal.replace("[low, high]", "[0, 100]"))
    assert sum(map(len, config_io.decode(filled).data.load(seed=0).sites.values())) == 60
    said = CliRunner().invoke(app, ["data", "describe", file])
    assert "4 columns (no record was read)" in said.stdout and "hospital" in said.stdout
    told = CliRunner().invoke(app, ["data", "describe", file, "--json"])
    assert [column["name"] for column in json.loads(told.stdout)] == ["hospital", "age", "sex", "out"]
    with pytest.raises(ConfigError, match="no numbers"):
        cut(file, Alike(sites=2), seed=0)


def test_what_is_agreed_on_does_not_depend_on_where_it_is_read(tmp_path: Path) -> None:
    by_file = Table(file="t.csv", separator=",", **settings())
    by_query = Query(file=database(tmp_path), **settings())
    agreed = papers.agreed(by_query)
    assert agreed == papers.agreed(by_file) and type(agreed) is Table
    own = at_site(agreed, "A", str(tmp_path / "t.toml"))
    assert type(own) is Query and type(at_site(agreed, "A", "t.csv")) is Table
    assert len(own.load(seed=0).sites["A"]) == len(ROWS)


def test_types_that_can_not_hold_what_was_agreed_on_are_named() -> None:
    table = Table(
        file="t.csv",
        site="hospital",
        label="out",
        numeric=tuple(Numeric(name=name, range=(50_000, 90_000)) for name in ("a", "b", "c", "d", "e")),
        categorical=(Categorical(name="sex", values=("M", "F")),),
    )
    small = queries.QueryColumn("b", "number", "int2", (-(2.0**15), 2.0**15 - 1))
    given = [
        queries.QueryColumn("a", "other", "date"),
        small,
        queries.QueryColumn("c", "text", "varchar"),
        queries.QueryColumn("d", "", ""),
        queries.QueryColumn("sex", "other", "bool"),
        *(queries.QueryColumn(name, "text", "text") for name in ("hospital", "out")),
    ]
    assert misfits(table, Classification(), given) == {
        "a": "has the type date, which holds no numbers: cast it in the query",
        "b": "has the type int2, which holds nothing in [50000, 90000]",
        "e": "missing",
    }


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    numbers = [0.1, 1 / 3, 1e-300, 2**60, -7]
    frame = read_query(database(tmp_path, [("A", value, "M", 0) for value in numbers]), ["age"], **MAXIMUM)
    assert np.array_equal(frame["age"].astype(float).to_numpy(), np.array(numbers, dtype=float))


def test_a_preflight_names_the_columns_that_a_query_lacks_and_nothing_of_the_query(tmp_path: Path) -> None:
    paths = house.tables(tmp_path / "tables")
    names = "radius, texture, perimeter, smoothness, compactness, label"
    with sqlite3.connect(tmp_path / "t.db") as connection:
        pd.read_csv(paths["north"]).to_sql("t", connection, index=False)
    connection.close()
    lacking = f"SELECT {names} FROM t WHERE abs(-9223372036854775808 + 0 * label) > 0"  # no record can be read
    config = house.experiment(paths, model={"hidden": [4]})
    with house.without_flare():
        consortium = house.found(tmp_path, config, study=False)
        own = tmp_path / "north" / "site.toml"
        file = written(tmp_path, url="sqlite:///t.db", query=lacking)
        own.write_text(own.read_text().replace(paths["north"], file))

        def look() -> dict[str, survey.Finding]:
            sites = {site: Inspector(lambda site=site: Hospital.open(tmp_path / site)) for site in house.SITES}
            engine = LocalEngine(sites)
            found = survey.survey(consortium, config, survey.Order.new(), engine, lambda names: names)
            return {finding.what: finding for finding in found if not finding.ok}

        assert {what: finding.found for what, finding in look().items()} == {"columns": "north: column 'area' missing"}
        reply = Inspector(lambda: Hospital.open(tmp_path / "north")).handle(msgspec.msgpack.encode(survey.Look()))
        assert b"SELECT" not in reply and b"sqlite" not in reply and b"t.toml" not in reply
        written(tmp_path, url="sqlite:///t.db", query=f"SELECT {names}, area FROM t")
        assert look() == {}


def test_a_preflight_of_a_database_reads_no_record(tmp_path: Path) -> None:
    paths = house.tables(tmp_path / "tables")
    names = "radius, texture, perimeter, area, smoothness, compactness, label"
    with sqlite3.connect(tmp_path / "t.db") as connection:
        pd.read_csv(paths["north"]).to_sql("t", connection, index=False)
    connection.close()
    none = f"SELECT {names} FROM t WHERE abs(-9223372036854775808 + 0 * label) > 0"  # whoever reads one fails
    config = house.experiment(paths, model={"hidden": [4]})
    with house.without_flare():
        house.found(tmp_path, config, study=False)
        own = tmp_path / "north" / "site.toml"
        own.write_text(own.read_text().replace(paths["north"], written(tmp_path, url="sqlite:///t.db", query=none)))
        site = Inspector(lambda: Hospital.open(tmp_path / "north"))
        reply = decode_reply(site.handle(msgspec.msgpack.encode(survey.Look(msgspec.msgpack.encode(config)))))
        assert isinstance(reply, About)
        assert (reply.unready, reply.columns, reply.refuses) == ("", {}, "")
        with pytest.raises(DataError):
            Hospital.open(tmp_path / "north").records()


def test_what_is_no_text_is_named_by_its_column_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.execute("INSERT INTO t VALUES (?)", (b"\xff" + SECRET.encode(),))
    connection.close()
    with pytest.raises(DataError, match="column 'x' of the query holds what is no text") as refusal:
        read_query(written(tmp_path, url="sqlite:///t.db", query="SELECT x FROM t"), None, **MAXIMUM)
    assert "0xff" not in str(refusal.value) and refusal.value.__suppress_context__


@pytest.mark.skipif(find_spec("psycopg") is None, reason="the extra [sql] has no driver here")
@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("postgresql://u@db.example.invalid/x", True),
        ("postgresql://u@/x?host=db.example.invalid", True),
        ("postgresql://u@/x?host=/run/postgresql&host=db.example.invalid", True),
        ("postgresql://u@db.example.invalid/x?sslmode=verify-full", False),
        ("postgresql://u@127.0.0.1:1/x", False),
        ("postgresql://u@/x?host=/nowhere", False),
    ],
)
def test_a_server_elsewhere_is_not_asked_before_its_encryption_is_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, refused: bool
) -> None:
    monkeypatch.delenv("PGSSLMODE", raising=False)
    file = written(tmp_path, url=url, query="SELECT 1 AS x")
    with pytest.raises(DataError, match="says nothing of encryption" if refused else "can not connect"):
        describe(file)
