"""One namespace's history, kept whatever happens to its file.

A file that is damaged, gone, replaced or of another release is made anew from the log; one
that is locked, or on a disk that is full, is tried again until that is over. All of this is
said, and none of it ends the process. Only a log that is no longer the one the file was made of
does: which of the two is right is for people to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from agentflow.ending import together
from agentflow.errors import LogGone, OperatingError
from agentflow.log.port import Log
from agentflow.logs import get_logger
from agentflow_nodes.master.hashes import FoldHashes
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_projections.archive import Archive
from agentflow_projections.archive_load import load
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.database import Database, DatabaseDamaged
from agentflow_projections.hydrate import StateFile, history_path
from agentflow_projections.projector import Projector

PAUSE_S_FIRST: Final = 0.5
PAUSE_S_MAX: Final = 30.0
_STABLE_S: Final = 60.0
"""A file that was followed for so long is tried again at once after a fault."""

_INTERRUPT_S: Final = 0.1

_log = get_logger(__name__)


class Projection:
    """A log and its file. `run` ends only with an error: LogGone, InvalidRequest, or a bug."""

    def __init__(
        self,
        log: Log,
        config: ProjectorConfig,
        *,
        pause_s: float = PAUSE_S_FIRST,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.namespace: Final = log.namespace
        self.path: Final = history_path(config.data, log.namespace)
        self.opened: Final = asyncio.Event()
        """Set while the file is open and follows the log."""
        self.projector: Projector | None = None
        self.database: Database | None = None
        """For asking beside the writer, while `opened` is set."""
        self.hashes: FoldHashes | None = None
        """To whom the digests of its fold are handed, if somebody compares them."""
        self._log = log
        self._config = config
        self._pause_s_first = pause_s
        self._sleep = sleep
        self._damage = ""
        self._moved = asyncio.Event()

    async def caught_up(self) -> None:
        """Wait until the file holds what the log holds now. Raises LogGone, Disconnected."""
        target = (await self._log.identity()).last_seq
        while self.projector is None or self.projector.seq < target:
            self._moved.clear()
            await self._moved.wait()

    async def run(self) -> None:
        """Follow for ever."""
        loop = asyncio.get_running_loop()
        pause_s = self._pause_s_first
        while True:
            begun = loop.time()
            try:
                await self._follow()
            except LogGone:
                raise
            except OperatingError as error:
                self._note(error)
            if loop.time() - begun > _STABLE_S:
                pause_s = self._pause_s_first
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def _note(self, error: OperatingError) -> None:
        _log.warning(
            "the history is not followed now",
            namespace=self.namespace,
            path=str(self.path),
            kind=type(error).__name__,
            error=str(error),
        )
        if isinstance(error, DatabaseDamaged):
            self._damage = str(error)

    async def _follow(self) -> None:
        database = Database(self.path, self.namespace, memory_mb=self._config.memory_mb)
        await asyncio.to_thread(database.__enter__)
        try:
            if self._damage:
                await asyncio.to_thread(database.begin_anew, self._damage)
                self._damage = ""
            kept = StateFile(self.path, self.namespace)
            log = await self._with_archive(database, kept)
            projector = Projector(log, database, kept, keep_events=self._config.keep_events)
            try:
                await self._run(projector, database)
            finally:
                self.opened.clear()
                self.projector = self.database = None
                await projector.close()
        finally:
            await asyncio.to_thread(database.__exit__, None, None, None)

    async def _with_archive(self, database: Database, kept: StateFile) -> Log:
        """The log, and before it the archive, if there is one; a file that is empty is filled from that.

        Raises LogGone if they do not belong together, ArchiveDamaged.
        """
        folder = self._config.archive
        if folder is None:
            return self._log
        whole = await ArchivedLog(
            self._log, folder
        ).__aenter__()  # nothing to release: the log is not its own
        if database.checkpoint() is None:
            archive, identity = Archive(folder, self.namespace), await self._log.identity()
            await asyncio.to_thread(load, archive, database, identity, kept)
        return whole

    async def _run(self, projector: Projector, database: Database) -> None:
        await projector.open()
        if self.hashes is not None:
            self.hashes.watch(projector.digests)
        _log.info("following", namespace=self.namespace, path=str(self.path), seq=projector.seq)
        self.projector, self.database = projector, database
        self.opened.set()
        self._moved.set()
        await together(projector.run(progress=lambda _: self._moved.set()), check_file(database))


async def check_file(database: Database) -> None:
    """Look once whether the file can be read whole: what was damaged long ago is not met with otherwise."""
    cursor = database.cursor()
    checking = asyncio.ensure_future(asyncio.to_thread(database.check_blocks, cursor))
    try:
        await asyncio.shield(checking)
    except asyncio.CancelledError:
        while not checking.done():
            cursor.interrupt()
            await asyncio.wait((checking,), timeout=_INTERRUPT_S)
        checking.exception()  # it says that it was interrupted
        raise
