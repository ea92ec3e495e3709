"""The archive of a namespace's log: what was sealed, in Parquet files, by day.

    <folder>/<namespace>/<day>/<first>-<last>/
        frames.parquet           the messages, byte by byte
        task_changes.parquet     and the other tables of schema.sql that have rows of this stretch
        state.snapshot           the state of the fold at the stretch's end; of the latest stretches only
        manifest.json            what is there, and what it has to hash to

A stretch is written under another name, read back against the hash chain, and then renamed:
what has its name is whole. Each goes on where the one before it ended, so that from the first
manifest to the last one chain leads over all messages. Whoever is interrupted leaves at most a
folder with a name nobody reads, which the next archiver removes.

Frames alone are enough to rebuild everything, by folding them. The other tables are what the
fold said of them when they were archived: with the same schema they are loaded as they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
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
from agentflow_projections.chain import START, chained

FORM: Final = 1
"""Raised with every change of what lies where in a stretch."""
MANIFEST: Final = "manifest.json"
FRAMES: Final = "frames"
STATE: Final = "state.snapshot"
UNFINISHED: Final = ".unfinished"

_HASH_BYTES: Final = 1 << 20
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

    folder: Path
    manifest: Manifest

    @property
    def last_seq(self) -> int:
        """The sequence of its last message."""
        return self.manifest.last_seq

    @property
    def chain(self) -> bytes:
        """The hash chain at its end."""
        return bytes.fromhex(self.manifest.chain_after)

    @property
    def has_state(self) -> bool:
        """Whether the state at its end was kept."""
        return (self.folder / STATE).exists()

    def file(self, table: str) -> Path:
        """Where the rows of a table are."""
        return self.folder / f"{table}.parquet"


class Archive:
    """The archive of one namespace in a folder, as it is on the disk."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.namespace: Final = namespace
        self.folder: Final = folder / namespace

    def stretches(self) -> list[Stretch]:
        """All of it, in order. Raises ArchiveDamaged if something is missing between, or cannot be read."""
        found = [_stretch(path.parent, self.namespace) for path in self._manifests()]
        for before, after in itertools.pairwise(found):
            expected = (before.last_seq + 1, before.manifest.chain_after)
            if (after.manifest.first_seq, after.manifest.chain_before) != expected:
                raise ArchiveDamaged(
                    f"{after.folder} begins at {after.manifest.first_seq} with chain {after.manifest.chain_before},"
                    f" expected {expected[0]} and {expected[1]}, where {before.folder} ends"
                )
        return found

    def _manifests(self) -> list[Path]:
        paths = self.folder.glob(f"*/*/{MANIFEST}")
        return sorted((path for path in paths if UNFINISHED not in path.parent.name), key=_first_seq)

    def messages(self, after: int = 0, until: int | None = None) -> Iterator[list[Message]]:
        """The messages after a sequence, in order, some at a time. Raises ArchiveDamaged."""
        for stretch in self.stretches():
            if stretch.last_seq <= after:
                continue
            if until is not None and stretch.manifest.first_seq > until:
                return
            for messages in read_messages(stretch):
                wanted = [
                    each for each in messages if each.seq > after and (until is None or each.seq <= until)
                ]
                if wanted:
                    yield wanted

    def state(self, stretches: Sequence[Stretch], *, level: int = LEVEL) -> Namespace | None:
        """The state of the fold at the end of the latest stretch that has one; None: fold from the start."""
        for stretch in reversed(stretches):
            try:
                if stretch.has_state:
                    return read_state(stretch, level=level)
            except (SnapshotUnreadable, ArchiveDamaged) as error:
                _log.warning(
                    "an archived state cannot be used", folder=str(stretch.folder), reason=str(error)
                )
        return None


def _first_seq(path: Path) -> int:
    head = path.parent.name.partition("-")[0]
    return int(head) if head.isascii() and head.isdigit() else -1


def _stretch(folder: Path, namespace: str) -> Stretch:
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error}") from error
    if manifest.form != FORM:
        raise ArchiveDamaged(f"{path} is of form {manifest.form}; this release reads {FORM}")
    if manifest.namespace != namespace:
        raise ArchiveDamaged(f"{path} is of namespace {manifest.namespace!r}, expected {namespace!r}")
    return Stretch(folder, manifest)


def read_messages(stretch: Stretch) -> Iterator[list[Message]]:
    """The messages of a stretch, in order, some at a time. Raises ArchiveDamaged."""
    path = stretch.file(FRAMES)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_READ_ROWS, columns=list(_COLUMNS)):
                yield _messages(batch, stretch.manifest.namespace)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error}") from error


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
    path = stretch.folder / STATE
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
        plain = pa.input_stream(pa.BufferReader(data), compression="zstd").read()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error}") from error
    if hash_of(plain) != digest.decode("ascii", "replace"):
        raise ArchiveDamaged(f"{path} does not hash to what was written: it is damaged")
    state = restore(plain, knows=level)
    if state.seq != stretch.last_seq:
        raise ArchiveDamaged(f"{path} is of position {state.seq}, expected {stretch.last_seq}")
    return state


def verify(stretch: Stretch) -> None:
    """Read a stretch whole: every file by its digest, every message by the chain. Raises ArchiveDamaged."""
    manifest = stretch.manifest
    for name, expected in manifest.files.items():
        _verify_file(stretch.file(name), expected)
    chain, seq = bytes.fromhex(manifest.chain_before), manifest.first_seq - 1
    for messages in read_messages(stretch):
        for message in messages:
            if message.seq != seq + 1:
                raise ArchiveDamaged(f"{stretch.folder} holds {message.seq} but not {seq + 1}")
            chain, seq = chained(chain, message), message.seq
    if (seq, chain.hex()) != (manifest.last_seq, manifest.chain_after):
        raise ArchiveDamaged(
            f"{stretch.folder} ends at {seq} with chain {chain.hex()}, expected {manifest.last_seq} and"
            f" {manifest.chain_after}"
        )


def _verify_file(path: Path, expected: ArchivedFile) -> None:
    try:
        found = path.stat().st_size, digest_of(path)
    except OSError as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error}") from error
    if found != (expected.size, expected.sha256):
        raise ArchiveDamaged(
            f"{path}: expected {expected.size} bytes of SHA-256 {expected.sha256}, found {found[0]} of {found[1]}"
        )


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises OSError."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASH_BYTES):
            found.update(part)
    return found.hexdigest()


def chain_at_end(stretches: Sequence[Stretch]) -> bytes:
    """The hash chain over all that is archived."""
    return stretches[-1].chain if stretches else START
