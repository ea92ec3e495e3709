"""A history made of the archive: its tables are loaded as they were sealed, and nothing is folded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from agentflow.domain.snapshot import SnapshotUnreadable
from agentflow.log.port import Identity
from agentflow.logs import get_logger
from agentflow_projections.archive import Archive, ArchiveDamaged, Stretch, read_state
from agentflow_projections.archive_writer import archived_schema
from agentflow_projections.chain import START
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.hydrate import StateFile

_log = get_logger(__name__)


def load(archive: Archive, database: Database, identity: Identity, kept: StateFile | None = None) -> int:
    """Fill an empty database with what is archived; up to which sequence it is then.

    For a log that is the archive's (see `archived_log.check_seam`). 0 if the archive cannot be loaded: it is empty,
    begins with a snapshot, or was sealed by a release with other tables. Then it is read and folded like a log.

    Raises ArchiveDamaged, DatabaseFull and other errors of the file.
    """
    assert database.checkpoint() is None, "only an empty database is filled"
    stretches = _loadable(archive.stretches())
    if not stretches:
        return 0
    end = stretches[-1]
    checkpoint = Checkpoint(
        identity.name, identity.created_ns, stretches[0].manifest.first_seq, end.last_seq, end.chain
    )
    tables = sorted({name for each in stretches for name in each.manifest.files})
    files = {name: [each.file(name) for each in stretches if name in each.manifest.files] for name in tables}
    database.load(files, checkpoint, at_ms=end.manifest.last_ns // 1_000_000)
    if kept is not None and end.has_state:
        _keep_state(end, identity, kept)
    _log.info("loaded from the archive", folder=str(archive.folder), seq=end.last_seq)
    return end.last_seq


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
        _log.warning("an archived state cannot be used", folder=str(end.folder), reason=str(error))
        return
    kept.write(kept.prepare(state, (identity.name, identity.created_ns), end.chain))
