"""A ledger changed behind its back."""

import sqlite3
from pathlib import Path


def tamper(folder: Path, *statements: str) -> None:
    """Change the file as its owner can, past its guards."""
    raw = sqlite3.connect(folder / "ledger.db")
    guards = raw.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in guards:
        raw.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        raw.execute(statement)
    for _, sql in guards:
        raw.execute(sql)
    raw.commit()
    raw.close()
