"""Many small stretches of a day become one.

The large one is written, read back against the hash chain and sealed as any other; only then
are the small ones removed. Killed in between, the archive is the large one already, and the next
archiver removes what is left of the others. Who reads a small one that goes away under him goes on in
the large one, after the last message he has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec.structs import replace

from agentflow_projections.archive import (
    STATE,
    Archive,
    ArchiveDamaged,
    ArchivedFile,
    Manifest,
    Stretch,
    verify,
)
from agentflow_projections.archive_writer import Point, place_of, put_manifest, remove_stretch, write


def groups(stretches: Sequence[Stretch], *, events: int, size: int) -> Iterator[list[Stretch]]:
    """Neighbours that fit together into one: of one day, one log and one release's tables, and not too large."""
    for _, alike in groupby(stretches, key=_kind):
        group: list[Stretch] = []
        for each in alike:
            more = [*group, each]
            if _total(more, "events") > events or _total(more, "bytes") > size:
                if len(group) > 1:
                    yield group
                group = []
            group.append(each)
        if len(group) > 1:
            yield group


def _kind(stretch: Stretch) -> tuple[Any, ...]:
    manifest = stretch.manifest
    return stretch.day, manifest.stream, manifest.created_ns, manifest.schema


def _total(group: Sequence[Stretch], field: str) -> int:
    return sum(getattr(each.manifest, field) for each in group)


def merge(archive: Archive, group: Sequence[Stretch], point: Point = lambda _: None) -> Stretch:
    """Put one stretch in the place of several that follow each other.

    Raises ArchiveDamaged: they stay then; ArchiveUnreachable, OSError.
    """
    for each in group:
        verify(each)
    manifests = [each.manifest for each in group]
    place = place_of(manifests[0].first_seq, manifests[-1].last_seq, manifests[0].first_ns)
    point("compact")
    tables = sorted({name for each in manifests for name in each.files})
    files = {name: write(archive, place, name, _rows(group, name)) for name in tables}
    merged = Stretch(archive.store, place, _manifest(manifests, files))
    verify(merged)
    if group[-1].place in archive.states():
        archive.store.put(f"{place}/{STATE}", group[-1].read(STATE))
    point("replace")
    put_manifest(merged)
    for each in group:
        point("remove")
        remove_stretch(archive, each.place)
    return merged


def _rows(group: Sequence[Stretch], table: str) -> Any:
    parts = [each for each in group if table in each.manifest.files]
    rows = pa.concat_tables(pq.read_table(pa.BufferReader(each.read(f"{table}.parquet"))) for each in parts)
    expected = sum(each.manifest.files[table].rows for each in parts)
    if rows.num_rows != expected:
        raise ArchiveDamaged(f"{parts[0].where}: expected {expected} rows of {table}, found {rows.num_rows}")
    return rows


def _manifest(parts: Sequence[Manifest], files: dict[str, ArchivedFile]) -> Manifest:
    first = parts[0]
    return replace(
        parts[-1],
        first_seq=first.first_seq,
        first_ns=first.first_ns,
        messages=sum(each.messages for each in parts),
        events=sum(each.events for each in parts),
        bytes=sum(each.bytes for each in parts),
        chain_before=first.chain_before,
        files=files,
    )
