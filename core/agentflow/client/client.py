"""The client: handing over work, waiting for its end, watching the log.

A client writes one frame at a time, so that a cancel cannot overtake the submission it is
about. It learns of ends by notices sent to it alone; whoever waits for one that was lost
asks the leader, and reads the log.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar

import msgspec
from msgspec import Struct, structs

from agentflow import frames, wire
from agentflow.bus import Bus
from agentflow.checks import Bad, check
from agentflow.client import workflow as workflows
from agentflow.client.files import WorkflowFile
from agentflow.client.function import Function
from agentflow.client.handle import Handle, WorkflowHandle
from agentflow.client.outcome import FINAL, Outcome, from_event, from_notice
from agentflow.client.workflow import Workflow
from agentflow.domain import workflows as dags
from agentflow.errors import InvalidRequest, ObjectMissing, OperatingError
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
from agentflow.frames import Decision
from agentflow.fresh import new_id
from agentflow.limits import FRAME_BYTES_MAX, INLINE_BYTES_MAX, WORKFLOW_PARTS_MAX
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Log, Message
from agentflow.logs import get_logger
from agentflow.notices import Status, StatusReply, StatusRequest, decode_notices, decode_status_reply
from agentflow.objects import ObjectStore
from agentflow.writer import FRAME_EVENTS_GOOD, Writer

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_URL: Final = "nats://127.0.0.1:4222"
PATIENCE_S: Final = 60.0
"""How long a submission may stay unacknowledged before it is given up as unknown."""
_ASK_AFTER_S: Final = 0.5
"""Waiting this long without a notice, the client asks."""
_ASK_EVERY_S_MAX: Final = 10.0
_ASK_TIMEOUT_S: Final = 3.0
_ASK_IDS_MAX: Final = 1_000
_UNKNOWN_MAX: Final = 3
"""Times the leader may not know an id before the whole log is searched for it."""

_log = get_logger(__name__)


class LoggedEvent(Struct, frozen=True, gc=False):
    """One event as it stands in the log."""

    seq: int
    index: int
    time_ms: int
    kind: str
    actor: str
    event: Event | None
    bad: Bad | None = None
    """Why it is no event, if it is none."""
    decision: Decision | None = None


class _Wait(Struct):
    """Somebody waits for this end."""

    handle: Handle[Any]
    ask_at: float
    pause_s: float
    unknown: int = 0


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
        self.log: Final[Log] = JetStreamLog(self.bus, namespace, replicas=replicas)
        self.objects: Final = ObjectStore(self.bus, namespace, replicas=replicas)
        self._writer = Writer(self.log, name, patience_s=PATIENCE_S)
        self._token: Final = secrets.token_hex(8)
        self._open: dict[str, Handle[Any]] = {}
        self._waits: dict[str, _Wait] = {}
        self._asker: asyncio.Task[None] | None = None
        self._asker_wake = asyncio.Event()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            await stack.enter_async_context(self.log)
            await stack.enter_async_context(self._writer)
            subject = wire.notice(self.namespace, self.name, self._token)
            await self.bus.subscribe(subject, self._on_notices)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asker is not None:
            self._asker.cancel()
            await asyncio.wait([self._asker])
            self._asker = None
        await self._stack.aclose()
        for wait in self._waits.values():
            wait.handle.future().cancel()

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
        """Hand over a task described by its event: a shell script, a program, a function by name."""
        changes: dict[str, Any] = {"notify": self._token}
        if not event.id:
            changes["id"] = new_id()
        return await self._submit(structs.replace(event, **changes), Any)

    async def shell(self, script: str, **options: Any) -> Handle[Any]:
        """Hand over a shell script. Options are fields of `agentflow.events.TaskSubmitted`."""
        return await self.submit_task(TaskSubmitted(shell=script, **options))

    async def argv(self, argv: Sequence[str], **options: Any) -> Handle[Any]:
        """Hand over a program with its arguments."""
        return await self.submit_task(TaskSubmitted(argv=list(argv), **options))

    async def submit_workflow(self, flow: Workflow | WorkflowFile) -> WorkflowHandle:
        """Hand over a workflow; returns once it is durable. Raises InvalidRequest for a bad DAG."""
        workflow_id = flow.id or new_id()
        if isinstance(flow, Workflow):
            event = flow.event(workflow_id, self._token)
        else:
            event = workflows.from_file(flow, workflow_id, self._token)
        fault = dags.fault(event.tasks)
        if fault is not None:
            raise InvalidRequest(f"{fault[0]}: {fault[1]}")
        _require_sound(event)
        handle = WorkflowHandle(self, workflow_id, [task.task_id for task in event.tasks])
        self._open[workflow_id] = handle
        batch = _workflow_frames(event)
        if len(batch) == 1:
            await self._writer.write([event])
        else:
            await self._writer.write_batch(batch)
        return handle

    async def cancel(self, target: str, reason: str = "") -> None:
        """Ask for a task, or all open tasks of a workflow, not to run or to be stopped."""
        status = (await self.status([target])).statuses[0]
        workflow = status.workflow
        event = (
            WorkflowCancelRequested(id=target, reason=reason)
            if workflow
            else TaskCancelRequested(id=target, reason=reason)
        )
        _require_sound(event)
        await self._writer.write([event])

    async def reprioritize(self, task: str, priority: int | str) -> None:
        """Give a waiting task another priority: 0 to 1000, or urgent, high, medium, low."""
        event = TaskReprioritized(id=task, priority=priority)
        _require_sound(event)
        await self._writer.write([event])

    async def _call(self, function: Function[..., Any], args: Sequence[Any], kwargs: Any) -> TaskSubmitted:
        options = function.wire_options
        event = TaskSubmitted(
            id=new_id(), function=function.name, args=list(args), kwargs=kwargs, notify=self._token, **options
        )
        if not args and not kwargs:
            return event
        try:
            size = len(frames.encode((event.args, kwargs)))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{function.name}: the arguments are not JSON: {error}") from error
        if size <= INLINE_BYTES_MAX:
            return event
        ref = await self.objects.put(frames.encode({"args": event.args, "kwargs": kwargs}))
        return structs.replace(event, args=[], kwargs={}, object=ref)

    async def _submit(self, event: TaskSubmitted, wanted: Any) -> Handle[Any]:
        _require_sound(event)
        handle = self._open[event.id] = Handle(self, event.id, wanted)
        try:
            await self._writer.write((event,))
        except InvalidRequest:
            self._open.pop(event.id, None)
            raise
        return handle

    async def _submit_chunk(self, events: list[TaskSubmitted], wanted: Any) -> list[Handle[Any]]:
        for event in events:
            _require_sound(event)
        handles: list[Handle[Any]] = [Handle(self, event.id, wanted) for event in events]
        self._open.update((handle.id, handle) for handle in handles)
        await self._writer.write(events)
        return handles

    # Waiting ---------------------------------------------------------------------------

    def task(self, task_id: str) -> Handle[Any]:
        """A handle on any task or workflow, submitted by whomever."""
        return self._open.get(task_id) or Handle(self, task_id)

    async def status(self, wanted: Sequence[str]) -> StatusReply:
        """What the leader knows of these ids. Raises Disconnected if there is no leader."""
        request = frames.encode(StatusRequest(list(wanted)))
        answer = await self.bus.request(wire.service(self.namespace, "status"), request, _ASK_TIMEOUT_S)
        return decode_status_reply(answer)

    async def outcome_of(self, handle: Handle[Any]) -> Outcome:
        """How a task ended, once it has; with its result, wherever that lies."""
        outcome = handle.known()
        if outcome is None:
            outcome = await self._wait(handle)
        if outcome.object is None:
            return outcome
        data = await self.objects.get(outcome.object)
        return structs.replace(outcome, result=msgspec.Raw(data), object=None)

    async def outcomes(self, wanted: Sequence[str]) -> list[Outcome]:
        """How several tasks ended, in the order asked."""
        return list(await asyncio.gather(*(self.outcome_of(self.task(task_id)) for task_id in wanted)))

    async def _wait(self, handle: Handle[Any]) -> Outcome:
        ours = self._open.get(handle.id) is handle
        pause_s = _ASK_AFTER_S if ours else 0.0
        now = asyncio.get_running_loop().time()
        self._waits[handle.id] = _Wait(handle, now + pause_s, max(pause_s, 0.05))
        if self._asker is None:
            self._asker = asyncio.create_task(self._ask_for_ever(), name="agentflow asker")
        self._asker_wake.set()
        try:
            return await asyncio.shield(handle.future())
        finally:
            self._waits.pop(handle.id, None)

    def _on_notices(self, _subject: str, data: bytes, _reply: str, _headers: object) -> None:
        try:
            notices = decode_notices(data)
        except msgspec.MsgspecError as error:
            _log.warning("a notice could not be read", error=str(error))
            return
        opened = self._open
        for notice in notices:
            handle = opened.get(notice.id)
            if handle is None:
                continue
            outcome = from_notice(notice)
            if outcome is None:
                self._ask_now(handle)
            else:
                del opened[notice.id]
                handle.settle(outcome)

    def _ask_now(self, handle: Handle[Any]) -> None:
        wait = self._waits.get(handle.id)
        if wait is not None:
            wait.ask_at = 0.0
            self._asker_wake.set()

    async def _ask_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            due = [wait for wait in self._waits.values() if wait.ask_at <= now and not wait.handle.done]
            for start in range(0, len(due), _ASK_IDS_MAX):
                await self._ask(due[start : start + _ASK_IDS_MAX])
            next_at = min((wait.ask_at for wait in self._waits.values()), default=now + _ASK_AFTER_S)
            self._asker_wake.clear()
            try:
                await asyncio.wait_for(self._asker_wake.wait(), max(next_at - loop.time(), 0.02))
            except TimeoutError:
                continue

    async def _ask(self, due: list[_Wait]) -> None:
        """Ask about those somebody waits for, and in passing about others still open."""
        now = asyncio.get_running_loop().time()
        for wait in due:
            wait.ask_at = now + wait.pause_s
            wait.pause_s = min(wait.pause_s * 2, _ASK_EVERY_S_MAX)
        wanted = {wait.handle.id: wait.handle for wait in due}
        wanted.update(islice(self._open.items(), _ASK_IDS_MAX - len(wanted)))
        try:
            reply = await self.status(list(wanted))
            ended = [status for status in reply.statuses if status.state in FINAL and status.seq]
            for outcome in await self._read_outcomes(ended):
                self._settle(wanted[outcome.id], outcome)
            await self._search_unknown({status.id for status in reply.statuses if status.state == "unknown"})
        except (OperatingError, msgspec.MsgspecError) as error:
            _log.debug("status not known", error=str(error))

    async def _search_unknown(self, unknown: set[str]) -> None:
        for task_id in unknown:
            wait = self._waits.get(task_id)
            if wait is None:
                continue
            wait.unknown += 1
            if wait.unknown == _UNKNOWN_MAX:
                outcome = await self._search(task_id)
                if outcome is not None:
                    self._settle(wait.handle, outcome)

    def _settle(self, handle: Handle[Any], outcome: Outcome) -> None:
        self._open.pop(handle.id, None)
        handle.settle(outcome)

    async def _read_outcomes(self, ended: Sequence[Status]) -> list[Outcome]:
        """The outcomes behind statuses; each message is read once."""
        items: dict[int, Sequence[Any]] = {}
        for seq in {status.seq for status in ended}:
            message = await self.log.read(seq)
            if message is None:
                raise ObjectMissing(f"the log no longer holds the end of tasks at {seq}")
            items[seq] = frames.judge(message.subject, message.data, message.headers).items
        return [
            from_event(
                status.id, status.state, _at(items[status.seq], status.index), status.seq, status.index
            )
            for status in ended
        ]

    async def _search(self, task_id: str) -> Outcome | None:
        """Read the whole log for the end of a task the leader has forgotten."""
        last_seq = (await self.log.identity()).last_seq
        states = {
            "task.completed": "completed",
            "task.failed": "failed",
            "task.cancelled": "cancelled",
            "task.timed_out": "failed",
            "task.quarantined": "failed",
            "workflow.completed": "",
        }
        found: Outcome | None = None
        async for logged in self.events(after=0, until=last_seq):
            event = logged.event
            if logged.kind in states and getattr(event, "id", None) == task_id:
                state = states[logged.kind] or getattr(event, "state", "")
                found = from_event(task_id, state, event, logged.seq, logged.index)
        return found

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
        if until is not None and after >= until:
            return
        async for messages in self.log.follow(after, subjects=subjects):
            for message in messages:
                for logged in logged_events(message):
                    yield logged
                if until is not None and message.seq >= until:
                    return


def logged_events(message: Message) -> list[LoggedEvent]:
    """What a message of the log says, event by event."""
    judged = frames.judge(message.subject, message.data, message.headers)
    time_ms = message.time_ns // 1_000_000
    if judged.whole is not None:
        return [LoggedEvent(message.seq, -1, time_ms, judged.kind, judged.actor, None, judged.whole)]
    return [
        LoggedEvent(message.seq, index, time_ms, judged.kind, judged.actor, None, item)
        if isinstance(item, Bad)
        else LoggedEvent(message.seq, index, time_ms, judged.kind, judged.actor, item, None, judged.decision)
        for index, item in enumerate(judged.items)
    ]


def _at(items: Sequence[Any], index: int) -> Any:
    return items[index] if 0 <= index < len(items) else None


def _require_sound(event: Event) -> None:
    bad = check(event)
    if bad is not None:
        raise InvalidRequest(f"{bad.reason}: {bad.detail}")


def _workflow_frames(event: WorkflowSubmitted) -> list[tuple[str, bytes]]:
    """A workflow as one frame, or as parts closed by one. Raises InvalidRequest if it is too large."""
    try:
        data = frames.encode([event])
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the workflow is not JSON: {error}") from error
    if len(data) <= FRAME_BYTES_MAX:
        return [(event.kind, data)]
    chunks = _chunks(event.tasks)
    if len(chunks) > WORKFLOW_PARTS_MAX:
        raise InvalidRequest(
            f"the workflow takes {len(chunks)} frames; at most {WORKFLOW_PARTS_MAX} fit one write"
        )
    parts = [WorkflowPart(workflow=event.id, part=number, tasks=tasks) for number, tasks in enumerate(chunks)]
    closing = structs.replace(event, tasks=[], parts=len(parts))
    return [(part.kind, frames.encode([part])) for part in parts] + [(closing.kind, frames.encode([closing]))]


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
