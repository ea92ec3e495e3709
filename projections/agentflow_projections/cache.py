"""A history kept by whoever asks: the log projected into a file of their own, further each time."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from agentflow.errors import LogTrimmed, OperatingError
from agentflow.log.port import Log
from agentflow.objects.port import Objects
from agentflow_projections.archive import Archive
from agentflow_projections.archive_load import load
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.database import Checkpoint, Database, DatabaseLocked
from agentflow_projections.hydrate import StateFile
from agentflow_projections.past import LoggedPast
from agentflow_projections.projector import Projector
from agentflow_projections.seed import seed
from agentflow_projections.submissions import Submissions
from agentflow_projections.trimmed import fetch_snapshot

KEPT_S_MAX: Final = 30 * 86_400
"""A file that nobody asked for so long is removed."""
_FILE: Final = "history.duckdb"
_LOCK_WAIT_S_MAX: Final = 60.0
_LOCK_PAUSE_S: Final = 0.1
_ATTEMPTS_MAX: Final = 3

Progress = Callable[[int, int], None]
"""Told how far the file is, and how far it will be."""


def cache_folder() -> Path:
    """Where files of this user are kept that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "agentflow" / "history"


class Refreshed(NamedTuple):
    """A file that is up to date."""

    path: Path
    known_from: int
    """From this position on nothing is missing; of what came before only what was open then is known."""


async def refresh(
    log: Log,
    objects: Objects,
    folder: Path,
    *,
    archive: str | Path | None = None,
    at_least: int = 0,
    wait_s: float = 30.0,
    progress: Progress | None = None,
) -> Refreshed:
    """Bring the file of this log up to the log's end.

    What the file lacks and the log has no more comes from the archive, if one is named. Else the
    file begins with the snapshot that stands for it.

    With `at_least` it waits for a position that is not in the log yet, `wait_s` at most.
    Raises OperatingError if that does not come, or another command has the file open too long;
    LogGone if archive and log do not belong together.
    """
    identity = await log.identity()
    path = folder / f"{log.namespace}-{identity.created_ns}" / _FILE
    until = max(identity.last_seq, at_least)
    _forget_old(folder)
    source = _Source(log if archive is None else await _whole(log, archive), objects, archive)
    async with _open(path, log.namespace) as database:
        kept = StateFile(path, log.namespace)
        projector = await _taken_up(source, database, kept)
        try:
            await _run(projector, until, wait_s if at_least > identity.last_seq else None, progress)
        finally:
            await projector.close()
        checkpoint = database.checkpoint()
    os.utime(path)
    return Refreshed(path, checkpoint.first_seq if checkpoint is not None else 1)


class _Source(NamedTuple):
    """What a file is made of."""

    log: Log
    """With the archive before it, if there is one."""
    objects: Objects
    archive: str | Path | None


async def _whole(log: Log, archive: str | Path) -> Log:
    return await ArchivedLog(log, archive).__aenter__()  # nothing to release: the log is not its own


async def _taken_up(source: _Source, database: Database, kept: StateFile) -> Projector:
    """A projector that goes on where the file ends; what it cannot have from the log is put there before."""
    for attempt in range(_ATTEMPTS_MAX):
        await _fill(source, database, kept)
        projector = Projector(source.log, database, kept)
        try:
            await projector.open()
        except LogTrimmed:  # meanwhile, or the file was no use
            await projector.close()
            if attempt + 1 == _ATTEMPTS_MAX:
                raise
        except BaseException:
            await projector.close()
            raise
        else:
            return projector
    raise AssertionError("unreachable")


async def _fill(source: _Source, database: Database, kept: StateFile) -> None:
    """Begin the file with the archive, or with a snapshot, if the log cannot be read from where the file ends."""
    identity, checkpoint = await source.log.identity(), database.checkpoint()
    if checkpoint is not None:
        begun_late = identity.trim is None and checkpoint.first_seq > identity.first_seq
        if not begun_late and identity.trimmed_seq <= checkpoint.seq:
            return
        database.begin_anew(f"it has {checkpoint.first_seq} to {checkpoint.seq}, which is not what is wanted")
        kept.forget()
    if source.archive is not None:
        archive = Archive(source.archive, source.log.namespace)
        await asyncio.to_thread(load, archive, database, identity, kept)
    if database.checkpoint() is None and identity.trim is not None:
        await _begin_with_snapshot(source, database, kept)


async def _begin_with_snapshot(source: _Source, database: Database, kept: StateFile) -> None:
    state, chain = await fetch_snapshot(source.log, source.objects)
    identity = await source.log.identity()
    begin = Checkpoint(identity.name, identity.created_ns, state.seq + 1, state.seq, chain)
    positions = {task.seq for task in state.tasks.values()}
    positions |= {workflow.seq for workflow in state.workflows.values()}
    past = LoggedPast(source.log, identity, source.objects)
    rows = seed(state, Submissions(await past.read(positions)))
    database.commit(rows, begin, at_ms=state.clock_ms)
    kept.write(kept.prepare(state, (identity.name, identity.created_ns), chain))


async def _run(projector: Projector, until: int, wait_s: float | None, progress: Progress | None) -> None:
    tell = None if progress is None else lambda seq: progress(seq, until)
    try:
        async with asyncio.timeout(wait_s):
            await projector.run(until=until, progress=tell)
    except TimeoutError as error:
        raise OperatingError(
            f"position {until} did not come within {wait_s:.0f} s: the log reaches to {projector.seq}"
        ) from error


@asynccontextmanager
async def _open(path: Path, namespace: str) -> AsyncGenerator[Database]:
    """The file for writing, once no other command has it open."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LOCK_WAIT_S_MAX
    with ExitStack() as stack:
        database = None
        while database is None:
            try:
                database = stack.enter_context(Database(path, namespace))
            except DatabaseLocked:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(_LOCK_PAUSE_S)
        yield database


def _forget_old(folder: Path) -> None:
    """Remove what nobody asked for in a long time; such files can be made again."""
    oldest = time.time() - KEPT_S_MAX
    for path in folder.glob(f"*/{_FILE}"):
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path.parent)
