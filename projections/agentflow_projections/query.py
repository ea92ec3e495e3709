"""Questions in SQL and their answers.

A `Reader` opens a file that nobody writes to now. Rows come in batches, so that an answer
of any length needs little memory. Values are what JSON knows: numbers, text, booleans,
arrays, objects; moments, intervals, bytes and the like are text as DuckDB writes it, in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import msgspec
from msgspec import Struct

from agentflow.errors import InvalidRequest, OperatingError
from agentflow_projections.database import Database, as_ours

BATCH_ROWS: Final = 2_048
"""Rows that are handed on at once."""
LATEST: Final = 9_007_199_254_740_991 >> 13
"""The position after all others."""

_INTEGERS: Final = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
    "UBIGINT",
)
_PLAIN: Final = frozenset({*_INTEGERS, "BOOLEAN", "FLOAT", "DOUBLE", "VARCHAR", "HUGEINT", "UHUGEINT"})
_NESTED: Final = re.compile(r"^(?:STRUCT|MAP|UNION|JSON)|\]$")
_RELATIVE: Final = re.compile(r"-(\d{1,9})(s|m|h|d)")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Row = list[Any]


# What the question is to blame for.
_WRONG: Final = (
    duckdb.ProgrammingError,
    duckdb.DataError,
    duckdb.NotSupportedError,
    duckdb.PermissionException,
)


@contextmanager
def _errors() -> Generator[None]:
    """DuckDB's errors as ours: what a question is wrong in is InvalidRequest."""
    try:
        yield
    except _WRONG as error:
        raise InvalidRequest(str(error)) from error
    except duckdb.Error as error:
        raise as_ours(error) from error


class Question(Struct, frozen=True):
    """What is asked."""

    sql: str
    parameters: Mapping[str, Any] = {}
    """Values of `$name` in the SQL; bound, never written into it."""
    as_of: int | None = None
    """The position the views answer as of; None: as of now."""


class Column(Struct, frozen=True):
    """A column of an answer, with its type as DuckDB calls it."""

    name: str
    type: str


class Answer:
    """What came of a question. Its rows can be read once."""

    def __init__(self, relation: Any, interrupt: Callable[[], None]) -> None:
        self.columns: Final = [
            Column(name, str(kind)) for name, kind in zip(relation.columns, relation.types, strict=True)
        ]
        self.interrupt: Final = interrupt
        """Stop it; for another thread. What reads it raises OperatingError."""
        self._relation = relation

    def rows(self) -> Iterator[list[Row]]:
        """The rows, in batches. Raises InvalidRequest, OperatingError."""
        with _errors():
            shown = self._relation.project(
                ", ".join(_shown(n, each) for n, each in enumerate(self.columns, 1))
            )
            batches = shown.to_arrow_reader(BATCH_ROWS)
        readers = [_reader_of(column.type) for column in self.columns]
        for batch in self.batches(batches):
            columns = [
                [read(value) for value in column.to_pylist()]
                for read, column in zip(readers, batch.columns, strict=True)
            ]
            yield [list(row) for row in zip(*columns, strict=True)]

    def arrow(self) -> Any:
        """The rows as a `pyarrow.RecordBatchReader`, with the types they have."""
        with _errors():
            return self._relation.to_arrow_reader(BATCH_ROWS)

    @staticmethod
    def batches(reader: Any) -> Iterator[Any]:
        """The batches of a `pyarrow.RecordBatchReader`, with DuckDB's errors as ours."""
        return _each(reader)

    def write_parquet(self, path: Path) -> int:
        """Write the rows to a file that is there whole or not at all; how many they are."""
        return write_parquet(self.arrow(), path)


def _each(batches: Any) -> Iterator[Any]:
    while True:
        try:
            with _errors():
                batch = batches.read_next_batch()
        except StopIteration:
            return
        except OSError as error:  # what DuckDB raises while Arrow reads from it
            raise OperatingError(str(error)) from error
        yield batch


def _shown(number: int, column: Column) -> str:
    """How the n-th column is asked for, so that its values are what JSON knows."""
    if column.type in _PLAIN or column.type.startswith("DECIMAL"):
        return f"#{number}"
    return f"to_json(#{number})" if _NESTED.search(column.type) else f"CAST(#{number} AS VARCHAR)"


def _reader_of(kind: str) -> Callable[[Any], Any]:
    if kind in {"FLOAT", "DOUBLE"}:
        return _float
    if kind in {"HUGEINT", "UHUGEINT"} or kind.startswith("DECIMAL"):
        return _number
    return _nested if _NESTED.search(kind) else _same


def _same(value: Any) -> Any:
    return value


def _nested(value: str | None) -> Any:
    try:
        return None if value is None else msgspec.json.decode(value)
    except msgspec.DecodeError:  # DuckDB writes NaN and Infinity, which JSON does not know
        return value


def _float(value: float | None) -> float | str | None:
    return value if value is None or isfinite(value) else str(value)


def _number(value: Decimal | float | None) -> float | None:
    if value is None:
        return None
    return int(value) if value == int(value) else float(value)


class Reader:
    """A history's file, open for reading only. A context manager.

    Any number of processes may read a file that none writes to. Raises DatabaseLocked if one
    does, DatabaseDamaged if it is no file of ours.
    """

    def __init__(self, path: Path, *, threads: int = 2, memory_mb: int = 2_048) -> None:
        self.path: Final = path
        self._config: Final[dict[str, Any]] = {
            "threads": threads,
            "memory_limit": f"{memory_mb}MiB",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        }
        self._connection: Any = None

    def __enter__(self) -> Self:
        if self._connection is not None:
            return self
        with _errors():
            self._connection = duckdb.connect(str(self.path), read_only=True, config=self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(duckdb.Error):
                connection.close()

    @classmethod
    def of(cls, database: Database) -> Self:
        """A reader of a database that is open here already, and stays open when it is left."""
        reader = cls(database.path or Path(":memory:"))
        reader._connection = database.cursor()
        return reader

    @property
    def position(self) -> int:
        """How far the history reaches."""
        return position_of(self._connection.cursor())

    def position_at(self, moment: datetime) -> int:
        """The last position that was logged at or before a moment."""
        return position_at(self._connection.cursor(), moment)

    @contextmanager
    def ask(self, question: Question) -> Generator[Answer]:
        """The answer to a question. Raises InvalidRequest if it is none."""
        with _errors():
            cursor = self._connection.cursor()
        try:
            yield answer(cursor, question)
        finally:
            with suppress(duckdb.Error):
                cursor.close()


def answer(cursor: Any, question: Question) -> Answer:
    """Ask on a cursor that nobody else uses. Raises InvalidRequest."""
    with _errors():
        statements = cursor.extract_statements(question.sql)
        if len(statements) != 1:
            raise InvalidRequest(f"expected one SQL statement, found {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = str(statements[0].type).rpartition(".")[2]
            raise InvalidRequest(f"expected a SELECT (or FROM, DESCRIBE, SHOW, SUMMARIZE), found {kind}")
        prepare(cursor, question.as_of)
        relation = cursor.sql(question.sql, params=dict(question.parameters) or None)
        if relation is None:
            raise InvalidRequest("the statement has no answer")
        return Answer(relation, cursor.interrupt)


def prepare(cursor: Any, as_of: int | None) -> None:
    """Have the views answer as of a position. Raises InvalidRequest."""
    if as_of is None:
        return
    last = position_of(cursor)
    if as_of > last:
        raise InvalidRequest(f"the history reaches to position {last}, not to {as_of}")
    cursor.execute("SET VARIABLE as_of = ?", [as_of])


def position_of(cursor: Any) -> int:
    """How far the history reaches; 0: it is empty."""
    with _errors():
        ((found,),) = cursor.execute("SELECT max(seq) FROM checkpoint").fetchall()
    return found or 0


def position_at(cursor: Any, moment: datetime) -> int:
    """The last position that was logged at or before a moment."""
    with _errors():
        utc = moment.astimezone(UTC).replace(tzinfo=None)
        ((found,),) = cursor.execute("SELECT position_at(?::TIMESTAMP)", [utc]).fetchall()
    return int(found)


def parse_when(text: str, now: datetime) -> int | datetime:
    """A position, or a moment: 2026-11-21T17:00 (in UTC unless it says otherwise) or -15m (s, m, h, d ago).

    Raises InvalidRequest.
    """
    if text.isdecimal():
        return int(text)
    relative = _RELATIVE.fullmatch(text)
    try:
        if relative is not None:
            return now - timedelta(**{_UNITS[relative[2]]: int(relative[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"expected a position, a time like 2026-11-21T17:00 (UTC) or one like -15m, found {text!r}"
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def write_parquet(batches: Any, path: Path) -> int:
    """Write a `pyarrow.RecordBatchReader` to a file that is there whole or not at all; how many rows it had."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - seldom needed

    fresh, rows = path.with_name(f".{path.name}.new"), 0
    try:
        with pq.ParquetWriter(fresh, batches.schema, compression="zstd") as file:
            for batch in _each(batches):
                file.write_batch(batch)
                rows += batch.num_rows
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return rows


def write_parquet_of(stream: bytes, path: Path) -> int:
    """Write an Arrow IPC stream to a Parquet file; how many rows it had."""
    import pyarrow as pa  # noqa: PLC0415 - seldom needed

    return write_parquet(pa.ipc.open_stream(stream), path)


class Described(Struct, frozen=True):
    """A table for people, or one of the tables beneath."""

    name: str
    meaning: str
    columns: list[tuple[str, str, str]]
    """Name, type and meaning of each."""
    base: bool


_DESCRIBED: Final = """
SELECT r.name, r.comment, r.base, list((c.column_name, c.data_type, coalesce(c.comment, '')) ORDER BY c.column_index)
FROM (
    SELECT view_name AS name, comment, false AS base FROM duckdb_views() WHERE NOT internal
    UNION ALL
    SELECT table_name, comment, true FROM duckdb_tables() WHERE NOT internal
) AS r
JOIN duckdb_columns() AS c ON c.table_name = r.name AND NOT c.internal
GROUP BY ALL
ORDER BY r.base, r.name
"""


def described(cursor: Any) -> list[Described]:
    """What tables there are, as the database itself tells: those for people first."""
    with _errors():
        rows = cursor.execute(_DESCRIBED).fetchall()
    return [
        Described(name, said or "", [tuple(each) for each in columns], base)
        for name, said, base, columns in rows
    ]


def described_here() -> list[Described]:
    """What tables this release writes."""
    with Database(None, "tables") as database:
        return described(database.ask("SELECT 1"))
