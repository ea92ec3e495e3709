"""Everything a history holds, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from agentflow_projections.database import Database

Rows: TypeAlias = dict[str, list[tuple[Any, ...]]]
"""By table, in the order they were written."""


def all_rows(database: Database) -> Rows:
    """Of a history that is open."""
    names = database.ask("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
    return {name: database.ask(f'FROM "{name}"').fetchall() for (name,) in names}


def rows_in(path: Path, namespace: str) -> Rows:
    """Of a history's file."""
    with Database(path, namespace) as database:
        return all_rows(database)
