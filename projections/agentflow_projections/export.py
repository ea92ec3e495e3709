"""An incident as one file: a stretch of the log, and the state of the fold before it.

The file is Parquet. Its first row holds the state (subject empty, `data` the snapshot), each
other one a message, so that any tool can read them; what they belong to is in the file's
metadata. Who replays it comes to the same as who replays the log, without a server.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from agentflow import wire
from agentflow.domain.fold import fold
from agentflow.domain.snapshot import SnapshotUnreadable, restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.errors import InvalidRequest, OperatingError
from agentflow.frames import decode_any, encode, judge
from agentflow.limits import LEVEL
from agentflow.log.port import Message
from agentflow_projections.database import Database
from agentflow_projections.past import TO_THE_END, Past, Progress, Until, begin_by, walk
from agentflow_projections.replay import project

FORM: Final = 1
BATCH_BYTES: Final = 32 * 1024 * 1024
"""Messages are written once they are so many bytes."""
_BATCH: Final = 5_000
_KEY: Final = b"agentflow"
_SCHEMA: Final = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("stored_at", pa.timestamp("ns", tz="UTC"), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("actor", pa.string()),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("headers", pa.string()),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


class Extent(Struct, frozen=True):
    """What an exported file holds; in its metadata."""

    form: int
    namespace: str
    basis: int
    """Position of the state in it."""
    last_seq: int
    """The last message in it."""


async def export(
    past: Past,
    path: Path,
    *,
    begin: Until = TO_THE_END,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
) -> Extent:
    """Write the stretch that begins with position or time `begin` to a file, which is there whole or not at all.

    Raises InvalidRequest if there is nothing in the stretch, and what the past raises.
    """
    state = await state_before(past, begin, progress)
    basis = state.seq
    fresh = path.with_name(f".{path.name}.new")
    try:
        with _Writer(fresh, past.namespace, state) as writer:
            await walk(past, state, writer.add, until=until, progress=progress)
            if state.seq == basis:
                raise InvalidRequest(
                    f"nothing lies in that stretch: it would begin after {basis}, and the history ends at {past.last_seq}"
                )
        fresh.replace(path)
    except OSError as error:
        raise OperatingError(f"cannot write {path}: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return Extent(FORM, past.namespace, basis, state.seq)


async def state_before(past: Past, begin: Until, progress: Progress | None = None) -> Namespace:
    """The state before a stretch that begins with a position or a time; with neither, that of the past itself.

    Raises InvalidRequest if the past begins later.
    """
    if begin == TO_THE_END:
        return past.begin()
    before = Until(
        seq=None if begin.seq is None else max(0, begin.seq - 1),
        ms=None if begin.ms is None else begin.ms - 1,
    )
    state = begin_by(past, before)
    await walk(past, state, _folding(state), until=before, progress=progress)
    return state


def _folding(state: Namespace) -> Callable[[Message], None]:
    def apply(message: Message) -> None:
        fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))
        state.ended.clear()

    return apply


class _Writer:
    """A Parquet file in the writing. A context manager; left without an error, the file is whole."""

    def __init__(self, path: Path, namespace: str, state: Namespace) -> None:
        self._file = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._namespace, self._basis = namespace, state.seq
        self._state = state
        self._fold = _folding(state)
        self._rows: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._append((state.seq, state.server_ms * 1_000_000, None, None, "", None, snapshot(state)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            extent = Extent(FORM, self._namespace, self._basis, self._state.seq)
            self._file.add_key_value_metadata({_KEY: encode(extent)})
        self._file.close()

    def add(self, message: Message) -> None:
        """Fold a message, and write it."""
        self._fold(message)
        route = wire.parse_event(message.subject)
        kind, actor = (route.kind, route.actor) if route is not None else (None, None)
        headers = encode(message.headers).decode() if message.headers else None
        self._append((message.seq, message.time_ns, kind, actor, message.subject, headers, message.data))

    def _append(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self._bytes += len(row[-1])
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(column, field.type)
                for field, column in zip(_SCHEMA, zip(*self._rows, strict=True), strict=True)
            ]
            self._file.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))
        self._rows.clear()
        self._bytes = 0


class ExportedPast:
    """The past as an exported file has it."""

    def __init__(self, path: Path, extent: Extent) -> None:
        self.extent: Final = extent
        self._path = path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a file. Raises InvalidRequest if it is none of ours."""
        try:
            with pq.ParquetFile(path) as file:
                found = (file.metadata.metadata or {}).get(_KEY)
        except (OSError, pa.ArrowException) as error:
            raise InvalidRequest(f"{path} is no exported incident: {error}") from error
        if found is None:
            raise InvalidRequest(f"{path} is Parquet, but not written by 'agentflow export'")
        try:
            extent = msgspec.json.decode(found, type=Extent)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"{path} is no exported incident: {error}") from error
        if extent.form != FORM:
            raise InvalidRequest(f"{path} is of form {extent.form}; this release reads {FORM}")
        return cls(path, extent)

    @property
    def namespace(self) -> str:
        """Whose history it is."""
        return self.extent.namespace

    @property
    def last_seq(self) -> int:
        """The last message in the file."""
        return self.extent.last_seq

    def begin(self) -> Namespace:
        """The state in the file. Raises OperatingError if this release cannot read it."""
        for row in self._rows(0):
            try:
                return restore(row["data"], knows=LEVEL)
            except SnapshotUnreadable as error:
                raise OperatingError(f"the state in {self._path} cannot be read: {error}") from error
        raise OperatingError(f"{self._path} has no rows")

    async def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        """The messages in the file."""
        found = []
        for row in self._rows(1):
            if row["seq"] <= after:
                continue
            headers = decode_any(row["headers"]) if row["headers"] else None
            found.append(Message(row["seq"], row["stored_ns"], row["subject"], row["data"], headers))
            if len(found) >= _BATCH:
                yield found
                found = []
        if found:
            yield found

    def _rows(self, first: int) -> Iterator[dict[str, Any]]:
        """The rows from number `first` on. Raises OperatingError if the file is damaged."""
        number = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=_BATCH):
                    stored = batch.column("stored_at").cast(pa.int64()).to_pylist()
                    rows = batch.select(["seq", "subject", "headers", "data"]).to_pylist()
                    for row, stored_ns in zip(rows, stored, strict=True):
                        number += 1
                        if number > first:
                            yield row | {"stored_ns": stored_ns}
        except (OSError, pa.ArrowException) as error:
            raise OperatingError(f"{self._path} cannot be read: {error}") from error


@asynccontextmanager
async def as_database(path: Path, *, progress: Progress | None = None) -> AsyncGenerator[Database]:
    """An exported incident as a database in memory, for whoever asks it in SQL. Raises InvalidRequest."""
    past = ExportedPast.read(path)
    with Database(None, past.namespace) as database:
        await project(past, database, progress=progress)
        yield database
