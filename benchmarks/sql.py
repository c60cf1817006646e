"""A site with a million records in PostgreSQL: how long it takes to start and what memory; beside CSV and Parquet.

The benchmark starts a PostgreSQL server of its own (as nobody, if it is root), and one site for each kind of data, in
a process of its own: from the start of Python until the site would answer. The same random records are in all three.

    python benchmarks/sql.py [--quick] [--json FILE] [--check]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Bar, Report, parse

sys.path.insert(0, str(Path(__file__).parent.parent))
from privfed import config_io
from privfed.config import Config
from tests.privfed import postgres
from tests.privfed.deployment import house

BARS = (
    Bar("PostgreSQL: site start", at_most=60.0),
    Bar("PostgreSQL: memory", at_most=2.0),
)
PASSWORD = "not a secret: the server lives as long as the benchmark"
KINDS = {"north": "PostgreSQL", "south": "CSV", "west": "Parquet"}
START = """
import json, resource, sys
from pathlib import Path
from privfed.deployment.hospital import Hospital
with Hospital.open(Path(sys.argv[1])).opened():
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]))
"""
LABS = ("sodium", "potassium", "creatinine", "glucose", "platelets", "lactate")


def main() -> None:
    options = parse(__doc__)
    report = Report("sql", packages=("sqlalchemy", "psycopg", "pyarrow", "pandas"))
    rows, repeats = (20_000, 1) if options.quick else (1_000_000, 3)
    report.section(f"{rows:,} records of 12 columns: id, label, 8 numbers (6 of them numeric), 2 names")
    with tempfile.TemporaryDirectory() as folder, postgres.serving(PASSWORD) as server:
        home = Path(folder)
        with house.without_flare():
            house.found(home, experiment(tables(home, server, rows)), study=False)
        found: dict[str, list[tuple[float, float, float]]] = {site: [] for site in KINDS}
        for _ in range(repeats):
            for site in KINDS:
                found[site].append(start(home / site))
    for site, kind in KINDS.items():
        wall, processor, memory = (sorted(column)[repeats // 2] for column in zip(*found[site], strict=True))
        report.add(f"{kind}: site start", wall, "s")
        report.add(f"{kind}: processor time of the site", processor, "s")
        report.add(f"{kind}: memory", memory, "GiB")
    report.note(f"medians of {repeats}; the PostgreSQL server's own time and memory are in none but the first row")
    report.finish(options, BARS)


def start(home: Path) -> tuple[float, float, float]:
    """Seconds by the clock, of processor, GiB."""
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", START, str(home)], check=True, stdout=subprocess.PIPE)
    processor, memory = json.loads(done.stdout)
    return time.perf_counter() - before, processor, memory


def tables(home: Path, server: postgres.Server, rows: int) -> dict[str, str]:
    """The same records in a server, and in files."""
    import pyarrow.csv
    import pyarrow.parquet

    labs = ", ".join(f"(random() * 100)::numeric(8, 2) AS {name}" for name in LABS)
    server.do(
        "SELECT setseed(0.5)",
        "CREATE TABLE stays AS SELECT i AS id, (18 + random() * 80)::int2 AS age, 15 + random() * 30 AS bmi, "
        f"{labs}, (ARRAY['f', 'm'])[1 + (random() < .5)::int] AS sex, 'ward ' || (random() * 7)::int AS ward, "
        f"(random() < .3)::int AS died FROM generate_series(1, {rows}) AS i",
    )
    with server.connection() as connection, (home / "stays.csv").open("wb") as file:
        with connection.cursor().copy("COPY stays TO STDOUT (FORMAT csv, HEADER)") as copy:
            for portion in copy:
                file.write(portion)
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(home / "stays.csv"), home / "stays.parquet")
    (home / "password").touch(0o600)
    (home / "password").write_text(PASSWORD)
    (home / "stays.toml").write_text(
        f'url = "{server.url()}"\nquery = "SELECT * FROM stays"\npassword_file = "password"\n'
    )
    return {site: str(home / f"stays.{end}") for site, end in zip(KINDS, ("toml", "csv", "parquet"), strict=True)}


def experiment(files: dict[str, str]) -> Config:
    numeric = [{"name": name, "range": [0, 100]} for name in ("age", "bmi", *LABS)]
    names = {"sex": ["f", "m"], "ward": [f"ward {number}" for number in range(8)]}
    data = {
        "source": "csv",
        "files": files,
        "id": "id",
        "label": "died",
        "classes": {"no": ["0"], "yes": ["1"]},
        "numeric": numeric,
        "categorical": [{"name": name, "values": values} for name, values in names.items()],
    }
    return config_io.decode({"name": "sql", "data": data})


if __name__ == "__main__":
    main()
