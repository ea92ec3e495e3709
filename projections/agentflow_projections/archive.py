"""The archive of a namespace's log: what was sealed, in Parquet files, by day.

    <folder or s3://bucket/prefix>/<namespace>/<day>/<first>-<last>/
        frames.parquet           the messages, byte by byte
        task_changes.parquet     and the other tables of schema.sql that have rows of this stretch
        state.snapshot           the state of the fold at the stretch's end; of the latest stretches only
        manifest.json            what is there, and what it has to hash to; written last

A stretch is written, read back against the hash chain, and then its manifest is written: what
has one is whole. Each goes on where the one before it ended, so that from the first
manifest to the last one chain leads over all messages. Whoever is interrupted leaves at most
files without a manifest, which nobody reads and a later archiver removes.

Small stretches of a day become one large one. It is sealed before they are removed, and for as
long as both are there the way that leads farthest over the fewest is the archive.

Frames alone are enough to rebuild everything, by folding them. The other tables are what the
fold said of them when they were archived: with the same schema they are loaded as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from agentflow import wire
from agentflow.domain.snapshot import SnapshotUnreadable, hash_of, restore
from agentflow.domain.state import Namespace
from agentflow.errors import OperatingError
from agentflow.frames import decode_any
from agentflow.limits import LEVEL
from agentflow.log.port import Message
from agentflow.logs import get_logger
from agentflow_projections.archive_store import UNFINISHED, Store, open_store
from agentflow_projections.chain import START, chained

FORM: Final = 1
"""Raised with every change of what lies where in a stretch."""
MANIFEST: Final = "manifest.json"
FRAMES: Final = "frames"
STATE: Final = "state.snapshot"

_READ_ROWS: Final = 2_048
_COLUMNS: Final = ("seq", "stored_ns", "subject", "kind", "actor", "data", "headers")

_log = get_logger(__name__)


class ArchiveDamaged(OperatingError):
    """What lies in the archive is not what was sealed there."""


class ArchivedFile(Struct, frozen=True):
    """A file of a stretch."""

    rows: int
    size: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What a stretch is."""

    form: int
    namespace: str
    stream: str
    created_ns: int
    first_seq: int
    last_seq: int
    first_ns: int
    last_ns: int
    messages: int
    events: int
    bytes: int
    """Of data and headers, before compression."""
    chain_before: str
    chain_after: str
    level: int
    """The contract level in force at its end."""
    schema: int
    """Of which schema.sql the tables beside the frames are."""
    files: dict[str, ArchivedFile]


class Stretch(Struct, frozen=True):
    """A sealed stretch, and where it lies."""

    store: Store
    """Of its namespace."""
    place: str
    """Its day and its name."""
    manifest: Manifest

    @property
    def where(self) -> str:
        """As people name it."""
        return f"{self.store.where}/{self.place}"

    @property
    def day(self) -> str:
        """On which it began, in UTC."""
        return self.place.partition("/")[0]

    @property
    def last_seq(self) -> int:
        """The sequence of its last message."""
        return self.manifest.last_seq

    @property
    def chain(self) -> bytes:
        """The hash chain at its end."""
        return bytes.fromhex(self.manifest.chain_after)

    def name(self, table: str) -> str:
        """The name of the rows of a table, in the store."""
        return f"{self.place}/{table}.parquet"

    def read(self, file: str) -> Any:
        """A buffer of one of its files. Raises ArchiveDamaged if it is not there, ArchiveUnreachable."""
        try:
            return self.store.read(f"{self.place}/{file}")
        except OSError as error:
            raise ArchiveDamaged(f"{self.where}/{file} cannot be read: {error}") from error


class Archive:
    """The archive of one namespace, as it is stored."""

    def __init__(self, where: str | Path, namespace: str) -> None:
        self.namespace: Final = namespace
        self.store: Final = open_store(where).within(namespace)
        self._known: dict[str, Stretch] = {}
        """What was read already: a manifest never changes."""

    @property
    def where(self) -> str:
        """As people name it."""
        return self.store.where

    def stretches(self) -> list[Stretch]:
        """All of it, in order. Raises ArchiveDamaged if something is missing between, or cannot be read."""
        return _one_way(self.sealed())

    def sealed(self) -> list[Stretch]:
        """Every stretch that has its manifest, also those that a larger one has taken the place of."""
        places = [place for place, files in self.places().items() if MANIFEST in files]
        found = (self._stretch(place) for place in places)
        # One that was listed and is gone has been taken the place of.
        self._known = {each.place: each for each in found if each is not None}
        return list(self._known.values())

    def places(self) -> dict[str, set[str]]:
        """What is stored: the files by their day and stretch, finished or not."""
        found: dict[str, set[str]] = {}
        for name in self.store.names():
            place, _, file = name.rpartition("/")
            if place.count("/") == 1:
                found.setdefault(place, set()).add(file)
        return {place: files for place, files in found.items() if not place.endswith(UNFINISHED)}

    def states(self) -> set[str]:
        """The places of stretches whose state was kept."""
        return {place for place, files in self.places().items() if STATE in files}

    def _stretch(self, place: str) -> Stretch | None:
        known = self._known.get(place)
        return _stretch(self.store, place, self.namespace) if known is None else known

    def messages(self, after: int = 0, until: int | None = None) -> Iterator[list[Message]]:
        """The messages after a sequence, in order, some at a time. Raises ArchiveDamaged."""
        waiting = self._behind(after)
        while waiting and (until is None or waiting[0].manifest.first_seq <= until):
            stretch = waiting.pop(0)
            try:
                for messages in read_messages(stretch):
                    wanted = [
                        each for each in messages if each.seq > after and (until is None or each.seq <= until)
                    ]
                    if wanted:
                        yield wanted
                        after = wanted[-1].seq
            except ArchiveDamaged:
                waiting = self._behind(after)
                if any(each.place == stretch.place for each in waiting):
                    raise

    def _behind(self, after: int) -> list[Stretch]:
        return [each for each in self.stretches() if each.last_seq > after]

    def state(self, stretches: Sequence[Stretch], *, level: int = LEVEL) -> Namespace | None:
        """The state of the fold at the end of the latest stretch that has one; None: fold from the start."""
        kept = self.states()
        for stretch in reversed(stretches):
            try:
                if stretch.place in kept:
                    return read_state(stretch, level=level)
            except (SnapshotUnreadable, ArchiveDamaged) as error:
                _log.warning("an archived state cannot be used", where=stretch.where, reason=str(error))
        return None


def _stretch(store: Store, place: str, namespace: str) -> Stretch | None:
    """The stretch of a place; None: it is gone."""
    where = f"{store.where}/{place}/{MANIFEST}"
    try:
        manifest = msgspec.json.decode(bytes(store.read(f"{place}/{MANIFEST}")), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ArchiveDamaged(f"{where} cannot be read: {error}") from error
    if manifest.form != FORM:
        raise ArchiveDamaged(f"{where} is of form {manifest.form}; this release reads {FORM}")
    if manifest.namespace != namespace:
        raise ArchiveDamaged(f"{where} is of namespace {manifest.namespace!r}, expected {namespace!r}")
    return Stretch(store, place, manifest)


_End = tuple[int, str]
"""A sequence, and the hash chain there."""


def _one_way(found: Sequence[Stretch]) -> list[Stretch]:
    """Of all stretches those that lead farthest, over the fewest. Raises ArchiveDamaged if one is left out beyond."""
    ordered = sorted(found, key=lambda each: each.manifest.first_seq)
    if not ordered:
        return []
    begin = _begin(ordered[0])
    steps: dict[_End, int] = {begin: 0}
    last: dict[_End, Stretch] = {}
    for each in ordered:
        before, end = _begin(each), (each.last_seq, each.manifest.chain_after)
        if before in steps and (end not in steps or steps[before] + 1 < steps[end]):
            steps[end] = steps[before] + 1
            last[end] = each
    return _walked_back(ordered, last, begin)


def _walked_back(ordered: Sequence[Stretch], last: Mapping[_End, Stretch], begin: _End) -> list[Stretch]:
    end = max(last)
    beyond = next((each for each in ordered if each.last_seq > end[0]), None)
    if beyond is not None:
        raise ArchiveDamaged(
            f"{beyond.where} begins at {beyond.manifest.first_seq} with chain {beyond.manifest.chain_before},"
            f" expected {end[0] + 1} and {end[1]}, where {last[end].where} ends"
        )
    way = [last[end]]
    while _begin(way[-1]) != begin:
        way.append(last[_begin(way[-1])])
    return way[::-1]


def _begin(stretch: Stretch) -> _End:
    return stretch.manifest.first_seq - 1, stretch.manifest.chain_before


def read_messages(stretch: Stretch) -> Iterator[list[Message]]:
    """The messages of a stretch, in order, some at a time. Raises ArchiveDamaged."""
    yield from _decoded(stretch, stretch.read(f"{FRAMES}.parquet"))


def _decoded(stretch: Stretch, data: Any) -> Iterator[list[Message]]:
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            for batch in file.iter_batches(_READ_ROWS, columns=list(_COLUMNS)):
                yield _messages(batch, stretch.manifest.namespace)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ArchiveDamaged(f"{stretch.where}/{FRAMES}.parquet cannot be read: {error}") from error


def _messages(batch: Any, namespace: str) -> list[Message]:
    columns = [batch.column(name).to_pylist() for name in _COLUMNS]
    return [
        Message(
            seq,
            time_ns,
            subject or wire.event(namespace, kind, actor),
            data,
            decode_any(headers) if headers else None,
        )
        for seq, time_ns, subject, kind, actor, data, headers in zip(*columns, strict=True)
    ]


def read_state(stretch: Stretch, *, level: int = LEVEL) -> Namespace:
    """The state of the fold at the end of a stretch. Raises SnapshotUnreadable, ArchiveDamaged."""
    where = f"{stretch.where}/{STATE}"
    digest, _, data = bytes(stretch.read(STATE)).partition(b"\n")
    try:
        plain = pa.input_stream(pa.BufferReader(data), compression="zstd").read()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveDamaged(f"{where} cannot be read: {error}") from error
    if hash_of(plain) != digest.decode("ascii", "replace"):
        raise ArchiveDamaged(f"{where} does not hash to what was written: it is damaged")
    state = restore(plain, knows=level)
    if state.seq != stretch.last_seq:
        raise ArchiveDamaged(f"{where} is of position {state.seq}, expected {stretch.last_seq}")
    return state


def verify(stretch: Stretch) -> None:
    """Read a stretch whole: every file by its digest, every message by the chain. Raises ArchiveDamaged."""
    manifest = stretch.manifest
    for table, expected in manifest.files.items():
        if table != FRAMES:
            _verified(stretch, f"{table}.parquet", expected)
    frames = _verified(stretch, f"{FRAMES}.parquet", manifest.files[FRAMES])
    chain, seq = bytes.fromhex(manifest.chain_before), manifest.first_seq - 1
    for messages in _decoded(stretch, frames):
        for message in messages:
            if message.seq != seq + 1:
                raise ArchiveDamaged(f"{stretch.where} holds {message.seq} but not {seq + 1}")
            chain, seq = chained(chain, message), message.seq
    if (seq, chain.hex()) != (manifest.last_seq, manifest.chain_after):
        raise ArchiveDamaged(
            f"{stretch.where} ends at {seq} with chain {chain.hex()}, expected {manifest.last_seq} and"
            f" {manifest.chain_after}"
        )


def _verified(stretch: Stretch, file: str, expected: ArchivedFile) -> Any:
    """A buffer of a file that is what was sealed."""
    data = stretch.read(file)
    found = len(data), digest_of(data)
    if found != (expected.size, expected.sha256):
        raise ArchiveDamaged(
            f"{stretch.where}/{file}: expected {expected.size} bytes of SHA-256 {expected.sha256},"
            f" found {found[0]} of {found[1]}"
        )
    return data


def digest_of(data: Any) -> str:
    """The SHA-256 of a buffer, in hex."""
    return hashlib.sha256(data).hexdigest()


def chain_at_end(stretches: Sequence[Stretch]) -> bytes:
    """The hash chain over all that is archived."""
    return stretches[-1].chain if stretches else START
