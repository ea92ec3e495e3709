"""What a worker remembers over a restart: its own view, kept up to date beside its work.

Nothing here may harm the worker: a fault of the file is said, and the file tried again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final, cast

from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LogGone
from agentflow.log.port import Log, Message
from agentflow.logs import get_logger
from agentflow_projections.database import DatabaseDamaged
from agentflow_projections.worker_view import Unreported, WorkerView, subjects

_PACE_S: Final = 0.5
"""One transaction in so long: nobody waits for what is in it."""
_ROWS_MAX: Final = 50_000
_PAUSE_S_FIRST: Final = 1.0
_PAUSE_S_MAX: Final = 60.0
_SHOWN_MAX: Final = 20

_log = get_logger(__name__)


class OwnMemory:
    """A worker's view on its way into its file. `run` for as long as the worker lives."""

    def __init__(self, log: Log, folder: Path, worker: str) -> None:
        self.path: Final = folder / f"{log.namespace}.{worker}.duckdb"
        self.told: Final = asyncio.Event()
        """Set once it is known what earlier incarnations left unreported."""
        self.left: list[Unreported] = []
        """What they left."""
        self._log = log
        self._worker = worker
        self._incarnation = 0
        self._damage = ""

    async def run(self, incarnation: int) -> None:
        """Follow for ever; `incarnation` is the one that has just joined."""
        self._incarnation = incarnation
        pause_s = _PAUSE_S_FIRST
        while True:
            try:
                await self._follow()
            except LogGone:
                await asyncio.Event().wait()  # the worker's own reader says so, and ends it
            except AgentFlowError as error:
                _log.warning("what the worker had is not kept now", path=str(self.path), error=str(error))
                self._damage = str(error) if isinstance(error, DatabaseDamaged) else ""
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _follow(self) -> None:
        view = WorkerView(self.path, self._log.namespace)
        await asyncio.to_thread(view.database.__enter__)
        try:
            if self._damage:
                await asyncio.to_thread(view.database.begin_anew, self._damage)
                self._damage = ""
            view.open(await self._log.identity())
            reading = asyncio.create_task(self._read(view), name=f"view of {self._worker}")
            try:
                while not reading.done():
                    await asyncio.wait((reading,), timeout=_PACE_S)
                    taken = view.take()
                    if taken.rows:
                        await asyncio.to_thread(view.commit, taken)
                    if not self.told.is_set() and taken.checkpoint.seq >= self._incarnation:
                        await self._tell(view)
            finally:
                await end_tasks(reading)
            reading.result()
        finally:
            await asyncio.to_thread(view.database.__exit__, None, None, None)

    async def _read(self, view: WorkerView) -> None:
        wanted = subjects(self._log.namespace, self._worker)
        following = cast("AsyncGenerator[list[Message], None]", self._log.follow(view.seq, subjects=wanted))
        async with aclosing(following):
            async for messages in following:
                for message in messages:
                    view.read(message)
                while view.size > _ROWS_MAX:  # noqa: ASYNC110 - who takes them does so at its own pace
                    await asyncio.sleep(_PACE_S)

    async def _tell(self, view: WorkerView) -> None:
        """Say what was in hand when this worker last ended."""
        self.left = await asyncio.to_thread(view.unreported, self._incarnation)
        self.told.set()
        if self.left:
            shown = [f"{each.task} attempt {each.attempt}" for each in self.left[-_SHOWN_MAX:]]
            _log.warning(
                "attempts of before were not reported",
                worker=self._worker,
                count=len(self.left),
                latest=shown,
            )
