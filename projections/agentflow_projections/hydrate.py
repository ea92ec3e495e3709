"""A state of the fold, kept beside the DuckDB file, so that nobody folds a long log from its beginning.

    <name>.duckdb        the file
    <name>.snapshot      the state, without the ids of what ended; written anew and renamed
    <name>.ids-<n>       ids of what ended, one generation of them a file; only ever appended to

A fold remembers up to a million ids of tasks that ended. Writing those again and again would
cost half a second each time, so a snapshot names the files they are in, how much of each
belongs to it, and a digest of that much. What the rest costs depends on open work alone.

It lies in files of its own and not in the database because DuckDB lets no other process read
a file somebody writes to; a master that starts beside a running projector reads this.

Every part has its digest. What does not fit, or is not there, is as good as no snapshot: the
log, and the frames in the DuckDB file, have everything.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from agentflow.domain.snapshot import SnapshotUnreadable, restore, snapshot
from agentflow.domain.state import Memory, Namespace
from agentflow.limits import LEVEL
from agentflow.log.port import Identity
from agentflow.logs import get_logger

FORM: Final = 1
"""Raised with every change of what is written here."""

_SNAPSHOT: Final = ".snapshot"
_READS_MAX: Final = 5
_DIGEST_BYTES: Final = 16
_LENGTH_BYTES: Final = 4
_PACKED_BITS: Final = 32
_LOW: Final = (1 << _PACKED_BITS) - 1

_log = get_logger(__name__)


class _Ids(Struct, array_like=True, frozen=True, gc=False):
    """Some ids, in the order they ended; see `Memory`."""

    keys: list[str]
    high: list[int]
    low: list[int]


class _Generation(Struct, frozen=True, gc=False):
    """A part of a file of ids."""

    file: str
    size: int
    """Bytes of the file that belong to the snapshot."""
    digest: bytes


class _Document(Struct, frozen=True, gc=False):
    form: int
    stream: str
    created_ns: int
    seq: int
    chain: bytes
    level: int
    previous: _Generation
    current: _Generation
    state: bytes


class Hydrated(Struct, frozen=True):
    """A state that was kept, and where in which log it stood."""

    state: Namespace
    stream: str
    created_ns: int
    seq: int
    chain: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_documents: Final = msgspec.msgpack.Decoder(_Document)
_ids: Final = msgspec.msgpack.Decoder(_Ids)


def history_path(folder: Path, namespace: str) -> Path:
    """The DuckDB file of a namespace in a folder of histories."""
    return folder / f"{namespace}.duckdb"


def hydrate(folder: Path, identity: Identity, namespace: str, *, level: int = LEVEL) -> Hydrated | None:
    """The state kept in a folder, if it is one of this log that a fold of this level can go on from.

    None, with a line in the log that says why, if there is none: then fold from the beginning.
    """
    path = history_path(folder, namespace).with_suffix(_SNAPSHOT)
    try:
        found = _read(path, namespace, level)
        fault = _fault(found, identity, level)
    except FileNotFoundError:
        _log.info("no state was kept: the log is read from its beginning", expected=str(path))
        return None
    except (SnapshotUnreadable, OSError) as error:
        fault = str(error)
    else:
        if not fault:
            return found
    _log.warning("the kept state is no use: the log is read from its beginning", path=str(path), reason=fault)
    return None


def _fault(found: Hydrated, identity: Identity, level: int) -> str:
    """Why a fold of a log cannot go on from there; empty if it can."""
    if (found.stream, found.created_ns) != (identity.name, identity.created_ns):
        return f"it is of {found.stream} created at {found.created_ns}, the log is {identity.name} of {identity.created_ns}"
    if found.seq > identity.last_seq:
        return f"it is of position {found.seq}, but the log ends at {identity.last_seq}"
    if identity.first_seq > found.seq + 1:
        return f"it is of position {found.seq}, but the log begins at {identity.first_seq}"
    if found.state.level > level:
        return f"level {found.state.level} was in force, this fold knows level {level}"
    return ""


def _read(path: Path, namespace: str, level: int) -> Hydrated:
    """As `_read_once`; what is replaced while it is read is read anew."""
    for _ in range(_READS_MAX - 1):
        try:
            return _read_once(path, namespace, level)
        except FileNotFoundError:
            if not path.exists():
                raise
    return _read_once(path, namespace, level)


def _read_once(path: Path, namespace: str, level: int) -> Hydrated:
    """Raises SnapshotUnreadable, OSError."""
    data = path.read_bytes()
    body = memoryview(data)[_DIGEST_BYTES:]
    if _digest(body) != data[:_DIGEST_BYTES]:
        raise SnapshotUnreadable("its digest does not fit: it is damaged")
    try:
        document = _documents.decode(body)
    except msgspec.MsgspecError as error:
        raise SnapshotUnreadable(f"no snapshot of form {FORM}: {error}") from error
    if document.form != FORM:
        raise SnapshotUnreadable(f"it is of form {document.form}; this release reads {FORM}")
    state = restore(document.state, knows=level)
    if (state.name, state.seq) != (namespace, document.seq):
        raise SnapshotUnreadable(f"it is of {state.name!r} at {state.seq}, not of {namespace!r}")
    state.closed.previous = _read_ids(path.with_name(document.previous.file), document.previous)
    state.closed.current = _read_ids(path.with_name(document.current.file), document.current)
    return Hydrated(state, document.stream, document.created_ns, document.seq, document.chain)


def _read_ids(path: Path, part: _Generation) -> dict[str, int]:
    with path.open("rb") as file:
        data = file.read(part.size)
    if _digest(data) != part.digest:
        raise SnapshotUnreadable(f"the digest of {part.file} does not fit: it is damaged")
    found: dict[str, int] = {}
    at = 0
    while at < len(data):
        end = at + _LENGTH_BYTES + int.from_bytes(data[at : at + _LENGTH_BYTES])
        ids = _ids.decode(data[at + _LENGTH_BYTES : end])
        packed = [high << _PACKED_BITS | low for high, low in zip(ids.high, ids.low, strict=True)]
        found.update(zip(ids.keys, packed, strict=True))
        at = end
    return found


def _digest(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


class _IdFile:
    """One generation's file, while it is appended to."""

    def __init__(self, path: Path, ids: dict[str, int]) -> None:
        self.path: Final = path
        self.ids: Final = ids
        self.count = 0
        self.size = 0
        self.hash: Any = blake2b(digest_size=_DIGEST_BYTES)
        self.written = 0
        """Bytes that are in the file; what lies behind them is of a snapshot that did not come about."""

    def prepare(self) -> bytes:
        """What the file lacks; counted as written."""
        lacking = list(islice(reversed(self.ids.items()), len(self.ids) - self.count))
        if not lacking:
            return b""
        lacking.reverse()
        ids = _Ids(
            [key for key, _ in lacking],
            [packed >> _PACKED_BITS for _, packed in lacking],
            [packed & _LOW for _, packed in lacking],
        )
        data = _encoder.encode(ids)
        chunk = len(data).to_bytes(_LENGTH_BYTES) + data
        self.hash.update(chunk)
        self.count = len(self.ids)
        self.size += len(chunk)
        return chunk

    def append(self, chunk: bytes) -> None:
        """Raises OSError."""
        with self.path.open("r+b" if self.written else "wb") as file:
            file.seek(self.written)
            file.truncate()
            file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.written += len(chunk)

    def part(self) -> _Generation:
        return _Generation(self.path.name, self.size, self.hash.digest())


class Prepared(Struct, frozen=True):
    """A snapshot on its way into its files."""

    seq: int
    data: bytes
    chunks: tuple[tuple[_IdFile, bytes], ...]


class StateFile:
    """Keeps the state of a fold beside a DuckDB file, again and again.

    `prepare` is for while the state stands still, `write` for any thread; they take turns.
    """

    def __init__(self, database: Path, namespace: str) -> None:
        self.path: Final = database.with_suffix(_SNAPSHOT)
        self.namespace: Final = namespace
        self._files: list[_IdFile] = []
        self._number = 0
        """Of the last file of ids."""

    def read(self) -> Hydrated | None:
        """What is kept there; None, with a line in the log, if it cannot be used."""
        try:
            return _read(self.path, self.namespace, LEVEL)
        except FileNotFoundError:
            return None
        except (SnapshotUnreadable, OSError) as error:
            _log.warning("the kept state cannot be read", path=str(self.path), reason=str(error))
            return None

    def prepare(self, state: Namespace, identity: tuple[str, int], chain: bytes) -> Prepared:
        """The state as it is now, of the log with this name and birth."""
        closed = state.closed
        files = [self._file_of(closed.previous), self._file_of(closed.current)]
        self._files = files
        chunks = tuple((file, file.prepare()) for file in files)
        previous, current = (file.part() for file in files)
        document = _Document(
            FORM, *identity, state.seq, chain, state.level, previous, current, _without_ids(state)
        )
        body = _encoder.encode(document)
        return Prepared(state.seq, _digest(body) + body, chunks)

    def _file_of(self, ids: dict[str, int]) -> _IdFile:
        for file in self._files:
            if file.ids is ids:
                return file
        self._number = max([self._number, *map(_number, self._id_files())]) + 1
        return _IdFile(self.path.with_suffix(f".ids-{self._number}"), ids)

    def write(self, prepared: Prepared) -> None:
        """Put it on the disk. Raises OSError; what was kept before stays then, and everything is written anew."""
        try:
            for file, chunk in prepared.chunks:
                if chunk or not file.written:
                    file.append(chunk)
            self._replace(prepared.data)
        except OSError:
            self._files = []
            raise
        self._remove_others({file.path for file, _ in prepared.chunks})

    def _replace(self, data: bytes) -> None:
        fresh = self.path.with_suffix(f"{_SNAPSHOT}.tmp")
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)

    def _id_files(self) -> Sequence[Path]:
        return [path for path in self.path.parent.glob(f"{self.path.stem}.ids-*") if _number(path)]

    def _remove_others(self, needed: set[Path]) -> None:
        for path in self._id_files():
            if path not in needed:
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove all of it: it belongs to a file that is gone."""
        self._files = []
        self.path.unlink(missing_ok=True)
        self._remove_others(set())


def _number(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def _without_ids(state: Namespace) -> bytes:
    light = copy.copy(state)
    memory, closed = Memory(), state.closed
    memory.early, memory.ahead_ms = closed.early, closed.ahead_ms
    memory.started_ms, memory.horizon_ms, memory.oldest = closed.started_ms, closed.horizon_ms, closed.oldest
    light.closed = memory
    return snapshot(light)
