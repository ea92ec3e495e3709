"""The worker node: joins, runs what it is assigned, reports.

It reads from its own `worker.joined` on and runs only what names its incarnation, in its
`Slots`. Outcomes go into the log in frames, one in flight, repeated until their fate is known.
A client may ask it to drain: then it takes nothing new, finishes, leaves and has ended.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack
from hashlib import blake2b
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from agentflow import wire
from agentflow.bus import Bus
from agentflow.checks import Bad
from agentflow.client.function import Function, registered
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LogGone, OperatingError
from agentflow.events import (
    SINCE,
    Event,
    TaskAssigned,
    TaskStop,
    WorkerDraining,
    WorkerDrainRequested,
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
from agentflow_nodes.worker.attempts import Attempts
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.kept import Kept, needs_keeper
from agentflow_nodes.worker.locking import TaskLocks
from agentflow_nodes.worker.slots import Slots

if TYPE_CHECKING:
    from agentflow_nodes.worker.memory import OwnMemory

_SEEN_MIN: Final = 20_000
"""Messages of assignments remembered, so that none is run twice."""
_LEAVES: Final = "the worker leaves"
_LEAVE_S: Final = 5.0
"""How long leaving waits for the log to take the last word."""
_SENT_AFTER: Final = 3
"""Turns of the event loop after which what was published is on its way: the keeper must not be told of a
heartbeat that a task held back."""

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
        self._locks = TaskLocks(self.bus, self._log, self._writer, config.name)
        self._slots = Slots(self._attempts, self._writer, self._locks)
        self._kept = Kept(config) if config.stall_s_max and needs_keeper(self.functions) else None
        self.memory: OwnMemory | None = None
        """What it had when it last ended, if it keeps that."""
        self._instance = secrets.token_hex(8)
        self._incarnation = 0
        self._read = 0
        self._seen: dict[bytes, None] = {}
        """Attempts assigned to this incarnation, by task: the latest ones."""
        self._draining = self._gone = False
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()
        self._drain_asked = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            await stack.enter_async_context(self._log)
            await stack.enter_async_context(self._writer)
            stack.push_async_callback(self._locks.close)
            await stack.enter_async_context(self._attempts)
            await self._join()
            if self._kept is not None:
                self._kept.beat(self._heartbeat())
                await stack.enter_async_context(self._kept)
            self._stack = stack.pop_all()
        self._tasks = [
            asyncio.create_task(self._serve(), name="worker reader"),
            asyncio.create_task(self._beat(), name="worker heartbeat"),
            asyncio.create_task(self._slots.announce(), name="worker announcer"),
            asyncio.create_task(self._drain(), name="worker drain"),
        ]
        if self.config.data is not None:
            # DuckDB takes long to load, and most workers need none.
            from agentflow_nodes.worker.memory import OwnMemory  # noqa: PLC0415

            self.memory = OwnMemory(self._log, self.config.data, self.config.name)
            remembering = self.memory.run(self._incarnation)
            self._tasks.append(asyncio.create_task(remembering, name="worker memory"))
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
            await self._slots.end(_LEAVES)
            await self._stack.aclose()

    async def ended(self) -> None:
        """Wait until it stops by itself: it was drained on request, or raises why not.

        Raises NameTaken, LogGone, or a bug.
        """
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
        self._seen.clear()
        self._lost.clear()
        _log.info("joined", worker=config.name, incarnation=self._incarnation, slots=config.slots)
        self._slots.open(config.slots)

    def _take_nothing_new(self) -> None:
        if not self._draining:
            self._draining = True
            self._writer.say(WorkerDraining(incarnation=self._incarnation))
        self._slots.hand_back_queued()

    async def _drain(self) -> None:
        """Once a client asked for it: finish what runs, however long that takes, and be done."""
        await self._drain_asked.wait()
        self._take_nothing_new()
        await self._slots.run_dry()
        _log.info("drained", worker=self.config.name)

    async def _leave(self) -> None:
        """Take nothing new, let what runs end within its time, hand the rest back."""
        if not self._incarnation:
            return
        self._take_nothing_new()
        await self._slots.run_dry(self.config.drain_s)
        if self._slots.running:
            _log.warning("tasks stopped to leave", count=self._slots.running)
        await self._slots.end(_LEAVES)
        if not self._incarnation:
            return  # it was given up meanwhile: nobody waits for a word of it
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._writer.settled()
                await self._writer.write([WorkerLeft(incarnation=self._incarnation)])
        except (TimeoutError, OperatingError) as error:
            _log.warning("left without saying so", error=str(error) or type(error).__name__)

    # Reading ---------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            await self._live()
        except LogGone:
            # What lies in the place of our log is another's: it gets no last word of ours.
            self._incarnation = 0
            await self._writer.__aexit__(None, None, None)
            raise

    async def _live(self) -> None:
        """Read the log, in one incarnation after the other. Raises LogGone, NameTaken."""
        while self._incarnation:
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
        leaving = self._draining
        _log.warning("given up by the leader", worker=self.config.name, joins_anew=not leaving)
        if leaving:
            self._incarnation = 0
        await self._slots.end("the worker was given up")
        if not leaving:
            self._instance = secrets.token_hex(8)
            await self._join()

    async def _read_log(self) -> None:
        namespace, name = self.config.namespace, self.config.name
        subjects = [
            wire.event(namespace, TaskAssigned.kind, name),
            wire.event(namespace, TaskStop.kind, name),
            wire.event(namespace, WorkerJoined.kind, name),
            wire.event(namespace, WorkerLost.kind, "*"),
            wire.event(namespace, WorkerDrainRequested.kind, "*"),
        ]
        async for messages in self._log.follow(self._incarnation, subjects=subjects):
            for message in messages:
                self._on_message(message)

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
        if assigned.incarnation != self._incarnation:
            return
        if self._draining:
            self._slots.hand_back(assigned)
        else:
            self._slots.take(assigned)

    def _seen_before(self, message: Message) -> bool:
        """Whether it is a repeated write that was stored again: the server's clock may step beyond its window."""
        seen, digest = self._seen, blake2b(message.data, digest_size=16).digest()
        if digest in seen:
            _log.warning("an assignment came twice", seq=message.seq)
            return True
        seen[digest] = None
        if len(seen) > 2 * _SEEN_MIN:
            for each in list(islice(seen, _SEEN_MIN)):
                del seen[each]
        return False

    def _on_other(self, event: Event, seq: int) -> None:
        match event:
            case TaskStop():
                self._slots.stop(event)
            case WorkerLost() if event.worker == self.config.name and event.incarnation == self._incarnation:
                self._lost.set()
            case WorkerDrainRequested() if event.worker == self.config.name:
                self._on_drain_requested(event)
            case WorkerJoined() if seq > self._incarnation and event.instance != self._instance:
                self._incarnation = 0  # whatever we hold is somebody else's now
                message = f"another worker joined as {self.config.name!r}: give each worker a name of its own"
                raise NameTaken(message)
            case _:
                pass

    def _on_drain_requested(self, event: WorkerDrainRequested) -> None:
        if self.config.level >= SINCE[event.kind] and not self._drain_asked.is_set():
            _log.info("asked to leave", worker=self.config.name, reason=event.reason)
            self._drain_asked.set()

    # Beating ---------------------------------------------------------------------------

    async def _beat(self) -> None:
        subject = wire.heartbeat(self.config.namespace, self.config.name)
        while True:
            beat = self._heartbeat()
            try:
                self.bus.publish(subject, encode(beat))
            except OperatingError as error:
                _log.debug("heartbeat not sent", error=str(error))
            if self._kept is not None:
                for _ in range(_SENT_AFTER):
                    await asyncio.sleep(0)
                self._kept.beat(beat)
            await asyncio.sleep(self.config.heartbeat_s)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._incarnation, self._read, self._slots.running, self._slots.queued)
