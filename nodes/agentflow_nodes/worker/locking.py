"""Locks that tasks name: held by the worker while an attempt runs.

The lock is acquired before the attempt begins and given back once its outcome is in the log
and nothing of it runs any more. Whoever finds it held by somebody else does not wait for
long: the attempt is declined, and the task waits in the leader's queue.
"""

from __future__ import annotations

import asyncio
import time
from functools import cached_property
from typing import TYPE_CHECKING, Final

from agentflow.bus import Bus
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LockTimeout
from agentflow.events import TaskAssigned
from agentflow.log.port import Log
from agentflow.logs import get_logger
from agentflow.writer import Writer

if TYPE_CHECKING:
    from agentflow.locks.held import Held
    from agentflow.locks.service import Locks

TTL_S: Final = 10
"""A worker silent for so long has lost its locks."""
WAIT_S: Final = 2.0
"""How long an attempt waits for its lock before it is declined."""
_RELEASE_S: Final = 5.0
"""How long leaving waits for locks to be given back; what is left expires."""

_log = get_logger(__name__)


class NotHeld(Exception):
    """The lock could not be had in time; the message says why."""


class TaskLocks:
    """The locks of one worker's attempts."""

    def __init__(self, bus: Bus, log: Log, writer: Writer, worker: str) -> None:
        self._bus = bus
        self._log = log
        self._writer = writer
        self._worker = worker
        self._releasing: set[asyncio.Task[None]] = set()

    @cached_property
    def _locks(self) -> Locks:
        """Acquires locks; loaded with the first task that names one."""
        from agentflow.locks.bucket import find_locks, open_locks  # noqa: PLC0415 - most workers need none
        from agentflow.locks.service import Locks  # noqa: PLC0415 - see above

        return Locks(
            lambda: open_locks(self._bus, self._log),
            self._writer.write,
            find_bucket=lambda: find_locks(self._bus, self._log),
        )

    async def close(self) -> None:
        """Give back what is still held, and wait for that, not for long."""
        await self.settled()
        await end_tasks(*self._releasing)
        if "_locks" in self.__dict__:
            await self._locks.close()

    async def settled(self) -> None:
        """Wait, not for long, until what is being given back has been."""
        if self._releasing:
            await asyncio.wait(set(self._releasing), timeout=_RELEASE_S)

    async def acquire(self, assigned: TaskAssigned) -> Held:
        """Hold the lock an assignment names. Raises NotHeld."""
        from agentflow.locks.ticket import Ticket  # noqa: PLC0415 - as above

        name = assigned.lock
        ticket = Ticket(
            name=name,
            holder=f"{assigned.id}#{assigned.attempt}@{self._worker}"[:_HOLDER_MAX],
            client=self._worker,
            since_ms=int(time.time() * 1_000),
            metadata={"task": assigned.id, "attempt": str(assigned.attempt)},
        )
        try:
            return await self._locks.acquire(ticket, TTL_S, WAIT_S)
        except LockTimeout as error:
            raise NotHeld(await self._who_holds(name) or str(error)) from error
        except AgentFlowError as error:
            raise NotHeld(f"lock {name!r} could not be acquired: {error}") from error

    def release(self, held: Held, told: asyncio.Future[int] | None) -> None:
        """Give it back in the background, after `told`: the outcome's way into the log."""
        task = asyncio.create_task(_released(held, told), name=f"releasing {held.name}")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _who_holds(self, name: str) -> str:
        """Who holds a lock, in words; nothing if nobody can say."""
        try:
            infos = await self._locks.infos(name)
        except AgentFlowError as error:
            _log.debug("holders of a lock not known", lock=name, error=str(error))
            return ""
        holders = ", ".join(holder.holder for info in infos for holder in info.holders[:_SHOWN_MAX])
        return f"lock {name!r} is held by {holders}" if holders else ""


_HOLDER_MAX: Final = 200
_SHOWN_MAX: Final = 3


async def _released(held: Held, told: asyncio.Future[int] | None) -> None:
    if told is not None:
        await asyncio.wait([told])
        if not told.cancelled() and told.exception() is not None:
            _log.error("an outcome could not be written", lock=held.name, error=repr(told.exception()))
    try:
        await held.ended()
    except AgentFlowError as error:
        _log.info("a lock was not given back; it expires", lock=held.name, error=str(error))
