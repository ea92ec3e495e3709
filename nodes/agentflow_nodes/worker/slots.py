"""Slots: long-lived coroutines that take attempts from one queue, run and report them.

A coroutine function runs inside its slot: a task of its own would cost more than most.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from agentflow.events import Event, TaskAssigned, TaskCompleted, TaskStarted, TaskStop
from agentflow.limits import TEXT_LENGTH_MAX
from agentflow.logs import get_logger
from agentflow.writer import Writer
from agentflow_nodes.worker.attempts import Attempts, Run, declined, failed
from agentflow_nodes.worker.locking import NotHeld, TaskLocks
from agentflow_nodes.worker.outcome import Failed

if TYPE_CHECKING:
    from agentflow.locks.held import Held

STARTED_AFTER_S: Final = 0.1
"""An attempt that runs this long is announced with `task.started`: a person may look."""
SWEEP_S: Final = 0.05
_YIELD_AFTER: Final = 32
"""Attempts a slot may run in a row before others get a turn."""
_STOP_GRACE_S: Final = 4.0
"""How long an attempt may take to end once cancelled, before its slot goes on without it: longer than the
grace of programs."""

_log = get_logger(__name__)


class Slots:
    """What a worker holds: attempts that run, and those that wait for a slot."""

    def __init__(self, attempts: Attempts, writer: Writer, locks: TaskLocks) -> None:
        self._attempts = attempts
        self._locks = locks
        self._writer = writer
        self._queue: deque[TaskAssigned] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._running: dict[str, Run] = {}
        self._slots: dict[asyncio.Task[None], Run | None] = {}

    @property
    def running(self) -> int:
        """Attempts being run."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Assignments that wait for a slot."""
        return len(self._queue)

    def open(self, count: int) -> None:
        """Have so many slots more."""
        for _ in range(count):
            self._open_slot()

    def take(self, assigned: TaskAssigned) -> None:
        """Run it when a slot is free."""
        self._queue.append(assigned)
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():  # a slot that was ended waits no more
                waiter.set_result(None)
                return

    def hand_back(self, assigned: TaskAssigned) -> None:
        """Not run here: another worker may have it at once."""
        self._writer.say(declined(assigned, "the worker leaves"))

    def hand_back_queued(self) -> None:
        """Let others have what waits for a slot."""
        while self._queue:
            self.hand_back(self._queue.popleft())

    def stop(self, stop: TaskStop) -> None:
        """End an attempt, or take it out of the queue, if it is here."""
        run = self._running.get(stop.id)
        if run is not None and run.assigned.attempt == stop.attempt:
            if not run.why:
                self._end_run(run, stop.reason or "stopped")
            return
        for assigned in self._queue:
            if assigned.id == stop.id and assigned.attempt == stop.attempt:
                self._queue.remove(assigned)
                self._writer.say(failed(run_of(assigned), Failed("stopped", stop.reason)))
                return

    async def run_dry(self, within_s: float | None = None) -> None:
        """Wait until nothing runs any more, or the time is over."""
        until = None if within_s is None else time.monotonic() + within_s
        while self._running and (until is None or time.monotonic() < until):  # noqa: ASYNC110 - attempts must not pay for an event
            await asyncio.sleep(SWEEP_S)

    async def end(self, why: str) -> None:
        """Stop everything, report it as stopped, and forget what waits. There are no slots afterwards."""
        self._queue.clear()
        slots, self._slots = self._slots, {}
        for slot, run in slots.items():
            if run is not None:
                self._report(run, failed(run, Failed("stopped", why)))
            slot.cancel()
        if slots:
            _, ignoring = await asyncio.wait(slots, timeout=_STOP_GRACE_S)
            if ignoring:
                _log.warning("tasks ignore their cancellation", count=len(ignoring))
        await self._locks.settled()
        self._running.clear()
        self._idle.clear()

    async def announce(self) -> None:
        """Say of attempts that take a while that they have started; for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            before = time.monotonic() - STARTED_AFTER_S
            for run in list(self._running.values()):
                if not run.announced and run.begun and run.started < before and not run.over:
                    run.announced = True
                    self._writer.say(_started(run))

    # One slot --------------------------------------------------------------------------

    def _open_slot(self) -> None:
        slot = asyncio.create_task(self._slot(), context=contextvars.Context(), name="worker slot")
        self._slots[slot] = None
        slot.add_done_callback(lambda done: self._slots.pop(done, None))

    async def _slot(self) -> None:
        """Take an attempt, run it, report it; for as long as the incarnation lives."""
        me = asyncio.current_task()
        assert me is not None
        in_a_row = 0
        clean = contextvars.copy_context()
        while True:
            if not self._queue:
                in_a_row = 0
                waiter = asyncio.get_running_loop().create_future()
                self._idle.append(waiter)
                await waiter
                continue
            in_a_row += 1
            if in_a_row > _YIELD_AFTER:
                in_a_row = 0
                await asyncio.sleep(0)
                continue
            run = run_of(self._queue.popleft())
            self._slots[me] = run
            self._running[run.assigned.id] = run
            await self._run(run)
            if not self._free(me, run):
                return
            if contextvars.copy_context() != clean:
                # The function left something in its context: nothing of one task may reach another.
                self._slots.pop(me, None)
                self._open_slot()
                return

    def _free(self, slot: asyncio.Task[None], run: Run) -> bool:
        """The attempt is over. False if the slot was given up meanwhile."""
        while slot.cancelling():
            slot.uncancel()
        if self._running.get(run.assigned.id) is run:
            del self._running[run.assigned.id]
        if slot not in self._slots:
            return False
        self._slots[slot] = None
        return True

    async def _run(self, run: Run) -> None:
        """Run and report an attempt. Raises CancelledError if somebody else reported it, and wants the slot."""
        try:
            if not run.assigned.lock or await self._lock(run):
                await self._attempt(run)
        except asyncio.CancelledError:
            if run.over:
                raise
            why = Failed(run.kind, run.why) if run.why else Failed("error", "it cancelled its own slot")
            self._report(run, failed(run, why))
        finally:
            if run.held is not None:
                self._locks.release(run.held, run.told)

    async def _lock(self, run: Run) -> bool:
        """Acquire the lock the task names; False if the attempt was declined for want of it."""
        try:
            held = run.held = await self._locks.acquire(run.assigned)
        except NotHeld as error:
            self._report(run, declined(run.assigned, str(error)[:TEXT_LENGTH_MAX]))
            return False
        held.on_lost(partial(self._lock_lost, run, held))
        run.begin()
        return True

    def _lock_lost(self, run: Run, held: Held) -> None:
        if not run.why and not run.over:
            run.kind = "lock_lost"
            self._end_run(run, str(held.loss()))

    async def _attempt(self, run: Run) -> None:
        if run.assigned.suspect:
            run.announced = True
            await self._writer.write([_started(run)])
        event = await self._attempts.run(run)
        if run.held is not None and not run.held.is_held() and isinstance(event, TaskCompleted):
            # Done, but not under the lock all the time: somebody else may have worked beside it.
            event = failed(run, Failed("lock_lost", str(run.held.loss())))
        self._report(run, event)

    def _report(self, run: Run, event: Event) -> None:
        if run.over:
            return
        run.over = True
        if run.held is None:
            self._writer.say(event)
        else:  # the lock is given back after that
            run.told = asyncio.ensure_future(self._writer.write([event]))

    def _end_run(self, run: Run, why: str) -> None:
        run.why = why
        for slot, current in self._slots.items():
            if current is run:
                slot.cancel()
                asyncio.get_running_loop().call_later(_STOP_GRACE_S, self._give_up, slot, run)

    def _give_up(self, slot: asyncio.Task[None], run: Run) -> None:
        """A coroutine that does not heed its cancellation goes on outside of the slots, for nobody."""
        if self._slots.get(slot) is not run:
            return
        _log.warning("a task ignores its cancellation", task=run.assigned.id)
        self._report(run, failed(run, Failed(run.kind, run.why)))
        del self._slots[slot]
        self._running.pop(run.assigned.id, None)
        self._open_slot()


def run_of(assigned: TaskAssigned) -> Run:
    """An attempt that begins now."""
    return Run(assigned, time.time_ns() // 1_000_000, time.monotonic(), begun=not assigned.lock)


def _started(run: Run) -> TaskStarted:
    assigned = run.assigned
    return TaskStarted(
        id=assigned.id,
        attempt=assigned.attempt,
        incarnation=assigned.incarnation,
        started_at_ms=run.started_at_ms,
    )
