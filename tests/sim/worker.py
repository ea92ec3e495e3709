"""A simulated worker: the protocol of the real one, with timers for tasks.

It joins, reads from its own `worker.joined` on through the filters of the real one, runs only
what names its incarnation, reports through the real `Writer`, says what it has read, drains,
and joins anew once it was given up. What it runs leaves a mark in the journal.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any, Final

from msgspec import Raw, Struct

from agentflow import wire
from agentflow.checks import Bad
from agentflow.ending import end_tasks
from agentflow.errors import OperatingError
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskStarted,
    TaskStop,
    WorkerDraining,
    WorkerDrainRequested,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from agentflow.frames import encode, judge
from agentflow.limits import LEVEL
from agentflow.locks.held import Held
from agentflow.log.port import Message
from agentflow.writer import Writer
from agentflow_nodes.master.liveness import Heartbeat
from agentflow_nodes.worker.locking import NotHeld
from tests.sim import bodies
from tests.sim.bodies import Began, Body
from tests.sim.cluster import Cluster
from tests.sim.locks import Hold
from tests.sim.network import Link, SimBus, SimLog
from tests.sim.task_locks import SimTaskLocks

STARTED_AFTER_S: Final = 0.1
HEARTBEAT_S: Final = 1.0
_DRAIN_S: Final = 3.0
_LEAVE_S: Final = 5.0
_KILLS_AFTER_S: Final = 0.2


class Shape(Struct, frozen=True):
    """What a worker is."""

    name: str
    slots: int
    ahead: int
    cpu: float
    memory_mb: int
    gpus: int
    group: str
    functions: tuple[str, ...]


class NameTaken(Exception):
    """Another worker joined under the same name."""


class _Run:
    """An attempt that occupies a slot."""

    def __init__(self, assigned: TaskAssigned, began_s: float) -> None:
        self.assigned = assigned
        self.began_s = began_s
        self.announced = False
        self.timers: list[asyncio.TimerHandle] = []
        self.hold: Hold | None = None


class SimWorker:
    """One process of a worker. `run` ends when it has left, or raises NameTaken."""

    def __init__(self, cluster: Cluster, link: Link, shape: Shape) -> None:
        self._cluster = cluster
        self._loop = cluster.loop
        self._shape = shape
        self._log = SimLog(link)
        self._bus = SimBus(link)
        self._writer = Writer(self._log, shape.name, grouped=True, nonce=cluster.nonce())
        self._instance = cluster.nonce()
        self._incarnation = 0
        self._read = 0
        self._seen: set[bytes] = set()
        """Attempts assigned to this incarnation, by task: none is run twice."""
        self._locks = SimTaskLocks(cluster, link, self._writer, shape.name)
        self._queue: deque[TaskAssigned] = deque()
        self._runs: dict[str, _Run] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._lost = asyncio.Event()
        self._leave = asyncio.Event()

    def leave(self) -> None:
        """Drain and leave."""
        self._leave.set()

    async def run(self) -> None:
        """Serve until told to leave."""
        async with self._writer:
            await self._join()
            beating = asyncio.create_task(self._beat())
            try:
                await self._serve()
                await self._go()
            finally:
                await end_tasks(beating, *self._starting.values())
                await self._locks.close()

    # Joining and leaving.

    async def _join(self) -> None:
        shape = self._shape
        joined = WorkerJoined(
            instance=self._instance,
            slots=shape.slots,
            ahead=shape.ahead,
            cpu=shape.cpu,
            memory_mb=shape.memory_mb,
            gpus=shape.gpus,
            group=shape.group,
            functions=sorted(shape.functions),
            level=LEVEL,
        )
        self._incarnation = self._read = await self._writer.write([joined])
        self._cluster.trace("joined", shape.name, self._incarnation)
        self._seen.clear()
        self._lost.clear()

    async def _serve(self) -> None:
        while True:
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(each)
                for each in (self._read_log(), self._lost.wait(), self._leave.wait())
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_tasks(*tasks)
            if not tasks[0].cancelled():
                tasks[0].result()
            if self._leave.is_set():
                return
            await self._rejoin()

    async def _rejoin(self) -> None:
        """The leader gave us up: what we still run is somebody else's now."""
        self._cluster.counts["rejoins"] += 1
        self._queue.clear()
        await self._end_runs("the worker was given up")
        self._instance = self._cluster.nonce()
        await self._join()

    async def _go(self) -> None:
        self._draining = True
        self._writer.say(WorkerDraining(incarnation=self._incarnation))
        while self._queue:
            self._hand_back(self._queue.popleft())
        until = self._loop.time() + _DRAIN_S
        while (self._runs or self._starting) and self._loop.time() < until:
            await asyncio.sleep(0.05)
        await self._end_runs("the worker leaves")
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._writer.settled()
                await self._writer.write([WorkerLeft(incarnation=self._incarnation)])
        except (TimeoutError, OperatingError):
            self._cluster.counts["left_unsaid"] += 1

    async def _end_runs(self, why: str) -> None:
        await end_tasks(*self._starting.values())
        self._starting.clear()
        for run in list(self._runs.values()):
            self._end(run, _failed(run.assigned, "stopped", why))

    def _hand_back(self, assigned: TaskAssigned) -> None:
        self._decline(assigned, "the worker leaves")

    def _decline(self, assigned: TaskAssigned, reason: str) -> None:
        declined = TaskDeclined(
            id=assigned.id,
            attempt=assigned.attempt,
            incarnation=assigned.incarnation,
            reason=reason,
        )
        self._writer.say(declined)

    async def _beat(self) -> None:
        subject = wire.heartbeat(self._log.namespace, self._shape.name)
        while True:
            beat = Heartbeat(self._incarnation, self._read, len(self._runs), len(self._queue))
            with suppress(OperatingError):
                self._bus.publish(subject, encode(beat))
            await asyncio.sleep(HEARTBEAT_S)

    # Reading.

    async def _read_log(self) -> None:
        namespace, name = self._log.namespace, self._shape.name
        subjects = [
            wire.event(namespace, TaskAssigned.kind, name),
            wire.event(namespace, TaskStop.kind, name),
            wire.event(namespace, WorkerJoined.kind, name),
            wire.event(namespace, WorkerLost.kind, "*"),
            wire.event(namespace, WorkerDrainRequested.kind, "*"),
        ]
        async for messages in self._log.follow(self._reads_after(), subjects=subjects):
            for message in messages:
                self._on_message(message)
            self._fill()

    def _reads_after(self) -> int:
        """What came before it joined is not its business."""
        return self._incarnation

    def _on_message(self, message: Message) -> None:
        judged = judge(message.subject, message.data, message.headers)
        self._read = message.seq
        if judged.kind == TaskAssigned.kind and self._seen_before(message):
            return
        for item in judged.items:
            if type(item) is TaskAssigned:
                self._on_assigned(item)
            elif not isinstance(item, Bad):
                self._on_other(item, message.seq)

    def _on_assigned(self, assigned: TaskAssigned) -> None:
        if not self._is_ours(assigned):
            return
        if self._draining:
            self._hand_back(assigned)
        else:
            self._queue.append(assigned)

    def _is_ours(self, assigned: TaskAssigned) -> bool:
        return assigned.incarnation == self._incarnation

    def _seen_before(self, message: Message) -> bool:
        """Whether it is a repeated write that was stored again."""
        if message.data in self._seen:
            return True
        self._seen.add(message.data)
        return False

    def _on_other(self, event: Event, seq: int) -> None:
        match event:
            case TaskStop():
                self._stop(event)
            case WorkerLost() if event.worker == self._shape.name and event.incarnation == self._incarnation:
                self._lost.set()
            case WorkerDrainRequested() if event.worker == self._shape.name:
                self.leave()
            case WorkerJoined() if seq > self._incarnation and event.instance != self._instance:
                raise NameTaken(self._shape.name)
            case _:
                pass

    def _stop(self, stop: TaskStop) -> None:
        run = self._runs.get(stop.id)
        if run is not None and run.assigned.attempt == stop.attempt:
            self._end(run, _failed(run.assigned, "stopped", stop.reason))
            return
        for assigned in self._queue:
            if assigned.id == stop.id and assigned.attempt == stop.attempt:
                self._queue.remove(assigned)
                self._writer.say(_failed(assigned, "stopped", stop.reason))
                return

    # Running.

    def _fill(self) -> None:
        """Let what is queued run in the slots that are free."""
        while self._queue and len(self._runs) + len(self._starting) < self._shape.slots:
            assigned = self._queue.popleft()
            if assigned.lock:
                self._starting[assigned.id] = asyncio.create_task(self._start_locked(assigned))
            elif self._begins_announced(assigned):
                self._starting[assigned.id] = asyncio.create_task(self._start_suspect(assigned))
            else:
                self._begin(assigned)

    def _begins_announced(self, assigned: TaskAssigned) -> bool:
        """Whether the log has to know that it runs before it does: it killed a worker, perhaps."""
        return assigned.suspect

    async def _start_suspect(self, assigned: TaskAssigned) -> None:
        await self._writer.write([self._started(assigned)])
        del self._starting[assigned.id]
        run = self._begin(assigned)
        if run is not None:
            run.announced = True

    async def _start_locked(self, assigned: TaskAssigned) -> None:
        """Hold the lock it names, or let the leader assign it again."""
        try:
            held = await self._locks.acquire(assigned)
        except NotHeld as error:
            del self._starting[assigned.id]
            self._cluster.counts["locks_not_had"] += 1
            self._decline(assigned, str(error))
            self._fill()
            return
        try:
            if self._begins_announced(assigned):
                await self._writer.write([self._started(assigned)])
        except BaseException:
            self._locks.release(held, None)
            raise
        del self._starting[assigned.id]
        run = self._begin(assigned, held)
        if run is not None:
            run.announced = assigned.suspect
            held.on_lost(lambda: self._end(run, _failed(assigned, "lock_lost", str(held.loss()))))
        else:
            self._fill()

    def _begin(self, assigned: TaskAssigned, held: Held | None = None) -> _Run | None:
        now = self._loop.time()
        began = Began(
            task=assigned.id,
            attempt=assigned.attempt,
            incarnation=self._incarnation,
            worker=self._shape.name,
            suspect=assigned.suspect,
            at_s=now,
            last_seq=self._cluster.network.stream.last_seq,
            inputs=len(assigned.inputs),
            wrong=not bodies.inputs_are_right(assigned),
        )
        self._cluster.journal.append(began)
        body = bodies.body_of(assigned)
        run = _Run(assigned, now)
        if held is not None:
            run.hold = Hold(assigned.lock, held, now)
            self._cluster.holds.append(run.hold)
        if not body.run_us and not body.kills:
            self._report(run, self._outcome(run, body))
            return None
        self._runs[assigned.id] = run
        self._set_timers(run, body)
        return run

    def _set_timers(self, run: _Run, body: Body) -> None:
        if body.kills:
            later = self._loop.call_later(_KILLS_AFTER_S, self._cluster.on_killer, self._shape.name)
            run.timers.append(later)
            run.timers.append(self._loop.call_later(STARTED_AFTER_S, self._announce, run))
            return
        run_s = body.run_us / 1e6
        timeout_s = run.assigned.timeout_s
        if timeout_s and timeout_s < run_s:
            timed_out = _failed(run.assigned, "timeout", f"after {timeout_s} s")
            run.timers.append(self._loop.call_later(timeout_s, self._end, run, timed_out))
        else:
            run.timers.append(self._loop.call_later(run_s, self._finish, run, body))
        if run_s > STARTED_AFTER_S:
            run.timers.append(self._loop.call_later(STARTED_AFTER_S, self._announce, run))

    def _announce(self, run: _Run) -> None:
        if not run.announced:
            run.announced = True
            self._writer.say(self._started(run.assigned))

    def _finish(self, run: _Run, body: Body) -> None:
        self._end(run, self._outcome(run, body))

    def _end(self, run: _Run, outcome: Event) -> None:
        """The slot is free again."""
        for timer in run.timers:
            timer.cancel()
        if self._runs.pop(run.assigned.id, None) is not None:
            self._report(run, outcome)
        self._fill()

    def _report(self, run: _Run, outcome: Event) -> None:
        hold = run.hold
        if hold is None:
            self._writer.say(outcome)
            return
        if not hold.held.is_held() and isinstance(outcome, TaskCompleted):
            outcome = _failed(run.assigned, "lock_lost", str(hold.held.loss()))
        hold.ended_s = self._loop.time()
        self._locks.release(hold.held, asyncio.ensure_future(self._writer.write([outcome])))

    def _outcome(self, run: _Run, body: Body) -> Event:
        assigned = run.assigned
        if bodies.fails(body, assigned.attempt):
            return _failed(assigned, "error", "as it was told", retryable=not body.fatal)
        return TaskCompleted(
            id=assigned.id,
            attempt=assigned.attempt,
            incarnation=assigned.incarnation,
            started_at_ms=int(run.began_s * 1000) + 1,
            run_us=body.run_us or 20,
            result=Raw(bodies.result_of(assigned.id)),
        )

    def _started(self, assigned: TaskAssigned) -> TaskStarted:
        return TaskStarted(
            id=assigned.id,
            attempt=assigned.attempt,
            incarnation=assigned.incarnation,
            started_at_ms=int(self._loop.time() * 1000) + 1,
        )


def _failed(assigned: TaskAssigned, error: str, message: str, *, retryable: bool = True) -> TaskFailed:
    return TaskFailed(
        id=assigned.id,
        attempt=assigned.attempt,
        incarnation=assigned.incarnation,
        error=error,
        message=message,
        retryable=retryable,
    )
