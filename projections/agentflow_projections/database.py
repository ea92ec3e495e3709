"""The DuckDB file of a projection: opened, checked, written and asked here and nowhere else.

What is in the file can always be had from the log again, so whatever is wrong with it (cut
off, damaged, of another release, of another log) leads to one thing: it is set aside and
begun anew. Only a file that another process has open is left alone.

DuckDB's own errors do not leave this file.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import pyarrow as pa
from msgspec import Struct

import agentflow_projections
from agentflow.errors import InvalidRequest, OperatingError
from agentflow.frames import decode_any
from agentflow.log.port import Identity, Message
from agentflow.logs import get_logger

SCHEMA_VERSION: Final = 1

_log = get_logger(__name__)


class DatabaseLocked(OperatingError):
    """Another process has the file open."""


class DatabaseDamaged(OperatingError):
    """The file is no database of ours, or not readable any more. It can be deleted: the log has everything."""


class Checkpoint(Struct, frozen=True, gc=False):
    """Up to where the file follows which log."""

    stream: str
    created_ns: int
    first_seq: int
    """First message that was ever read into it."""
    seq: int
    """Everything up to this sequence is in the file."""
    chain: bytes
    """Hash over all messages read; see `agentflow_projections.chain`."""

    def fault(self, identity: Identity) -> str:
        """Why the file does not belong to a log; empty if it does."""
        if identity.created_ns != self.created_ns or identity.name != self.stream:
            return f"the file follows {self.stream} created at {self.created_ns}, the log is {identity.name} of {identity.created_ns}"
        if identity.last_seq < self.seq:
            return f"the file follows the log up to {self.seq}, but the log ends at {identity.last_seq}"
        return ""


class Snapshot(Struct, frozen=True, gc=False):
    """A state of the fold."""

    seq: int
    state: bytes


class Database:
    """One namespace's history in a file. A context manager; entered means open and of this schema."""

    def __init__(
        self, path: Path | None, namespace: str, *, threads: int = 1, memory_mb: int = 1_024
    ) -> None:
        self.path: Final = path
        self.namespace: Final = namespace
        self._config: Final[dict[str, Any]] = {
            "threads": threads,
            "memory_limit": f"{memory_mb}MiB",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "preserve_insertion_order": True,
        }
        self._connection: Any = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except DatabaseDamaged as error:
            self._set_aside(str(error))
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            with suppress(duckdb.Error):
                self._connection.close()
            self._connection = None

    # Opening -----------------------------------------------------------------------------

    def _open(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with _errors():
            self._connection = duckdb.connect(str(self.path or ":memory:"), config=self._config)
            self._connection.execute("SET TimeZone = 'UTC'")
        try:
            self._check_schema()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _check_schema(self) -> None:
        tables = {name for (name,) in self._ask("SELECT table_name FROM duckdb_tables()")}
        if not tables:
            self._create()
            return
        if "checkpoint" not in tables:
            raise DatabaseDamaged(f"{self.path} is a DuckDB file, but none of ours")
        rows = self._ask("SELECT schema_version, namespace FROM checkpoint")
        for version, namespace in rows:
            if version != SCHEMA_VERSION:
                raise DatabaseDamaged(
                    f"{self.path} has schema {version}; this release writes {SCHEMA_VERSION}"
                )
            if namespace != self.namespace:
                raise InvalidRequest(f"{self.path} is of namespace {namespace!r}, not {self.namespace!r}")

    def _create(self) -> None:
        with self.transaction():
            for name in ("schema.sql", "views.sql", "comments.sql"):
                self._execute(sql(name))

    def _set_aside(self, why: str) -> None:
        """Move the file out of the way, once: the one set aside before is gone then."""
        self.__exit__(None, None, None)
        if self.path is None:
            raise DatabaseDamaged(why)
        _log.warning("the projection is built anew from the log", path=str(self.path), reason=why)
        for suffix in ("", ".wal"):
            found = self.path.with_name(self.path.name + suffix)
            if found.exists():
                found.replace(found.with_name(f"{self.path.name}.damaged{suffix}"))

    def begin_anew(self, why: str) -> None:
        """Forget everything: the file belongs to another log, or is wrong."""
        if self.path is None:
            self.__exit__(None, None, None)
        else:
            self._set_aside(why)
        self._open()

    # Writing -----------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Generator[None]:
        """All of it, or nothing."""
        self._execute("BEGIN")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            with suppress(OperatingError):
                self._execute("ROLLBACK")
            raise

    def commit(
        self, rows: Mapping[str, Sequence[tuple[Any, ...]]], checkpoint: Checkpoint, *, at_ms: int
    ) -> None:
        """Add rows by table and move the checkpoint, in one transaction."""
        with self.transaction():
            for table, found in rows.items():
                self._append(table, found)
            self._execute("DELETE FROM checkpoint")
            self._execute(
                "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?, ?, make_timestamp_ms(?))",
                [
                    SCHEMA_VERSION,
                    self.namespace,
                    checkpoint.stream,
                    checkpoint.created_ns,
                    checkpoint.first_seq,
                    checkpoint.seq,
                    checkpoint.chain,
                    at_ms,
                ],
            )

    def _append(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        schema = _arrow_schemas()[table]
        columns = [
            pa.array(column, field.type)
            for field, column in zip(schema, zip(*rows, strict=True), strict=True)
        ]
        with _errors():
            self._connection.register("batch", pa.Table.from_arrays(columns, schema=schema))
            self._connection.execute(f'INSERT INTO "{table}" SELECT * FROM batch')  # noqa: S608 - our own name
            self._connection.unregister("batch")

    def keep_snapshot(self, snapshot: Snapshot, digest: str) -> None:
        """Keep a state of the fold, instead of the one before."""
        with self.transaction():
            self._execute("DELETE FROM snapshots")
            self._execute("INSERT INTO snapshots VALUES (?, ?, ?)", [snapshot.seq, digest, snapshot.state])

    # Reading -----------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint | None:
        """Up to where the file is; None: it is empty."""
        rows = self._ask("SELECT stream, created_ns, first_seq, seq, chain FROM checkpoint")
        return Checkpoint(*rows[0]) if rows else None

    def snapshot(self) -> Snapshot | None:
        """The state of the fold that was kept."""
        rows = self._ask("SELECT seq, state FROM snapshots ORDER BY seq DESC LIMIT 1")
        return Snapshot(*rows[0]) if rows else None

    def messages(self, *, after: int, batch: int = 5_000) -> Iterator[Message]:
        """The log's messages after a sequence, as the file holds them, in order."""
        query = """SELECT seq, stored_ns, coalesce(subject, concat_ws('.', 'af', $namespace, kind, actor)), data, headers
                   FROM frames WHERE seq > $after ORDER BY seq"""
        cursor = self.ask(query, {"namespace": self.namespace, "after": after})
        while True:
            with _errors():
                rows = cursor.fetchmany(batch)
            if not rows:
                return
            for seq, time_ns, subject, data, headers in rows:
                yield Message(seq, time_ns, subject, data, decode_any(headers) if headers else None)

    def ask(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """A cursor of its own that has executed a query, for reading beside the writer.

        Raises InvalidRequest if the query is wrong.
        """
        with _errors():
            cursor = self._connection.cursor()
            return cursor.execute(query, parameters)

    def _ask(self, query: str) -> list[tuple[Any, ...]]:
        with _errors():
            return list(self._connection.execute(query).fetchall())

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        with _errors():
            self._connection.execute(statement, parameters or None)


def sql(name: str) -> str:
    """One of our SQL files."""
    return resources.files(agentflow_projections).joinpath(name).read_text(encoding="utf-8")


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise _ours(error) from error


def _ours(error: duckdb.Error) -> Exception:
    text = str(error)
    if isinstance(error, duckdb.IOException):
        if "lock" in text:
            return DatabaseLocked(f"another process has the file open: {text}")
        return DatabaseDamaged(text)
    if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return InvalidRequest(text)
    if isinstance(error, duckdb.SerializationException | duckdb.InternalException | duckdb.FatalException):
        return DatabaseDamaged(text)
    return OperatingError(text)


_ARROW_TYPES: Final = {
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "VARCHAR": pa.string(),
    "BLOB": pa.binary(),
    "TIMESTAMP_MS": pa.timestamp("ms"),
    "VARCHAR[]": pa.list_(pa.string()),
}


@cache
def _arrow_schemas() -> dict[str, Any]:
    """The tables' columns as Arrow has them; an enumeration comes as text."""
    with duckdb.connect() as connection:
        connection.execute(sql("schema.sql"))
        found = connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() ORDER BY table_name, column_index"
        ).fetchall()
    fields: dict[str, list[Any]] = {}
    for table, column, kind in found:
        fields.setdefault(table, []).append(pa.field(column, _ARROW_TYPES.get(kind, pa.string())))
    return {table: pa.schema(each) for table, each in fields.items()}
