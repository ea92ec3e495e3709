"""The DuckDB file of a projection: opened, checked, written and asked here and nowhere else.

What is in the file can always be had from the log again, so whatever is wrong with it (cut
off, damaged, of another release) leads to one thing: it is set aside and begun anew. A file
that another process has open, or that is another namespace's, is left alone.

DuckDB notices neither that its file was removed under it nor that another lies in its place:
what is written then goes nowhere, without an error. So before each commit it is looked whether
the file is still the one that was opened.

DuckDB's own errors do not leave this file.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import weakref
import zlib
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
from agentflow_projections.columns import arrow_table

HISTORY: Final = ("schema.sql", "views.sql", "comments.sql")
"""The SQL that makes a namespace's history."""
_FULL: Final = ("No space left", os.strerror(errno.EDQUOT), os.strerror(errno.EFBIG))
_DAMAGED: Final = ("Corrupt", "checksum", "Failure while replaying WAL")

WAL_MB: Final = 512
"""What is written goes to the WAL first, and from there into the file whenever there is so much. Each time the
last rows of every table are packed anew: with DuckDB's own 16 MiB that takes half of all time and space."""

_log = get_logger(__name__)


class DatabaseLocked(OperatingError):
    """Another process has the file open."""


class DatabaseFull(OperatingError):
    """There is no room for more on the disk. What was committed before is there."""


class DatabaseUnlinked(OperatingError):
    """The file was removed or replaced while it was open: nothing more is written."""


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


class Database:
    """One namespace's history in a file. A context manager; entered means open and of this schema."""

    def __init__(
        self,
        path: Path | None,
        namespace: str,
        *,
        schema: tuple[str, ...] = HISTORY,
        threads: int = 1,
        memory_mb: int = 1_024,
    ) -> None:
        self.path: Final = path
        self._schema = schema
        self._version = schema_version(schema)
        self.namespace: Final = namespace
        self._config: Final[dict[str, Any]] = {
            "threads": threads,
            "memory_limit": f"{memory_mb}MiB",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
            "preserve_insertion_order": True,
            "checkpoint_threshold": f"{WAL_MB}MiB",
        }
        self._connection: Any = None
        self._cursors: weakref.WeakSet[Any] = weakref.WeakSet()
        self._inode = (0, 0)
        """Device and number of the file that was opened."""
        self._still: Final = threading.Lock()
        """Held by who writes, and by who copies the file."""

    def __enter__(self) -> Self:
        """Raises DatabaseLocked, DatabaseFull, DatabaseDamaged if it cannot even be made anew."""
        try:
            self._open()
        except DatabaseDamaged as error:
            self.begin_anew(str(error))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # DuckDB closes the file with the last cursor on it, and until then nobody can open it anew.
        for each in (*self._cursors, self._connection):
            if each is not None:
                with suppress(duckdb.Error):
                    each.close()
        self._cursors.clear()
        self._connection = None

    # Opening -----------------------------------------------------------------------------

    def _open(self) -> None:
        if self.path is not None:
            _prepare_folder(self.path)
        with _errors():
            self._connection = duckdb.connect(str(self.path or ":memory:"), config=self._config)
        try:
            self._execute("SET TimeZone = 'UTC'")
            self._check_schema()
            self._inode = self._found_inode()
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
        try:
            rows = self._ask("SELECT schema_version, namespace FROM checkpoint")
        except InvalidRequest as error:
            raise DatabaseDamaged(f"{self.path} has another schema: {error}") from error
        if len(rows) != 1:
            raise DatabaseDamaged(f"{self.path} has {len(rows)} checkpoints, expected one")
        ((version, namespace),) = rows
        if version != self._version:
            raise DatabaseDamaged(
                f"{self.path} is of another release: its schema is {version}, this release's {self._version}"
            )
        if namespace != self.namespace:
            raise InvalidRequest(
                f"{self.path} is of namespace {namespace!r}, expected {self.namespace!r}:"
                " name another folder, or move the file away"
            )

    def _create(self) -> None:
        with self.transaction():
            for name in self._schema:
                self._execute(sql(name))
            self._move_checkpoint(Checkpoint("", 0, 0, 0, b""), at_ms=0)

    def begin_anew(self, why: str) -> None:
        """Move the file out of the way and begin another: the one set aside before is gone then."""
        self.__exit__(None, None, None)
        if self.path is not None:
            _log.warning("the history is built anew from the log", path=str(self.path), reason=why)
            _set_aside(self.path)
        self._open()

    def _found_inode(self) -> tuple[int, int]:
        if self.path is None:
            return 0, 0
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_dev, found.st_ino

    def check_there(self) -> None:
        """Raises DatabaseUnlinked if the file is not where it was opened."""
        if self._found_inode() != self._inode:
            raise DatabaseUnlinked(f"{self.path} was removed or replaced while it was open")

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
        """Add rows by table and move the checkpoint, in one transaction.

        Raises DatabaseUnlinked, DatabaseFull, DatabaseDamaged: nothing is certain then but that
        opened anew the file holds all of it or nothing.
        """
        self.check_there()
        with self._still, self.transaction():
            for table, found in rows.items():
                self._append(table, found)
            self._execute("DELETE FROM checkpoint")
            self._move_checkpoint(checkpoint, at_ms=at_ms)

    def load(self, files: Mapping[str, Sequence[Path]], checkpoint: Checkpoint, *, at_ms: int) -> None:
        """Add the rows of Parquet files by table, and move the checkpoint, in one transaction.

        Raises as `commit` does.
        """
        self.check_there()
        with self._still, self.transaction():
            for table, paths in files.items():
                statement = f'INSERT INTO "{table}" SELECT * FROM read_parquet(?)'  # noqa: S608 - our own name
                self._execute(statement, [[str(path) for path in paths]])
            self._execute("DELETE FROM checkpoint")
            self._move_checkpoint(checkpoint, at_ms=at_ms)

    def copy_to(self, path: Path) -> None:
        """Copy the file as it is now, for reading elsewhere; commits wait meanwhile.

        Another process copies: closing the file in this one would give up DuckDB's lock on it.
        Raises DatabaseUnlinked, OperatingError.
        """
        if self.path is None:
            raise OperatingError("a history in memory cannot be copied")
        with self._still:
            self.check_there()
            with suppress(OperatingError):  # the file has the rest beside it then
                self.ask("CHECKPOINT").close()
            for suffix in ("", ".wal"):
                found = self.path.with_name(self.path.name + suffix)
                if found.exists():
                    _copy(found, path.with_name(path.name + suffix))

    def _move_checkpoint(self, to: Checkpoint, *, at_ms: int) -> None:
        values = [to.stream, to.created_ns, to.first_seq, to.seq, to.chain, at_ms]
        self._execute(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?, ?, make_timestamp_ms(?))",
            [self._version, self.namespace, *values],
        )

    def _append(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        found = arrow_table(rows, arrow_schemas(self._schema[0])[table])
        with _errors():
            self._connection.from_arrow(found).insert_into(table)

    # Reading -----------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint | None:
        """Up to where the file is; None: it is empty."""
        rows = self._ask(
            "SELECT stream, created_ns, first_seq, seq, chain FROM checkpoint WHERE stream <> ''"
        )
        return Checkpoint(*rows[0]) if rows else None

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
                yield Message(seq, time_ns, subject, data, _headers(headers) if headers else None)

    def check_blocks(self, cursor: Any) -> None:
        """Read every block there is: DuckDB compares a block with its checksum only when it reads it.

        Takes about a second for each gigabyte, in a cursor of its own that may be interrupted.
        Raises DatabaseDamaged; OperatingError if interrupted.
        """
        with _errors():
            tables = cursor.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
            for (name,) in tables:
                cursor.execute(f'SELECT bit_xor(hash(t)) FROM "{name}" t').fetchall()  # noqa: S608 - our own name

    def change(self, script: str, parameters: Sequence[Any]) -> None:
        """Run a file of statements, all with the same parameters, in one transaction."""
        self.check_there()
        with self.transaction():
            for statement in filter(str.strip, sql(script).split(";\n")):
                self._execute(statement, parameters)

    def cursor(self) -> Any:
        """A connection of its own to the same file; closed with it."""
        with _errors():
            cursor = self._connection.cursor()
        self._cursors.add(cursor)
        return cursor

    def ask(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """A cursor of its own that has executed a query, for reading beside the writer.

        Raises InvalidRequest if the query is wrong.
        """
        with _errors():
            return self.cursor().execute(query, parameters)

    def _ask(self, query: str) -> list[tuple[Any, ...]]:
        with _errors():
            return list(self._connection.execute(query).fetchall())

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        with _errors():
            self._connection.execute(statement, parameters or None)


def _copy(found: Path, to: Path) -> None:
    done = subprocess.run(  # noqa: S603 - our own paths
        ["/bin/cp", "--reflink=auto", "--", str(found), str(to)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OperatingError(f"cannot copy {found}: {done.stderr.strip()}")


def sql(name: str) -> str:
    """One of our SQL files."""
    return resources.files(agentflow_projections).joinpath(name).read_text(encoding="utf-8")


def _headers(text: str) -> dict[str, str]:
    try:
        headers: dict[str, str] = decode_any(text)
    except ValueError as error:
        raise DatabaseDamaged(f"headers of a frame cannot be read: {error}") from error
    return headers


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise as_ours(error) from error


def as_ours(error: duckdb.Error) -> Exception:
    """What an error of DuckDB means here."""
    text = str(error)
    if any(each in text for each in _FULL):
        return DatabaseFull(f"there is no room on the disk: {text}")
    if "Could not set lock" in text:
        return DatabaseLocked(f"another process has the file open; end it, or wait until it is done: {text}")
    if isinstance(error, _LOST) or any(each in text for each in _DAMAGED):
        return DatabaseDamaged(text)
    if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return InvalidRequest(text)
    return OperatingError(text)


_LOST: Final = (
    duckdb.IOException,
    duckdb.SerializationException,
    duckdb.InternalException,
    duckdb.FatalException,
)
"""What DuckDB says of files it cannot make sense of."""


def _prepare_folder(path: Path) -> None:
    """Raises OperatingError if there can be no file of ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OperatingError(f"{path}: expected a file, or nothing; found a folder")
        if not os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
            raise OperatingError(f"{path} cannot be read and written by this user")
    except OSError as error:
        raise OperatingError(f"{path} cannot be opened: {error}") from error


def _set_aside(path: Path) -> None:
    for suffix in ("", ".wal"):
        found = path.with_name(path.name + suffix)
        aside = path.with_name(f"{path.name}.damaged{suffix}")
        try:
            aside.unlink(missing_ok=True)
            if found.exists():
                found.replace(aside)
        except OSError as error:
            raise OperatingError(f"{found} cannot be moved out of the way: {error}") from error


@cache
def schema_version(schema: tuple[str, ...] = HISTORY) -> int:
    """Tells a file of this release from one whose tables or views are others."""
    return zlib.crc32("".join(map(sql, schema)).encode()) >> 1


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
def arrow_schemas(tables: str = HISTORY[0]) -> dict[str, Any]:
    """The columns of the tables of an SQL file as Arrow has them; an enumeration comes as text."""
    with duckdb.connect() as connection:
        connection.execute(sql(tables))
        found = connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() ORDER BY table_name, column_index"
        ).fetchall()
    fields: dict[str, list[Any]] = {}
    for table, column, kind in found:
        fields.setdefault(table, []).append(pa.field(column, _ARROW_TYPES.get(kind, pa.string())))
    return {table: pa.schema(each) for table, each in fields.items()}
