"""A history kept by whoever asks: the log projected into a file of their own, further each time."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from agentflow.errors import OperatingError
from agentflow.log.port import Log
from agentflow_projections.database import Database, DatabaseLocked
from agentflow_projections.hydrate import StateFile
from agentflow_projections.projector import Projector

KEPT_S_MAX: Final = 30 * 86_400
"""A file that nobody asked for so long is removed."""
_FILE: Final = "history.duckdb"
_LOCK_WAIT_S_MAX: Final = 60.0
_LOCK_PAUSE_S: Final = 0.1

Progress = Callable[[int, int], None]
"""Told how far the file is, and how far it will be."""


def cache_folder() -> Path:
    """Where files of this user are kept that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "agentflow" / "history"


async def refresh(
    log: Log, folder: Path, *, at_least: int = 0, wait_s: float = 30.0, progress: Progress | None = None
) -> Path:
    """Bring the file of this log up to the log's end; its path.

    With `at_least` it waits for a position that is not in the log yet, `wait_s` at most.
    Raises OperatingError if that does not come, or another command has the file open too long.
    """
    identity = await log.identity()
    path = folder / f"{log.namespace}-{identity.created_ns}" / _FILE
    until = max(identity.last_seq, at_least)
    _forget_old(folder)
    async with _open(path, log.namespace) as database:
        projector = Projector(log, database, StateFile(path, log.namespace))
        try:
            await projector.open()
            await _run(projector, until, wait_s if at_least > identity.last_seq else None, progress)
        finally:
            await projector.close()
    os.utime(path)
    return path


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
