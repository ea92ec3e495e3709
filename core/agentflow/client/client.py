"""The client: handing over work, waiting for its end, watching the log.

A client writes one frame at a time, so that a cancel cannot overtake the submission it is
about. It learns of ends by notices sent to it alone; whoever waits for one that was lost
asks the leader, and reads the log.
"""

from __future__ import annotations

import asyncio
import fnmatch
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, Self, TypeVar

import msgspec
from msgspec import structs

from agentflow import frames, ids, wire
from agentflow.bus import Bus
from agentflow.checks import check
from agentflow.client.function import Function
from agentflow.client.handle import Handle, WorkflowHandle
from agentflow.client.outcome import Outcome
from agentflow.client.values import arguments, as_json, outsourced
from agentflow.client.waiting import Waiting
from agentflow.client.watching import LoggedEvent, logged_events
from agentflow.client.watching import events as logged
from agentflow.client.workflow import Workflow
from agentflow.errors import Disconnected, InvalidRequest
from agentflow.events import (
    Event,
    TaskCancelRequested,
    TaskReprioritized,
    TaskSubmitted,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.fresh import new_id
from agentflow.limits import FRAME_BYTES_MAX, WORKFLOW_PARTS_MAX
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Log
from agentflow.notices import StatusReply
from agentflow.references import uses
from agentflow.writer import FRAME_EVENTS_GOOD, Writer

__all__ = ["DEFAULT_URL", "PATIENCE_S", "Client", "LoggedEvent", "logged_events"]

if TYPE_CHECKING:
    from agentflow.client.locks import Lock, LockInfo, Locks, OnLost
    from agentflow.client.shapes import WorkflowFile
    from agentflow.objects import ObjectStore

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
PATIENCE_S: Final = 60.0
"""How long a submission may stay unacknowledged before it is given up as unknown."""


class Client:
    """A connection to one namespace. An async context manager.

    Entering raises Disconnected if no server answers, StreamMismatch if the namespace's log
    is not what it should be.

        async with agentflow.Client() as client:
            handle = await client.submit(add, 1, 2)
            print(await handle.result())
    """

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        namespace: str = "default",
        name: str = "client",
        replicas: int = 1,
    ) -> None:
        if not (wire.is_name(namespace) and wire.is_name(name)):
            raise InvalidRequest(
                f"namespace and name must be 1 to 64 of A-Z a-z 0-9 _ -: {namespace!r}, {name!r}"
            )
        self.namespace: Final = namespace
        self.name: Final = name
        self.bus: Final = Bus(url, name=f"agentflow client {name}")
        self._stream: Final = JetStreamLog(self.bus, namespace, replicas=replicas)
        self.log: Final[Log] = self._stream
        self._writer = Writer(self.log, name, patience_s=PATIENCE_S)
        self._token: Final = secrets.token_hex(8)
        self._waiting = Waiting(self.bus, self.log, name)
        self._stack = AsyncExitStack()

    @cached_property
    def objects(self) -> ObjectStore:
        """Where arguments and results too large for the log are; loaded when there is one."""
        from agentflow.objects import ObjectStore  # noqa: PLC0415 - most programs have none

        return ObjectStore(self.bus, self.namespace, replicas=self._stream.replicas)

    @cached_property
    def _locks(self) -> Locks:
        """Acquires locks; loaded when there is one."""
        from agentflow.locks.bucket import find_locks, open_locks  # noqa: PLC0415 - most programs have none
        from agentflow.locks.service import Locks  # noqa: PLC0415 - see above

        return Locks(
            lambda: open_locks(self.bus, self.log),
            self._writer.write,
            find_bucket=lambda: find_locks(self.bus, self.log),
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            await stack.enter_async_context(self.log)
            await stack.enter_async_context(self._writer)
            subject = wire.notice(self.namespace, self.name, self._token)
            await self.bus.subscribe(subject, self._waiting.on_notices)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_locks" in self.__dict__:
            await self._locks.close()
        await self._waiting.close()
        await self._stack.aclose()

    # Submitting ------------------------------------------------------------------------

    async def submit(self, function: Function[P, R], *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Hand over one call of a task function; returns once it is durable.

        Raises InvalidRequest, AppendRefused (the log is full), AppendUnknown.
        """
        event = await self._call(function, args, kwargs)
        return await self._submit(event, function.types.result)

    async def submit_many(self, function: Function[P, R], calls: Iterable[Sequence[Any]]) -> list[Handle[R]]:
        """Hand over many calls, each given by its positional arguments, in dense frames.

        Handles come in the order of the calls.
        """
        handles: list[Handle[R]] = []
        chunk: list[TaskSubmitted] = []
        for args in calls:
            chunk.append(await self._call(function, args, {}))
            if len(chunk) >= FRAME_EVENTS_GOOD:
                handles += await self._submit_chunk(chunk, function.types.result)
                chunk = []
        if chunk:
            handles += await self._submit_chunk(chunk, function.types.result)
        return handles

    async def submit_task(self, event: TaskSubmitted) -> Handle[Any]:
        """Hand over a task described by its event: a shell script, a program, a function by name.

        With an `id` of the caller's choice the same task can be handed over again, by whomever,
        without being run again; another task under that id is rejected.
        """
        changes = {name: as_json(getattr(event, name)) for name in ("args", "kwargs", "argv", "env")}
        event = structs.replace(event, id=event.id or new_id(), notify=self._token, **changes)
        return await self._submit(await outsourced(event, self.objects), Any, chosen=True)

    async def shell(self, script: str, **options: Any) -> Handle[Any]:
        """Hand over a shell script. Options are fields of `agentflow.events.TaskSubmitted`."""
        return await self.submit_task(TaskSubmitted(shell=script, **options))

    async def argv(self, argv: Sequence[Any], **options: Any) -> Handle[Any]:
        """Hand over a program with its arguments."""
        return await self.submit_task(TaskSubmitted(argv=list(argv), **options))

    async def submit_workflow(self, flow: Workflow | WorkflowFile) -> WorkflowHandle:
        """Hand over a workflow; returns once it is durable. Raises InvalidRequest for a bad DAG."""
        workflow_id = flow.id or new_id()
        if isinstance(flow, Workflow):
            event = flow.event(workflow_id, self._token)
        else:
            from agentflow.client.submission import from_file  # noqa: PLC0415 - see there

            event = from_file(flow, workflow_id, self._token)
        from agentflow.domain.workflows import fault as fault_of  # noqa: PLC0415 - few programs need it

        fault = fault_of(event.tasks)
        if fault is not None:
            raise InvalidRequest(f"{fault[0]}: {fault[1]}")
        _require_sound(event)
        tasks = [task if uses(task) else await outsourced(task, self.objects) for task in event.tasks]
        whole = _workflow_events(structs.replace(event, tasks=tasks))
        handle = WorkflowHandle(self, workflow_id, [task.task_id for task in tasks])
        handle.chosen = bool(flow.id)
        await self._write([handle], whole if len(whole) == 1 else [], whole)
        return handle

    async def cancel(self, target: str, reason: str = "") -> None:
        """Ask for a task, or all open tasks of a workflow, not to run or to be stopped.

        Returns once the request is durable; it needs no leader. What came of it is told by the
        outcome. Something nobody knows is answered with `event.rejected`.
        """
        kinds = await self._kinds_of(target)
        for kind in kinds:
            event = kind(id=target, reason=reason)
            _require_sound(event)
            await self._writer.write([event])

    async def _kinds_of(self, target: str) -> Sequence[type[TaskCancelRequested | WorkflowCancelRequested]]:
        """Which request cancels a target; both if nobody can say whether it is a task or a workflow."""
        if ids.TASK_SEPARATOR in target:
            return [TaskCancelRequested]
        handle = self._waiting.find(target)
        if handle is not None:
            return [WorkflowCancelRequested if isinstance(handle, WorkflowHandle) else TaskCancelRequested]
        try:
            status = (await self.status([target])).statuses[0]
        except Disconnected:
            return [TaskCancelRequested, WorkflowCancelRequested]
        return [WorkflowCancelRequested if status.workflow else TaskCancelRequested]

    async def reprioritize(self, task: str, priority: int | str) -> None:
        """Give a waiting task another priority: 0 to 1000, or urgent, high, medium, low."""
        event = TaskReprioritized(id=task, priority=priority)
        _require_sound(event)
        await self._writer.write([event])

    async def _call(
        self, function: Function[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> TaskSubmitted:
        given, named = arguments(args, kwargs)
        event = TaskSubmitted(
            id=new_id(),
            function=function.name,
            args=given,
            kwargs=named,
            notify=self._token,
            **function.wire_options,
        )
        return await outsourced(event, self.objects)

    async def _submit(self, event: TaskSubmitted, wanted: Any, *, chosen: bool = False) -> Handle[Any]:
        _require_sound(event)
        handle: Handle[Any] = Handle(self, event.id, wanted)
        handle.chosen = chosen
        await self._write((handle,), (event,))
        return handle

    async def _submit_chunk(self, events: list[TaskSubmitted], wanted: Any) -> list[Handle[Any]]:
        for event in events:
            _require_sound(event)
        handles: list[Handle[Any]] = [Handle(self, event.id, wanted) for event in events]
        await self._write(handles, events)
        return handles

    async def _write(
        self,
        handles: Sequence[Handle[Any]],
        events: Sequence[Event],
        batch: Sequence[Event] = (),
    ) -> None:
        """Write what is submitted; meanwhile already its end may be told."""
        await self._waiting.room()
        self._waiting.enter(handles)
        try:
            seq = await (self._writer.write(events) if events else self._writer.write_batch(batch))
        except BaseException:
            self._waiting.leave(handles)
            raise
        if len(handles) == 1:
            handles[0].seq = seq

    # Waiting ---------------------------------------------------------------------------

    def task(self, task_id: str) -> Handle[Any]:
        """A handle on any task or workflow, submitted by whomever."""
        return self._waiting.find(task_id) or Handle(self, task_id)

    async def status(self, wanted: Sequence[str]) -> StatusReply:
        """What the leader knows of these ids. Raises Disconnected if there is no leader."""
        return await self._waiting.status(wanted)

    async def outcome_of(self, handle: Handle[Any]) -> Outcome:
        """How a task ended, once it has; with its result, wherever that lies."""
        outcome = handle.known()
        if outcome is None:
            outcome = await self._waiting.wait(handle)
        if outcome.object is None:
            return outcome
        data = await self.objects.get(outcome.object)
        return structs.replace(outcome, result=msgspec.Raw(data), object=None)

    async def outcomes(self, wanted: Sequence[str]) -> list[Outcome]:
        """How several tasks ended, in the order asked."""
        return list(await asyncio.gather(*(self.outcome_of(self.task(task_id)) for task_id in wanted)))

    # Locks -----------------------------------------------------------------------------

    def lock(  # noqa: PLR0913 - each is named at the call, and most are left out
        self,
        name: str,
        *,
        wait_s: float | None = None,
        ttl_s: int = 10,
        mode: Literal["exclusive", "shared", "semaphore"] = "exclusive",
        permits: int = 1,
        metadata: Mapping[str, str] | None = None,
        on_lost: OnLost = "cancel",
        holder: str = "",
    ) -> Lock:
        """A distributed lock: any text of 1 to 200 characters names one.

        `wait_s`: how long entering waits in line, first come, first served (None: for ever;
        0: not at all). `ttl_s`: whole seconds after which a holder that died has lost it; it is
        renewed by itself at a third. `mode`: exclusive, shared (with other shared holders) or
        semaphore (`permits` holders). `metadata` and `holder` are shown by `locks`. `on_lost`:
        what happens when it is lost inside the `async with`: "cancel" the body, which raises
        LockLost, "warn", or a callback.

            async with client.lock("db-migrate", wait_s=5.0) as held:
                await migrate(fencing_token=held.token)

        Entering raises LockTimeout. Raises InvalidRequest for what cannot be meant.
        """
        from agentflow.client.locks import Lock, LockOptions  # noqa: PLC0415 - most programs have none

        options = LockOptions(
            wait_s=wait_s,
            ttl_s=ttl_s,
            mode=mode,
            permits=permits,
            metadata=metadata or {},
            on_lost=on_lost,
            holder=holder,
        )
        return Lock(self._locks, self.name, name, options)

    async def locks(self, pattern: str = "*") -> list[LockInfo]:
        """Locks that somebody holds or waits for; `pattern` is a shell pattern for their names."""
        return [info for info in await self._locks.infos() if fnmatch.fnmatchcase(info.name, pattern)]

    async def lock_info(self, name: str) -> LockInfo | None:
        """Who holds a lock and who waits for it; None if nobody does."""
        infos = await self._locks.infos(name)
        return infos[0] if infos else None

    # Watching --------------------------------------------------------------------------

    async def events(
        self, *, after: int | None = None, until: int | None = None, subjects: Sequence[str] = ()
    ) -> AsyncIterator[LoggedEvent]:
        """The events of the log, from just after a sequence (None: from now), in order.

        Goes on for ever unless `until` names the last sequence wanted. `subjects` are NATS
        subject filters.
        """
        if after is None:
            after = (await self.log.identity()).last_seq
        async for event in logged(self.log, after=after, until=until, subjects=subjects):
            yield event


def _require_sound(event: Event) -> None:
    bad = check(event)
    if bad is not None:
        raise InvalidRequest(f"{bad.reason}: {bad.detail}")


def _workflow_events(event: WorkflowSubmitted) -> list[Event]:
    """A workflow as one event, or as parts closed by one. Raises InvalidRequest if it is too large."""
    try:
        data = frames.encode([event])
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the workflow is not JSON: {error}") from error
    if len(data) <= FRAME_BYTES_MAX:
        return [event]
    chunks = _chunks(event.tasks)
    if len(chunks) > WORKFLOW_PARTS_MAX:
        raise InvalidRequest(
            f"the workflow takes {len(chunks)} frames; at most {WORKFLOW_PARTS_MAX} fit one write"
        )
    parts = [WorkflowPart(workflow=event.id, part=number, tasks=tasks) for number, tasks in enumerate(chunks)]
    return [*parts, structs.replace(event, tasks=[], parts=len(parts))]


def _chunks(tasks: Sequence[WorkflowTask]) -> list[list[WorkflowTask]]:
    """Tasks in stretches that fit a frame each."""
    chunks: list[list[WorkflowTask]] = []
    room = 0
    for task in tasks:
        size = len(frames.encode(task)) + 1
        if size > FRAME_BYTES_MAX - 1_024:
            raise InvalidRequest(
                f"task {task.task_id} takes {size} bytes; at most {FRAME_BYTES_MAX - 1_024} fit"
            )
        if size > room:
            chunks.append([])
            room = FRAME_BYTES_MAX - 1_024
        chunks[-1].append(task)
        room -= size
    return chunks
