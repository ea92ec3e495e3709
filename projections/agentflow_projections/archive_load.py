"""A history made of the archive: its tables are loaded as they were sealed, and nothing is folded."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Final

from agentflow.domain.snapshot import SnapshotUnreadable
from agentflow.errors import OperatingError
from agentflow.log.port import Identity
from agentflow.logs import get_logger
from agentflow_projections.archive import Archive, ArchiveDamaged, Stretch, read_state
from agentflow_projections.archive_writer import archived_schema
from agentflow_projections.chain import START
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.hydrate import StateFile

_WAL_MIN: Final = "1 MiB"

_log = get_logger(__name__)


def load(archive: Archive, database: Database, identity: Identity, kept: StateFile | None = None) -> int:
    """Fill an empty database with what is archived; up to which sequence it is then.

    For a log that is the archive's (see `archived_log.check_seam`). 0 if the archive cannot be loaded: it is empty,
    begins with a snapshot, or was sealed by a release with other tables. Then it is read and folded like a log.

    Raises ArchiveDamaged, DatabaseFull and other errors of the file.
    """
    assert database.checkpoint() is None, "only an empty database is filled"
    stretches = archive.stretches()
    while (loadable := _loadable(stretches)) and not _fill(database, loadable, identity):
        before, stretches = stretches, archive.stretches()
        if before == stretches:
            raise ArchiveDamaged(f"{archive.where}: files of it are missing")
    if not loadable:
        return 0
    end = loadable[-1]
    if kept is not None and end.place in archive.states():
        _keep_state(end, identity, kept)
    _log.info("loaded from the archive", where=archive.where, seq=end.last_seq)
    return end.last_seq


def _fill(database: Database, stretches: Sequence[Stretch], identity: Identity) -> bool:
    """Load all of them, or nothing; False if some are gone: larger ones have taken their place."""
    end, names = stretches[-1], [(table, each) for each in stretches for table in each.manifest.files]
    checkpoint = Checkpoint(
        identity.name, identity.created_ns, stretches[0].manifest.first_seq, end.last_seq, end.chain
    )
    try:
        with end.store.files([each.name(table) for table, each in names]) as paths:
            files: dict[str, list[Path]] = {}
            for (table, _), path in zip(names, paths, strict=True):
                files.setdefault(table, []).append(path)
            return _load(database, files, checkpoint, at_ms=end.manifest.last_ns // 1_000_000)
    except FileNotFoundError:
        return False


def _load(database: Database, files: Mapping[str, Sequence[Path]], to: Checkpoint, *, at_ms: int) -> bool:
    try:
        with _in_bulk(database):
            database.load(files, to, at_ms=at_ms)
    except OperatingError:
        if all(path.exists() for paths in files.values() for path in paths):
            raise
        return False
    return True


@contextmanager
def _in_bulk(database: Database) -> Generator[None]:
    """Write straight into the file, with all cores: what is written so large goes through the WAL for nothing."""
    query = "SELECT current_setting('checkpoint_threshold'), current_setting('threads')"
    before = database.ask(query).fetchone()
    _set(database, (_WAL_MIN, os.cpu_count() or 1))
    try:
        yield
    finally:
        _set(database, before)


def _set(database: Database, values: tuple[str, int]) -> None:
    threshold, threads = values
    database.ask(f"SET checkpoint_threshold = '{threshold}'").close()
    database.ask(f"SET threads = {threads}").close()


def _loadable(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Those from the beginning whose tables are this release's."""
    if not stretches or bytes.fromhex(stretches[0].manifest.chain_before) != START:
        return []
    return list(takewhile(lambda each: each.manifest.schema == archived_schema(), stretches))


def _keep_state(end: Stretch, identity: Identity, kept: StateFile) -> None:
    """Put the state beside the file, too: who opens it need not fold what was loaded."""
    try:
        state = read_state(end)
    except (SnapshotUnreadable, ArchiveDamaged) as error:
        _log.warning("an archived state cannot be used", where=end.where, reason=str(error))
        return
    kept.write(kept.prepare(state, (identity.name, identity.created_ns), end.chain))
