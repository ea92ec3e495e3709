"""Sealing a stretch of the log: rows pile up, and become part of the archive, whole or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from agentflow.domain.snapshot import hash_of
from agentflow.log.port import Message
from agentflow_projections.archive import (
    FORM,
    FRAMES,
    MANIFEST,
    STATE,
    Archive,
    ArchivedFile,
    Manifest,
    Stretch,
    chain_at_end,
    digest_of,
    verify,
)
from agentflow_projections.archive_store import UNFINISHED, ArchiveLocked
from agentflow_projections.chain import chained
from agentflow_projections.columns import arrow_table
from agentflow_projections.database import arrow_schemas, sql

_ZSTD_LEVEL: Final = 6
_PAGE_BYTES: Final = 64 << 20
"""An id stands in a submission, its assignment and its outcome: the compressor has to see them together."""
_GROUP_ROWS: Final = 122_880
"""As many as DuckDB keeps together: then several threads load one file."""
_GROUP_FRAMES: Final = 2_048
"""Frames are large: so many are some 20 MB, ten times what the compressor looks back."""
_PLAIN_TEXT: Final = frozenset({"data", "headers", "id", "runs", "title", "error", "detail", "metadata"})
"""Columns whose values hardly repeat."""

Point = Callable[[str], None]
"""Told what is about to happen: where a test ends the process."""


class Pile:
    """Messages and rows that wait to be sealed."""

    def __init__(self, chain: bytes) -> None:
        self.chain_before = chain
        self.chain = chain
        self.first: Message | None = None
        self.last: Message | None = None
        self.events = 0
        self.bytes = 0
        self._tables: dict[str, list[Any]] = {}

    def add(self, message: Message, events: int) -> None:
        """Count a message whose rows will be handed over."""
        self.first = self.first or message
        self.last = message
        self.events += events
        self.bytes += len(message.data)
        self.chain = chained(self.chain, message)

    def take_rows(self, rows: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
        """Keep rows, as columns: a hundred times smaller than as tuples."""
        for name, found in rows.items():
            table = arrow_table(found, arrow_schemas()[name])
            self._tables.setdefault(name, []).append(table)

    def tables(self) -> dict[str, Any]:
        """All rows by table."""
        return {name: pa.concat_tables(parts) for name, parts in self._tables.items()}


def seal(
    archive: Archive, pile: Pile, identity: tuple[str, int], level: int, point: Point = lambda _: None
) -> Stretch:
    """Write a pile as the archive's next stretch, read it back, and only then say that it is there.

    Raises ArchiveDamaged if what was read is not what was written, ArchiveLocked if somebody else
    has sealed it meanwhile; ArchiveUnreachable, OSError. The archive is then as it was.
    """
    assert pile.first is not None, "nothing to seal"
    assert pile.last is not None, "nothing to seal"
    place = place_of(pile.first.seq, pile.last.seq, pile.first.time_ns)
    point("write")
    files = {table: write(archive, place, table, rows) for table, rows in pile.tables().items()}
    stretch = Stretch(archive.store, place, _manifest(archive.namespace, pile, identity, level, files))
    point("verify")
    verify(stretch)
    _check_alone(archive, pile)
    point("seal")
    put_manifest(stretch)
    return stretch


def place_of(first_seq: int, last_seq: int, first_ns: int) -> str:
    """Where in the archive a stretch belongs."""
    day = datetime.fromtimestamp(first_ns / 1e9, UTC).strftime("%Y-%m-%d")
    return f"{day}/{first_seq:020}-{last_seq:020}"


def _check_alone(archive: Archive, pile: Pile) -> None:
    """In a bucket nothing keeps a second archiver away, so each looks before it seals."""
    stretches = archive.stretches()
    end = chain_at_end(stretches) if stretches else pile.chain_before
    if end != pile.chain_before:
        raise ArchiveLocked(
            f"another archiver works in {archive.where}, and has sealed up to {stretches[-1].last_seq}: one is enough"
        )


def put_manifest(stretch: Stretch) -> None:
    """Let what was written count."""
    text = msgspec.json.format(msgspec.json.encode(stretch.manifest), indent=1) + b"\n"
    stretch.store.put(f"{stretch.place}/{MANIFEST}", text)


def _manifest(
    namespace: str, pile: Pile, identity: tuple[str, int], level: int, files: dict[str, ArchivedFile]
) -> Manifest:
    assert pile.first is not None, "nothing to seal"
    assert pile.last is not None, "nothing to seal"
    return Manifest(
        form=FORM,
        namespace=namespace,
        stream=identity[0],
        created_ns=identity[1],
        first_seq=pile.first.seq,
        last_seq=pile.last.seq,
        first_ns=pile.first.time_ns,
        last_ns=pile.last.time_ns,
        messages=pile.last.seq - pile.first.seq + 1,
        events=pile.events,
        bytes=pile.bytes,
        chain_before=pile.chain_before.hex(),
        chain_after=pile.chain.hex(),
        level=level,
        schema=archived_schema(),
        files=files,
    )


def write(archive: Archive, place: str, name: str, table: Any) -> ArchivedFile:
    """Write rows as a file of a stretch."""
    encodings, dictionaries = _encodings(table.schema)
    options: dict[str, Any] = {
        "row_group_size": _GROUP_FRAMES if name == FRAMES else _GROUP_ROWS,
        "compression": "zstd",
        "compression_level": _ZSTD_LEVEL,
        "use_dictionary": dictionaries,
        "column_encoding": encodings,
        "data_page_size": _PAGE_BYTES,
        "write_statistics": ["seq"] if name == FRAMES else False,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    data = sink.getvalue()
    archive.store.put(f"{place}/{name}.parquet", data)
    return ArchivedFile(table.num_rows, data.size, digest_of(data))


def _encodings(schema: Any) -> tuple[dict[str, str], list[str]]:
    """Numbers grow by little; texts repeat, or are left to the compressor."""
    delta = {
        field.name: "DELTA_BINARY_PACKED"
        for field in schema
        if pa.types.is_integer(field.type) or pa.types.is_timestamp(field.type)
    }
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    return delta, [name for name in texts if name not in _PLAIN_TEXT]


@cache
def archived_schema() -> int:
    """Tells tables of this release from others."""
    return zlib.crc32(sql("schema.sql").encode())


def keep_state(archive: Archive, stretch: Stretch, data: bytes, *, keep: int = 2) -> None:
    """Put the state of the fold beside its stretch; of those before it, `keep` minus one stay.

    Raises ArchiveUnreachable, OSError.
    """
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as packed:
        packed.write(data)
    text = hash_of(data).encode() + b"\n" + sink.getvalue().to_pybytes()
    archive.store.put(f"{stretch.place}/{STATE}", text)
    for place in sorted(archive.states())[:-keep]:
        archive.store.remove(f"{place}/{STATE}")


def remove_unfinished(archive: Archive) -> None:
    """Remove what somebody left who was interrupted, as far as the archive has grown over it.

    What lies beyond its end may be in somebody's hands just now. Raises ArchiveUnreachable, OSError.
    """
    way = {each.place: each for each in archive.stretches()}
    end = max((each.last_seq for each in way.values()), default=0)
    for place, files in archive.places().items():
        if place not in way and 0 < _last_seq(place) <= end:
            remove_stretch(archive, place)
        for file in files:
            if place in way and file.endswith(UNFINISHED):
                archive.store.remove(f"{place}/{file}")


def _last_seq(place: str) -> int:
    """Where a stretch ends by its name; 0: it is none of ours."""
    tail = place.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else 0


def remove_stretch(archive: Archive, place: str) -> None:
    """Remove a stretch, first what makes it count."""
    archive.store.remove(f"{place}/{MANIFEST}")
    archive.store.remove_all(place)
