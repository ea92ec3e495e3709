"""Sealing a stretch of the log: rows pile up, and become a folder of the archive, whole or not at all."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
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
    UNFINISHED,
    Archive,
    ArchivedFile,
    Manifest,
    Stretch,
    digest_of,
    verify,
)
from agentflow_projections.chain import chained
from agentflow_projections.columns import Columns
from agentflow_projections.database import _arrow_schemas, sql

_ZSTD_LEVEL: Final = 6
_PAGE_BYTES: Final = 64 << 20
"""An id stands in a submission, its assignment and its outcome: the compressor has to see them together."""
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
            schema = _arrow_schemas()[name]
            columns = found.columns() if isinstance(found, Columns) else zip(*found, strict=True)
            arrays = [pa.array(column, field.type) for field, column in zip(schema, columns, strict=True)]
            table = pa.Table.from_arrays(arrays, schema=schema)
            self._tables.setdefault(name, []).append(table)

    def tables(self) -> dict[str, Any]:
        """All rows by table."""
        return {name: pa.concat_tables(parts) for name, parts in self._tables.items()}


def seal(
    archive: Archive, pile: Pile, identity: tuple[str, int], level: int, point: Point = lambda _: None
) -> Stretch:
    """Write a pile as the archive's next stretch, read it back, and only then give it its name.

    Raises ArchiveDamaged if what was read is not what was written; OSError. The archive is then as it was.
    """
    assert pile.first is not None, "nothing to seal"
    assert pile.last is not None, "nothing to seal"
    day = datetime.fromtimestamp(pile.first.time_ns / 1e9, UTC).strftime("%Y-%m-%d")
    name = f"{pile.first.seq:020}-{pile.last.seq:020}"
    folder = archive.folder / day / name
    fresh = folder.with_name(name + UNFINISHED)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    point("write")
    files = {table: _write(fresh / f"{table}.parquet", rows) for table, rows in pile.tables().items()}
    stretch = Stretch(fresh, _manifest(archive.namespace, pile, identity, level, files))
    _put(fresh / MANIFEST, msgspec.json.format(msgspec.json.encode(stretch.manifest), indent=1) + b"\n")
    point("verify")
    verify(stretch)
    _sync(fresh)
    point("rename")
    fresh.rename(folder)
    _sync(folder.parent)
    _sync(archive.folder)
    return Stretch(folder, stretch.manifest)


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


def _write(path: Path, table: Any) -> ArchivedFile:
    encodings, dictionaries = _encodings(table.schema)
    options: dict[str, Any] = {
        "row_group_size": max(table.num_rows, 1),
        "compression": "zstd",
        "compression_level": _ZSTD_LEVEL,
        "use_dictionary": dictionaries,
        "column_encoding": encodings,
        "data_page_size": _PAGE_BYTES,
        "write_statistics": ["seq"] if path.stem == FRAMES else False,
    }
    pq.write_table(table, path, **options)
    _sync(path)
    return ArchivedFile(table.num_rows, path.stat().st_size, digest_of(path))


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

    Raises OSError.
    """
    path = stretch.folder / STATE
    fresh = path.with_name(STATE + UNFINISHED)
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as packed:
        packed.write(data)
    _put(fresh, hash_of(data).encode() + b"\n" + sink.getvalue().to_pybytes())
    fresh.rename(path)
    _sync(stretch.folder)
    kept = [each for each in archive.stretches() if each.has_state]
    for each in kept[:-keep]:
        (each.folder / STATE).unlink(missing_ok=True)


def remove_unfinished(archive: Archive) -> None:
    """Remove what somebody left who was interrupted."""
    for path in archive.folder.glob(f"*/*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in archive.folder.glob(f"*/*/*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make a file, or what a folder lists, outlast a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
