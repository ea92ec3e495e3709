"""The worker node: joins, runs what it is assigned, reports.

It reads from its own `worker.joined` on and runs only what names its incarnation. Slots are
long-lived coroutines that take from one queue; a coroutine function runs inside its slot.
Outcomes go into the log in frames, one in flight, repeated until their fate is known.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

from agentflow import wire
from agentflow.bus import Bus
from agentflow.checks import Bad
from agentflow.client.function import Function, registered
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, OperatingError
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskDeclined,
    TaskStarted,
    TaskStop,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from agentflow.frames import encode, judge
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Message
from agentflow.logs import get_logger
from agentflow.objects import ObjectStore
from agentflow.writer import Writer
from agentflow_nodes.master.liveness import Heartbeat
from agentflow_nodes.worker.attempts import Attempts, Run, failed
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.outcome import Failed

STARTED_AFTER_S: Final = 0.1
"""An attempt that runs this long is announced with `task.started`: a person may look."""
_SWEEP_S: Final = 0.05
GIVE_UP_S: Final = 5.0
"""How long a stopped function may go on before its slot is given to others."""
_YIELD_AFTER: Final = 32
"""Attempts a slot may run in a row before others get a turn."""
_STOP_GRACE_S: Final = 4.0
"""How long an attempt may take to end once cancelled, before its slot goes on without it: longer than the
grace of programs."""
_LEAVE_S: Final = 5.0
"""How long leaving waits for the log to take the last word."""

_log = get_logger(__name__)


class NameTaken(AgentFlowError):
    """Another worker joined under the same name."""


class Worker:
    """A worker node. An async context manager: entered means joined, left means drained and gone."""

    def __init__(
        self, config: WorkerConfig, functions: Mapping[str, Function[..., Any]] | None = None
    ) -> None:
        self.config: Final = config
        self.functions: Final = registered() if functions is None else functions
        self.bus: Final = Bus(config.url, name=f"agentflow worker {config.name}")
        self._log = JetStreamLog(self.bus, config.namespace, replicas=config.replicas)
        self._objects = ObjectStore(self.bus, config.namespace, replicas=config.replicas)
        self._attempts = Attempts(config, self.functions, self._log, self._objects)
        self._writer = Writer(self._log, config.name, grouped=True)
        self._instance = secrets.token_hex(8)
        self._incarnation = 0
        self._read = 0
        self._queue: deque[TaskAssigned] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._running: dict[str, Run] = {}
        self._slots: dict[asyncio.Task[None], Run | None] = {}
        self._draining = self._gone = False
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            await stack.enter_async_context(self._log)
            await stack.enter_async_context(self._writer)
            await stack.enter_async_context(self._attempts)
            await self._join()
            self._stack = stack.pop_all()
        self._tasks = [
            asyncio.create_task(self._serve(), name="worker reader"),
            asyncio.create_task(self._beat(), name="worker heartbeat"),
            asyncio.create_task(self._announce(), name="worker announcer"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gone:
            return
        self._gone = True
        try:
            await self._leave()
        finally:
            await end_tasks(*self._tasks)
            await self._end_slots("the worker leaves")
            await self._stack.aclose()

    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why: NameTaken, LogGone, or a bug."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    # Joining and leaving ---------------------------------------------------------------

    async def _join(self) -> None:
        config = self.config
        joined = WorkerJoined(
            instance=self._instance,
            slots=config.slots,
            ahead=config.ahead,
            group=config.group,
            labels=config.labels,
            cpu=float(config.cpu),
            memory_mb=config.memory_mb,
            gpus=config.gpus,
            functions=sorted(self.functions),
            host=socket.gethostname(),
            pid=os.getpid(),
            level=config.level,
        )
        self._incarnation = self._read = await self._writer.write([joined])
        self._lost.clear()
        _log.info("joined", worker=config.name, incarnation=self._incarnation, slots=config.slots)
        for _ in range(config.slots):
            self._open_slot()

    async def _leave(self) -> None:
        """Take nothing new, let what runs end within its time, hand the rest back."""
        self._draining = True
        if not self._incarnation:
            return
        self._writer.say(WorkerDraining(incarnation=self._incarnation))
        while self._queue:
            self._hand_back(self._queue.popleft())
        until = time.monotonic() + self.config.drain_s
        while self._running and time.monotonic() < until:  # noqa: ASYNC110 - attempts must not pay for an event
            await asyncio.sleep(_SWEEP_S)
        if self._running:
            _log.warning("tasks stopped to leave", count=len(self._running))
        await self._end_slots("the worker leaves")
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._writer.settled()
                await self._writer.write([WorkerLeft(incarnation=self._incarnation)])
        except (TimeoutError, OperatingError) as error:
            _log.warning("left without saying so", error=str(error) or type(error).__name__)

    def _hand_back(self, assigned: TaskAssigned) -> None:
        """Not run here: another worker may have it at once."""
        declined = TaskDeclined(
            id=assigned.id,
            attempt=assigned.attempt,
            incarnation=assigned.incarnation,
            reason="the worker leaves",
        )
        self._writer.say(declined)

    # Reading ---------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            reading = asyncio.create_task(self._read_log(), name="worker log")
            lost = asyncio.create_task(self._lost.wait())
            try:
                await asyncio.wait([reading, lost], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_tasks(lost, reading)
            if not reading.cancelled():
                reading.result()
            await self._rejoin()

    async def _rejoin(self) -> None:
        """The leader gave us up: what we still run is somebody else's now."""
        _log.warning("given up by the leader: joining anew", worker=self.config.name)
        self._queue.clear()
        await self._end_slots("the worker was given up")
        self._instance = secrets.token_hex(8)
        await self._join()

    async def _read_log(self) -> None:
        namespace, name = self.config.namespace, self.config.name
        subjects = [
            wire.event(namespace, TaskAssigned.kind, name),
            wire.event(namespace, TaskStop.kind, name),
            wire.event(namespace, WorkerJoined.kind, name),
            wire.event(namespace, WorkerLost.kind, "*"),
        ]
        async for messages in self._log.follow(self._incarnation, subjects=subjects):
            for message in messages:
                self._on_message(message)

    def _on_message(self, message: Message) -> None:
        judged = judge(message.subject, message.data, message.headers)
        self._read = message.seq
        for item in judged.items:
            if type(item) is TaskAssigned:
                self._on_assigned(item)
            elif not isinstance(item, Bad):
                self._on_other(item, message.seq)

    def _on_assigned(self, assigned: TaskAssigned) -> None:
        if assigned.incarnation != self._incarnation:
            return
        if self._draining:
            self._hand_back(assigned)
            return
        self._queue.append(assigned)
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():  # a slot that was ended waits no more
                waiter.set_result(None)
                return

    def _on_other(self, event: Event, seq: int) -> None:
        match event:
            case TaskStop():
                self._stop(event)
            case WorkerLost() if event.worker == self.config.name and event.incarnation == self._incarnation:
                self._lost.set()
            case WorkerJoined() if seq > self._incarnation and event.instance != self._instance:
                self._incarnation = 0  # whatever we hold is somebody else's now
                message = f"another worker joined as {self.config.name!r}: give each worker a name of its own"
                raise NameTaken(message)
            case _:
                pass

    def _stop(self, stop: TaskStop) -> None:
        run = self._running.get(stop.id)
        if run is not None and run.assigned.attempt == stop.attempt:
            if not run.why:
                self._end_run(run, stop.reason or "stopped")
            return
        for assigned in self._queue:
            if assigned.id == stop.id and assigned.attempt == stop.attempt:
                self._queue.remove(assigned)
                self._writer.say(failed(_run_of(assigned), Failed("stopped", stop.reason)))
                return

    # Running ---------------------------------------------------------------------------

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
            run = _run_of(self._queue.popleft())
            self._slots[me] = run
            self._running[run.assigned.id] = run
            try:
                await self._attempt(run)
            except asyncio.CancelledError:
                if run.over:
                    raise
                why = Failed("stopped", run.why) if run.why else Failed("error", "it cancelled its own slot")
                self._report(run, failed(run, why))
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

    async def _attempt(self, run: Run) -> None:
        if run.assigned.suspect:
            run.announced = True
            await self._writer.write([_started(run)])
        self._report(run, await self._attempts.run(run))

    def _report(self, run: Run, event: Event) -> None:
        if not run.over:
            run.over = True
            self._writer.say(event)

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
        self._report(run, failed(run, Failed("stopped", run.why)))
        del self._slots[slot]
        self._running.pop(run.assigned.id, None)
        self._open_slot()

    async def _end_slots(self, why: str) -> None:
        slots, self._slots = self._slots, {}
        for slot, run in slots.items():
            if run is not None:
                self._report(run, failed(run, Failed("stopped", why)))
            slot.cancel()
        if slots:
            _, ignoring = await asyncio.wait(slots, timeout=_STOP_GRACE_S)
            if ignoring:
                _log.warning("tasks ignore their cancellation", count=len(ignoring))
        self._running.clear()
        self._idle.clear()

    # Saying ----------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Say of attempts that take a while that they have started."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            before = time.monotonic() - STARTED_AFTER_S
            for run in list(self._running.values()):
                if not run.announced and run.started < before and not run.over:
                    run.announced = True
                    self._writer.say(_started(run))

    async def _beat(self) -> None:
        subject = wire.heartbeat(self.config.namespace, self.config.name)
        while True:
            beat = Heartbeat(self._incarnation, self._read, len(self._running), len(self._queue))
            try:
                self.bus.publish(subject, encode(beat))
            except OperatingError as error:
                _log.debug("heartbeat not sent", error=str(error))
            await asyncio.sleep(self.config.heartbeat_s)


def _run_of(assigned: TaskAssigned) -> Run:
    return Run(assigned, time.time_ns() // 1_000_000, time.monotonic())


def _started(run: Run) -> TaskStarted:
    assigned = run.assigned
    return TaskStarted(
        id=assigned.id,
        attempt=assigned.attempt,
        incarnation=assigned.incarnation,
        started_at_ms=run.started_at_ms,
    )
