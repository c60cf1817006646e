"""Records from a real PostgreSQL server, which the tests start themselves."""

import json
import logging
import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from privfed.data import queries
from privfed.data.databases import connected
from privfed.data.queries import Query, describe, misfits, read_query
from privfed.errors import DataError
from privfed.tasks import Classification
from tests.privfed import postgres
from tests.privfed.deployment import house
from tests.privfed.test_databases import MAXIMUM, ODD, ROWS, SECRET, as_csv, fingerprints, written
from tests.privfed.test_tables import settings, split

pytestmark = [
    pytest.mark.skipif(find_spec("psycopg") is None, reason="the extra [sql] is not installed"),
    pytest.mark.skipif(postgres.binaries() is None, reason="no PostgreSQL server is here: apt-get install postgresql"),
]

PASSWORD = "Pw9Plantedpassword"
EVERY = "SELECT hospital, age, sex, out FROM records"


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.serving(PASSWORD) as server:
        server.do(
            "CREATE TABLE records (id int, hospital text, age numeric(6, 2), sex text, out int2)",
            "CREATE TABLE closed (x int)",
            "CREATE SEQUENCE counter",
            # What a careless or a hostile administrator of a view could call in it
            "CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS $$ INSERT INTO records DEFAULT VALUES RETURNING 1 $$",
            "CREATE FUNCTION tells(text) RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE WARNING '%', $1; RETURN $1; END $$",
            f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'",
            "GRANT SELECT ON records TO reader",
        )
        with server.connection() as connection:
            rows = [(number, *row) for number, row in enumerate([*ROWS, *ODD])]
            connection.cursor().executemany("INSERT INTO records VALUES (%s, %s, %s, %s, %s)", rows)
        yield server


def file_of(folder: Path, server: postgres.Server, query: str = EVERY, *, user: str = "owner", **more: Any) -> str:
    secret = folder / "password"
    secret.write_text(PASSWORD + "\n")
    secret.chmod(0o600)
    return written(folder, **{"url": server.url(user), "query": query, "password_file": "password", **more})


def told(file: str) -> str:
    with pytest.raises(DataError) as refusal:
        read_query(file, None, **MAXIMUM)
    message = str(refusal.value)
    assert refusal.value.__cause__ is None and not any(planted in message for planted in (PASSWORD, SECRET))
    return message


def count(server: postgres.Server) -> int:
    with server.connection() as connection:
        return int(connection.execute("SELECT count(*) FROM records").fetchone()[0])


def test_a_server_gives_what_the_same_csv_file_gives(
    tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Query(file=file_of(tmp_path, server, user="reader"), **settings())
    found = table.load(seed=0)
    assert split(found) == split(as_csv(tmp_path, [*ROWS, *ODD]))
    monkeypatch.setattr(queries, "_PORTION_ROWS", 5)
    again = Query(file=file_of(tmp_path, server, EVERY + " ORDER BY id DESC;"), **settings()).load(seed=0)
    assert fingerprints(again) == fingerprints(found)


def test_a_password_may_stand_in_the_environment(
    tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVFED_TEST_PASSWORD", PASSWORD)
    keys = {"url": server.url("reader"), "query": EVERY, "password_env": "PRIVFED_TEST_PASSWORD"}
    assert len(read_query(written(tmp_path, **keys), None, **MAXIMUM)) == len(ROWS) + len(ODD)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT writes() AS age", "the query writes, and this connection only reads"),
        ("SELECT nextval('counter') AS age", "the query writes"),
        ("SELECT set_config('transaction_read_only', 'off', false) AS age, writes() AS b", "refused|writes"),
        ("WITH x AS (DELETE FROM records RETURNING *) SELECT * FROM x", "refused the query"),
        ("DELETE FROM records", "must be one SELECT"),
        ("SELECT 1; DELETE FROM records", "must be one SELECT"),
        ("SELECT 1) AS a; COMMIT; DELETE FROM records; --", "must be one SELECT"),
        ("SELECT 1) AS a; COMMIT; BEGIN READ WRITE; SELECT writes() --", "must be one SELECT"),
    ],
)
def test_nothing_is_written_even_where_the_account_may(
    tmp_path: Path, server: postgres.Server, query: str, message: str
) -> None:
    before = count(server)
    found = told(file_of(tmp_path, server, query))
    assert any(part in found for part in message.split("|")) and count(server) == before


def test_the_transaction_can_not_be_made_to_write(tmp_path: Path, server: postgres.Server) -> None:
    before = count(server)
    for escape in ("SET TRANSACTION READ WRITE", "SELECT set_config('transaction_read_only', 'off', true)"):
        with pytest.raises(DataError), connected(file_of(tmp_path, server)) as (connection, _, _):
            connection.exec_driver_sql(escape)
            connection.exec_driver_sql("DELETE FROM records")
            connection.commit()
    assert count(server) == before


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (f"SELECT CAST('{SECRET}' AS int) AS age", "a cast or a calculation fails"),
        (f"SELECT CAST(sex || '{SECRET}' AS int) AS age FROM records", "a cast or a calculation fails"),
        (f"SELECT * FROM {SECRET}", "names a table or view that is not there"),
        (f"SELECT {SECRET} FROM records", "names a column that is not there"),
        (f"SELECT '{SECRET}", "not valid SQL"),
        ("SELECT 1/(age - age) AS age FROM records", "a cast or a calculation fails"),
        ("SELECT *, age FROM records", "column name more than once"),
        ("SELECT * FROM records WHERE false", "gives no record"),
    ],
)
def test_bad_queries_are_explained_and_not_quoted(
    tmp_path: Path, server: postgres.Server, query: str, message: str
) -> None:
    assert message in told(file_of(tmp_path, server, query))


def test_an_account_that_may_not_read_and_one_that_is_not_let_in(tmp_path: Path, server: postgres.Server) -> None:
    assert "GRANT SELECT" in told(file_of(tmp_path, server, "SELECT * FROM closed", user="reader"))
    assert "can not connect" in told(file_of(tmp_path, server, user="stranger"))
    (tmp_path / "password").write_text(SECRET)
    wrong = written(tmp_path, url=server.url("reader"), query=EVERY, password_file="password")
    assert "can not connect" in told(wrong)
    nowhere = written(tmp_path, url=f"postgresql://reader@127.0.0.1:1/{SECRET}", query=EVERY)
    assert "can not connect" in told(nowhere)


def test_a_query_that_takes_too_long_is_ended_by_the_server(tmp_path: Path, server: postgres.Server) -> None:
    slow = file_of(tmp_path, server, "SELECT pg_sleep(600)::text AS age", timeout_seconds=1)
    assert "longer than timeout_seconds" in told(slow)


def test_columns_are_described_with_their_types_and_no_record_is_read(tmp_path: Path, server: postgres.Server) -> None:
    query = "SELECT (out / (out - out))::int2 AS age, sex = 'M' AS sex, now() AS day, hospital, out FROM records"
    file = file_of(tmp_path, server, query)
    found = {column.name: (column.kind, column.type) for column in describe(file)}
    assert found == {
        "age": ("number", "int2"),
        "sex": ("other", "bool"),
        "day": ("other", "timestamptz"),
        "hospital": ("text", "text"),
        "out": ("number", "int2"),
    }
    assert "a cast or a calculation fails" in told(file)  # so a record that is read would have been seen
    table = Query(file=file, **settings())
    assert misfits(table, Classification(), describe(file)) == {}


def test_nothing_of_a_record_or_a_password_is_logged_even_where_everything_is(
    tmp_path: Path, server: postgres.Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    query = f"SELECT hospital, age, sex, out, tells('{SECRET}' || id) AS mark FROM records"
    with caplog.at_level(logging.DEBUG):
        for name in ("sqlalchemy", "psycopg"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        try:
            frame = read_query(file_of(tmp_path, server, query), None, **MAXIMUM)
            told(file_of(tmp_path, server, f"SELECT CAST(tells('{SECRET}') AS int) AS age"))
        finally:
            for name in ("sqlalchemy", "psycopg"):
                logging.getLogger(name).setLevel(logging.NOTSET)
    assert frame["mark"].str.startswith(SECRET).all()
    shown = caplog.text + "".join(capfd.readouterr())
    assert not any(planted in shown for planted in (SECRET, PASSWORD, "SELECT"))


def test_all_types_are_read_as_their_texts(tmp_path: Path, server: postgres.Server) -> None:
    query = (
        "SELECT 12.50::numeric AS a, 0.1::float4 AS b, 1e-300::float8 AS c, 9007199254740993 AS d, ' x '::text AS e, "
        "NULL::numeric AS f, 'NaN'::float8 AS g, DATE '2020-02-01' AS h, 'a'::char(3) AS i, NULL AS j, "
        "true::int AS k, '{1,2}'::int[] AS l"
    )
    frame = read_query(file_of(tmp_path, server, query), None, **MAXIMUM)
    assert frame.iloc[0].tolist()[:11] == [
        *("12.50", "0.1", "1e-300", "9007199254740993", " x ", "", "NaN", "2020-02-01", "a  ", "", "1")
    ]


def test_json_of_a_description(tmp_path: Path, server: postgres.Server) -> None:
    from typer.testing import CliRunner

    from privfed.cli.app import app

    told = CliRunner().invoke(app, ["data", "describe", file_of(tmp_path, server), "--json"])
    assert [(column["name"], column["type"]) for column in json.loads(told.stdout)] == [
        ("hospital", "text"),
        ("age", "numeric"),
        ("sex", "text"),
        ("out", "int2"),
    ]


def test_hospitals_with_databases_run_an_experiment_that_names_none(
    tmp_path: Path, server: postgres.Server, caplog: pytest.LogCaptureFixture
) -> None:
    """And no planted cell and no password is in what any of them leaves, says or logs."""
    import pandas as pd

    from privfed.deployment import runs
    from tests.privfed.deployment.test_blocks import INSECURE, block

    paths, files = house.tables(tmp_path / "public"), {}
    for site, path in paths.items():
        table = pd.read_csv(path)
        table.loc[3, "radius"] = 17.93847261
        table.insert(0, "mrn", [f"{SECRET}{row}" for row in range(len(table))])
        columns = ", ".join(f"{name} {'text' if name == 'mrn' else 'float8'}" for name in table.columns)
        server.do(f"CREATE TABLE {site} ({columns})", f"GRANT SELECT ON {site} TO reader")
        with server.connection() as connection:
            marks = ", ".join(["%s"] * len(table.columns))
            connection.cursor().executemany(f"INSERT INTO {site} VALUES ({marks})", table.to_numpy(object).tolist())
        (tmp_path / "own" / site).mkdir(parents=True)
        query = f"SELECT *, 1 - label::int AS malignant FROM {site}"
        files[site] = file_of(tmp_path / "own" / site, server, query, user="reader")
    with caplog.at_level(logging.DEBUG), house.without_flare():
        agreed = house.experiment(files, privacy=INSECURE, rounds=2, data={"source": "sql", "id": "mrn"})
        consortium = house.found(tmp_path / "deployed", agreed)
        run = runs.begin(consortium, house.experiment(paths, privacy=INSECURE, rounds=2, data={"id": "mrn"}))
        with house.at_work(tmp_path / "deployed") as sites:
            before = {name: site.site.fingerprint for name, site in sites.items()}
        assert not block(consortium, run, 1)
        server.do("CREATE TABLE moved AS SELECT * FROM north ORDER BY mrn DESC", "TRUNCATE north",
                  "INSERT INTO north SELECT * FROM moved")  # fmt: skip
        with house.at_work(tmp_path / "deployed") as sites:
            assert {name: site.site.fingerprint for name, site in sites.items()} == before
        assert block(consortium, run, 1)
    left = [path for path in (tmp_path / "deployed").rglob("*") if path.is_file()]
    assert len(left) > 20 and (tmp_path / "deployed" / "north" / "ledger.db") in left
    for planted in (SECRET, PASSWORD, "17.93847", "malignant FROM", "@127.0.0.1"):
        assert planted not in caplog.text
        assert [path.name for path in left if planted.encode() in path.read_bytes()] == []


def test_a_site_whose_query_does_not_fit_is_told_before_a_record_is_read(
    tmp_path: Path, server: postgres.Server
) -> None:
    paths = house.tables(tmp_path / "tables")
    with house.without_flare():
        house.found(tmp_path, house.experiment(paths))
        bad = file_of(tmp_path, server, "SELECT 1 / (out - out) AS radius, now() AS texture, out AS label FROM records")
        own = tmp_path / "north" / "site.toml"
        own.write_text(own.read_text().replace(paths["north"], bad))
        with pytest.raises(DataError) as refusal:
            house.Hospital.open(tmp_path / "north").records()
    assert "column 'area' missing" in str(refusal.value)
    assert "column 'texture' has the type timestamptz, which holds no numbers" in str(refusal.value)


def test_the_page_on_databases_works_as_it_is_written(tmp_path: Path, server: postgres.Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "databases.md").read_text(encoding="utf-8")
    (view,) = re.findall(r"```sql\n(.*?)```", page, flags=re.DOTALL)
    (file,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    server.do(
        "CREATE TABLE patients (patient_id int, born date, sex int)",
        "CREATE TABLE stays (stay_id int, patient_id int, admitted date, systolic_mmhg int, outcome text, "
        "consented bool)",
        "INSERT INTO patients VALUES (1, '1950-03-01', 2), (2, '1960-01-01', 1)",
        "INSERT INTO stays VALUES (7, 1, '2020-03-02', 131, 'dead', true), (8, 2, '2020-01-01', NULL, 'home', false)",
        *(statement for statement in view.split(";") if statement.strip()),
        f"ALTER ROLE privfed PASSWORD '{PASSWORD}'",
    )
    asked = tomllib.loads(file)
    assert asked["url"].startswith("postgresql://privfed@") and "sslmode=verify-full" in asked["url"]
    frame = read_query(file_of(tmp_path, server, asked["query"], user="privfed"), None, **MAXIMUM)
    assert frame.to_dict("records") == [
        {"record": "7", "age": "70", "pressure": "131", "sex": "F", "outcome": "1"},
    ]
    assert "GRANT SELECT" in told(file_of(tmp_path, server, "SELECT * FROM patients", user="privfed"))
    read_only = {"url": asked["url"], "query": asked["query"], "timeout_seconds": asked["timeout_seconds"]}
    assert set(asked) == {*read_only, "password_file"}
