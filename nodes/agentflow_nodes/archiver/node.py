"""The archiver node: one process, one namespace, one archive."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from msgspec import Struct

from agentflow.bus import Bus
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError
from agentflow.log.jetstream import JetStreamLog
from agentflow.logs import get_logger
from agentflow.objects import ObjectStore
from agentflow_projections.archive import Archive, ArchiveDamaged
from agentflow_projections.archive_store import ArchiveLocked
from agentflow_projections.archiver import Archiver, Keep, Sealing

_AGAIN_S: Final = 5.0
"""After what may pass (no server, no bucket, no room on the disk) it is tried again."""

_log = get_logger(__name__)


class ArchiverConfig(Struct, frozen=True, kw_only=True):
    """Everything an archiver is told."""

    where: str | Path
    """The folder or s3://bucket/prefix of the archives of all namespaces."""
    url: str = "nats://127.0.0.1:4222"
    namespace: str = "default"
    keep: Keep = Keep()
    sealing: Sealing = Sealing()


class ArchiverNode:
    """Archives its namespace. An async context manager: entered means it goes on from what is archived.

    Entering raises what `Archiver` raises. Left, what was not sealed is still in the log.
    """

    def __init__(self, config: ArchiverConfig) -> None:
        self.config: Final = config
        self._bus: Final = Bus(config.url, name=f"agentflow archiver {config.namespace}")
        self._stack = AsyncExitStack()
        self._open = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._bus)
            log = await stack.enter_async_context(
                JetStreamLog(self._bus, self.config.namespace, create=False)
            )
            self._task = asyncio.create_task(self._run(log), name=f"archive {self.config.namespace}")
            stack.push_async_callback(end_tasks, self._task)
            await self._until_open(self._task)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why: LogGone, ArchiveDamaged, ArchiveLocked, or a bug."""
        assert self._task is not None, "it was not entered"
        await self._task

    async def _until_open(self, task: asyncio.Task[None]) -> None:
        opened = asyncio.ensure_future(self._open.wait())
        try:
            await asyncio.wait([opened, task], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            opened.cancel()

    async def _run(self, log: JetStreamLog) -> None:
        """Archive for ever, from the beginning again when something failed that may pass."""
        while True:
            try:
                async with archiver_of(self.config, self._bus, log) as archiver:
                    self._open.set()
                    await archiver.run()
            except (LogGone, ArchiveDamaged, ArchiveLocked):
                raise
            except (OperatingError, OSError) as error:
                _log.warning("archiving is tried again", namespace=log.namespace, error=str(error))
            await asyncio.sleep(_AGAIN_S)


def archiver_of(config: ArchiverConfig, bus: Bus, log: JetStreamLog) -> Archiver:
    """The archiver of a configuration."""
    objects = ObjectStore(bus, config.namespace, replicas=log.replicas)
    archive = Archive(config.where, config.namespace)
    return Archiver(log, archive, objects, keep=config.keep, sealing=config.sealing)
