"""The projector node: one process, a DuckDB file for each namespace it follows."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Final, Self

from agentflow.bus import Bus
from agentflow.errors import LogGone, OperatingError
from agentflow.log.jetstream import JetStreamLog
from agentflow.logs import get_logger
from agentflow_nodes.master.hashes import FoldHashes
from agentflow_nodes.namespaces import Discovery, Tasks, collect_garbage_seldom, take_short_turns
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.projection import Projection
from agentflow_projections.hydrate import history_path
from agentflow_projections.service import QueryService

_CATCH_UP_S_MAX: Final = 3.0
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
        self._tasks = Tasks(self.projections, self._lose)
        self._discovery = Discovery(self.bus, wants=self._wants, serve=self._add)
        self._awaited: set[str] = set()
        """Namespaces named that had no log."""
        self._instance = secrets.token_hex(8)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        collect_garbage_seldom()
        take_short_turns()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            # The files are closed in good order.
            stack.push_async_callback(self._tasks.end, patience_s=_CLOSE_S_MAX)
            for namespace in self.config.namespaces:
                await self._add_named(namespace)
            if self.config.discover:
                await self._discovery.once()
            if self.config.discover or self._awaited:
                self._tasks.start(self._discovery.run(looks=self._awaits), "discovery")
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
        await self._tasks.failed()

    def _lose(self, namespace: str) -> None:
        del self.projections[namespace]
        self._discovery.leave_alone(namespace)

    def _wants(self, namespace: str) -> bool:
        known = self.config.discover or namespace in self._awaited
        return known and namespace not in self.projections

    def _awaits(self) -> bool:
        return self.config.discover or bool(self._awaited - self.projections.keys())

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
        self._tasks.start(self._follow(self.projections[namespace]), namespace)

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
