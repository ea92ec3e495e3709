"""The projector node: one process, a DuckDB file for each namespace it follows."""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Final, Self

from agentflow import wire
from agentflow.bus import Bus
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError, StreamMismatch
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.stream import stream_names
from agentflow.logs import get_logger
from agentflow_nodes.master.hashes import FoldHashes
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.projection import Projection
from agentflow_projections.hydrate import history_path
from agentflow_projections.service import QueryService

_DISCOVER_S: Final = 2.0
_NAMES_TIMEOUT_S: Final = 5.0

_CATCH_UP_S_MAX: Final = 3.0
# As a master's: a fold is long-lived objects only, and collecting them often buys nothing.
_GC_THRESHOLD: Final = (100_000, 20, 100)
_CLOSE_S_MAX: Final = 6.0

_log = get_logger(__name__)


class ProjectorNode:
    """Follows its namespaces. An async context manager: entered means that their logs are read.

    Left, the files hold what the logs hold, if that did not take long, and are closed.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        self.config: Final = config
        self.bus: Final = Bus(config.url, name=f"agentflow projector {config.name}")
        self.projections: Final[dict[str, Projection]] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._done: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()
        self._unfit: set[str] = set()
        self._awaited: set[str] = set()
        """Namespaces named that had no log."""
        self._instance = secrets.token_hex(8)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        gc.set_threshold(*_GC_THRESHOLD)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            stack.push_async_callback(self._end_tasks)
            for namespace in self.config.namespaces:
                await self._add_named(namespace)
            if self.config.discover:
                await self._discover_once()
            if self.config.discover or self._awaited:
                self._start(self._discover(), "")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._catch_up()
        await self._stack.aclose()

    async def _catch_up(self) -> None:
        """Whoever ended before us has its last words in the files, unless those are far behind."""
        with suppress(TimeoutError, OperatingError):
            async with asyncio.timeout(_CATCH_UP_S_MAX):
                await asyncio.gather(*(each.caught_up() for each in self.projections.values()))

    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why: LogGone, InvalidRequest, or a bug."""
        while True:
            self._settle(await self._done.get())

    def _settle(self, task: asyncio.Task[None]) -> None:
        """Raise what ended a task, unless it is a log of several that is gone."""
        namespace = self._tasks.pop(task)
        if task.cancelled():
            return
        try:
            task.result()
        except LogGone as error:
            if len(self.projections) < 2 or namespace not in self.projections:  # noqa: PLR2004 - the only one
                raise
            _log.error(
                "the log is gone: this namespace is followed no more", namespace=namespace, error=str(error)
            )
            del self.projections[namespace]
            self._unfit.add(namespace)

    async def _add_named(self, namespace: str) -> None:
        """Follow it, or wait for it to come to be: who only reads makes no log in the place of one that is gone.

        Raises LogGone if there was a log before.
        """
        try:
            await self._add(namespace)
        except LogGone:
            if history_path(self.config.data, namespace).exists():
                raise
            _log.warning("there is no log yet", namespace=namespace)
            self._awaited.add(namespace)

    async def _add(self, namespace: str) -> None:
        log = JetStreamLog(self.bus, namespace, replicas=self.config.replicas, create=False)
        await log.__aenter__()  # nothing to release: the bus is ours
        self.projections[namespace] = Projection(log, self.config)
        self._start(self._follow(self.projections[namespace]), namespace)

    async def _follow(self, projection: Projection) -> None:
        """Keep the file, answer questions about it, and compare its fold with others'."""
        namespace, name = projection.namespace, self.config.name
        hashes = FoldHashes(self.bus, namespace, name, self._instance, projection.opened.is_set)
        projection.hashes = hashes
        await hashes.listen()
        try:
            async with QueryService(self.bus, namespace, lambda: projection.database):
                await projection.run()
        finally:
            hashes.close()

    async def _discover(self) -> None:
        while self.config.discover or self._awaited - self.projections.keys():
            await asyncio.sleep(_DISCOVER_S)
            try:
                await self._discover_once()
            except OperatingError as error:
                _log.warning("namespaces could not be looked for", error=str(error))

    async def _discover_once(self) -> None:
        for name in await stream_names(self.bus, _NAMES_TIMEOUT_S):
            namespace = wire.parse_stream(name)
            if namespace is None or namespace in self.projections or namespace in self._unfit:
                continue
            if not self.config.discover and namespace not in self._awaited:
                continue
            try:
                await self._add(namespace)
            except LogGone:  # in the meantime
                continue
            except StreamMismatch as error:
                self._unfit.add(namespace)
                _log.warning("not a log of ours: this namespace is not followed", error=str(error))
            except OperatingError as error:  # the others are found all the same
                _log.warning("a namespace is not followed yet", namespace=namespace, error=str(error))
            else:
                _log.info("namespace found", namespace=namespace)

    def _start(self, coroutine: Coroutine[Any, Any, None], namespace: str) -> None:
        task = asyncio.create_task(coroutine, name=f"projection {namespace}")
        task.add_done_callback(self._done.put_nowait)
        self._tasks[task] = namespace

    async def _end_tasks(self) -> None:
        """Let the files be closed in good order; a cancellation that got lost is repeated."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S_MAX)
        await end_tasks(*self._tasks)
