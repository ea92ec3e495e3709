"""Rows: what each event of the log made of tasks, workflows, workers, leaders and locks.

A `Recorder` is told of each event by the fold itself, with the fold's verdict and the steps
that tasks took because of it, and turns that into rows of the tables of schema.sql. It
decides nothing, so it cannot come to another result than the fold.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from agentflow import ids, wire
from agentflow.checks import Bad, priority_of
from agentflow.domain.fold import fold
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.state import APPLIED, At, Ended, Kind, Namespace, Task, Verdict
from agentflow.domain.steps import node_of
from agentflow.events import (
    Event,
    LeaderElected,
    LockAcquired,
    LockLost,
    LockReleased,
    MasterJoined,
    MasterLeft,
    PolicyChanged,
    TaskAssigned,
    TaskCancelRequested,
    TaskCompleted,
    TaskFailed,
    TaskReprioritized,
    TaskStarted,
    TaskSubmitted,
    WorkerDraining,
    WorkerDrainRequested,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.frames import Judged, encode, judge
from agentflow.limits import LEVEL_FIRST
from agentflow.log.port import Message
from agentflow_projections.columns import Columns, Row

RUNS_SHOWN_MAX: Final = 200
"""Characters kept of what a task runs; its submission has all of it."""
DETAIL_SHOWN_MAX: Final = 1_000
"""Characters kept of an error's message; the event has all of it."""
INDEXES: Final = 8_192
"""Positions there are in one frame: `pos` is seq * INDEXES + index."""

BULK_MIN: Final = 4
"""Frames of fewer events are taken one by one: that is faster."""
IN_BULK: Final = frozenset({TaskSubmitted.kind, TaskAssigned.kind, TaskCompleted.kind})
"""Kinds of which an event that is applied makes one step of its own task, which no other event of the frame follows up."""
_OWN_STEP: Final = {
    TaskSubmitted.kind: State.READY,
    TaskAssigned.kind: State.RUNNING,
    TaskCompleted.kind: State.COMPLETED,
}


class Recorder:
    """Folds messages into a state, and keeps the rows they cause until `take` hands them over."""

    def __init__(self, state: Namespace) -> None:
        self.state: Final = state
        self._rows: dict[str, Columns] = {}
        self._kind = ""
        self._steps: list[tuple[Task, State]] = []
        self._parts: list[tuple[int, WorkflowPart]] = [
            (at.seq * INDEXES + at.index, part) for at, part in state.parts
        ]
        self._workflows = {each.id: each.seq * INDEXES + each.index for each in state.workflows.values()}
        self._holds = {name: dict(holds) for name, holds in state.locks.items()}
        self._changes = self._table("task_changes")
        self._submissions = self._table("task_submissions")
        self._frames = self._table("frames")
        state.steps = self._steps

    def take(self) -> dict[str, Columns]:
        """The rows since the last call, by table; tables without any are left out."""
        return {name: found.take() for name, found in self._rows.items() if found}

    @property
    def size(self) -> int:
        """Rows kept, about: changes of tasks and frames."""
        return len(self._changes) + len(self._submissions) + len(self._frames)

    def apply(self, message: Message, judged: Judged | None = None) -> Sequence[Verdict]:
        """Fold one message; the verdicts on its events. One that was folded before changes nothing.

        `judged` is what `judge` makes of it, for who had that done elsewhere.
        """
        state = self.state
        if message.seq <= state.seq:
            return []
        if judged is None:
            judged = judge(message.subject, message.data, message.headers)
        self._kind = judged.kind
        self._steps.clear()
        ended = len(state.ended)
        if judged.kind in IN_BULK and judged.whole is None and judged.level == LEVEL_FIRST:
            verdicts = fold(state, message.seq, message.time_ns, judged)
            self._many(message.seq, judged, verdicts)
        else:
            verdicts = fold(state, message.seq, message.time_ns, judged, self._observe)
        if len(state.ended) > ended:
            self._end_workflows(state.ended[ended:])
        self._frame(message, judged)
        return verdicts

    # Many events at once -------------------------------------------------------------------

    def _many(self, seq: int, judged: Judged, verdicts: Sequence[Verdict]) -> None:
        """What a frame made of its tasks: at one go, if all its events did the same."""
        steps, count = self._steps, len(verdicts)
        if count < BULK_MIN or len(steps) != count or verdicts.count(APPLIED) != count:
            self._one_by_one(seq, judged, verdicts)
            return
        tasks = [task for task, _ in steps]
        match judged.kind:
            case TaskSubmitted.kind:
                self._many_submitted(seq, judged, tasks)
            case TaskAssigned.kind:
                self._many_assigned(seq, tasks)
            case _:
                self._many_completed(seq, judged.items, tasks)
        steps.clear()

    def _one_by_one(self, seq: int, judged: Judged, verdicts: Sequence[Verdict]) -> None:
        """The same, event by event: each that was applied made the next step, and those that follow from it."""
        steps = iter(list(self._steps))
        following = next(steps, None)
        at = At(seq, 0, self.state.server_ms, judged.actor)
        for at.index, (item, verdict) in enumerate(zip(judged.items, verdicts, strict=True)):
            self._steps.clear()
            if verdict.kind is Kind.APPLIED and following is not None:
                self._steps.append(following)
                following = next(steps, None)
                while following is not None and following[1] is not _OWN_STEP[judged.kind]:
                    self._steps.append(following)
                    following = next(steps, None)
            self._observe(at, item, verdict)

    def _many_submitted(self, seq: int, judged: Judged, tasks: Sequence[Task]) -> None:
        items, terms, count = judged.items, tasks[0].terms, len(tasks)
        pos = range(seq * INDEXES, seq * INDEXES + count)
        numbers = range(tasks[0].number, tasks[0].number + count)
        if terms.function and all([task.terms is terms for task in tasks]):  # noqa: C419 - a list is faster
            ids_ = [task.id for task in tasks]
            titles = _alike([event.title or None for event in items])  # type: ignore[union-attr] # all were applied
            alike = self._submitted_alike(items[0], tasks[0], judged.actor)
            self._submissions.extend_columns(count, (numbers, ids_, pos, *alike[3:6], titles, *alike[7:]))
        else:
            at = At(seq, 0, self.state.server_ms, judged.actor)
            for where, item, task in zip(pos, items, tasks, strict=True):
                self._task_submitted(item, task, where, at)
        self._change_many(numbers, pos, State.READY, 0, None)

    def _many_assigned(self, seq: int, tasks: Sequence[Task]) -> None:
        worker = tasks[0].worker
        assert worker is not None
        pos = range(seq * INDEXES, seq * INDEXES + len(tasks))
        numbers = array("q", [task.number for task in tasks])
        attempts = _numbers([task.attempt for task in tasks])
        self._change_many(numbers, pos, State.RUNNING, attempts, worker.incarnation)

    def _many_completed(self, seq: int, items: Sequence[Any], tasks: Sequence[Task]) -> None:
        pos = range(seq * INDEXES, seq * INDEXES + len(tasks))
        numbers = array("q", [task.number for task in tasks])
        attempts = _numbers([task.attempt for task in tasks])
        started = [event.started_at_ms for event in items]
        begun = _numbers(started) if all(started) else _alike([each or None for each in started])
        took = _numbers([event.run_us for event in items])
        self._change_many(numbers, pos, State.COMPLETED, attempts, items[0].incarnation, begun, took)

    def _change_many(
        self,
        numbers: Any,
        pos: range,
        state: State,
        attempts: Any,
        worker: int | None,
        begun: Any = None,
        took: Any = None,
    ) -> None:
        now_ms, kind = self.state.clock_ms, self._kind
        columns = (numbers, pos, now_ms, state, kind, attempts, worker, begun, took, None, None)
        self._changes.extend_columns(len(pos), columns)

    # Frames ----------------------------------------------------------------------------

    def _frame(self, message: Message, judged: Judged) -> None:
        plain = wire.event(self.state.name, judged.kind, judged.actor) if judged.actor else ""
        headers = message.headers
        self._frames.append(
            (
                message.seq,
                message.time_ns,
                self.state.clock_ms,
                judged.kind,
                judged.actor,
                message.subject if message.subject != plain else None,
                encode(headers).decode() if headers else None,
                len(judged.items),
                message.data,
                _sound(judged, message.data),
            )
        )
        decision = judged.decision
        if decision is not None:
            self._table("decided").append(
                (message.seq, decision.epoch, decision.basis, decision.now_ms, decision.policy)
            )

    # Events ----------------------------------------------------------------------------

    def _observe(self, at: At, event: Event | Bad, verdict: Verdict) -> None:
        pos = at.seq * INDEXES + at.index
        if verdict is not APPLIED and verdict.kind is not Kind.APPLIED:
            reason = str(verdict.reason) if verdict.reason is not None else None
            self._table("refusals").append((pos, str(verdict.kind), reason, verdict.detail or None))
            self._steps.clear()
            return
        match event:
            case TaskSubmitted():
                self._task_submitted(event, self._steps[0][0], pos, at)
            case TaskAssigned():
                pass
            case TaskCompleted() | TaskFailed():
                self._outcome(event, pos)
                return
            case TaskStarted():
                self._started(event, pos)
                return
            case Bad():
                pass
            case _:
                self._seldom(event, pos, at)
        self._changed(pos, None)

    def _changed(self, pos: int, detail: str | None) -> None:
        """A row for each step that tasks took because of this event."""
        now_ms, kind = self.state.clock_ms, self._kind
        for task, state in self._steps:
            worker = task.worker
            self._changes.append(
                (
                    task.number,
                    pos,
                    now_ms,
                    state,
                    kind,
                    task.attempt,
                    worker.incarnation if worker is not None else None,
                    None,
                    None,
                    task.error or None if state is State.SKIPPED or state is State.FAILED else None,
                    detail,
                )
            )
        self._steps.clear()

    def _outcome(self, event: TaskCompleted | TaskFailed, pos: int) -> None:
        """The attempt's own row, and those of the tasks that follow from it."""
        task, state = self._steps[0]
        failed = type(event) is TaskFailed
        self._changes.append(
            (
                task.number,
                pos,
                self.state.clock_ms,
                state,
                self._kind,
                task.attempt,
                event.incarnation,
                event.started_at_ms or None,
                event.run_us,
                event.error if failed else None,  # type: ignore[union-attr] # mypy does not follow `failed`
                (event.message[:DETAIL_SHOWN_MAX] or None) if failed else None,  # type: ignore[union-attr]
            )
        )
        del self._steps[0]
        if self._steps:
            self._changed(pos, f"{task.id} ended {state}" if state is not State.COMPLETED else None)

    def _started(self, event: TaskStarted, pos: int) -> None:
        task = self.state.tasks[event.id]
        row = (task.number, pos, self.state.clock_ms, State.RUNNING, self._kind, task.attempt)
        self._changes.append((*row, event.incarnation, event.started_at_ms, None, None, None))

    def _task_submitted(self, event: Any, task: Task, pos: int, at: At) -> None:
        self._submissions.append(
            (task.number, task.id, pos, *self._submitted_alike(event, task, at.actor)[3:])
        )

    def _submitted_alike(self, event: Any, task: Task, client: str) -> Row:
        """A submission's row but for what tells the task from others of the same terms, which is None."""
        runs_kind, runs = _runs(event)
        terms = task.terms
        demand = terms.demand
        return (
            None,
            None,
            None,
            self.state.clock_ms,
            None,
            None,
            event.title or None,
            runs_kind,
            runs,
            client,
            task.priority,
            terms.retry.max_attempts if terms.retry is not None else 1,
            terms.timeout_s or None,
            event.queue_timeout_s or None,
            demand.cpu or None,
            demand.memory_mb or None,
            demand.gpus or None,
            demand.group or None,
            _text_of(dict(demand.labels)),
            demand.lock or None,
        )

    def _seldom(self, event: Event, pos: int, at: At) -> None:  # noqa: C901 - it only routes
        match event:
            case WorkflowSubmitted():
                self._workflow_submitted(event, pos, at)
            case WorkflowPart():
                self._part(event, pos)
            case TaskCancelRequested() | WorkflowCancelRequested():
                self._cancel_requested(event, pos)
            case TaskReprioritized():
                task = self.state.tasks[event.id]
                self._put("task_priorities", task.number, pos, task.priority)
            case WorkerJoined() | WorkerDraining() | WorkerLeft() | WorkerLost() | WorkerDrainRequested():
                self._worker(event, pos, at)
            case LeaderElected():
                self._put("elections", event.epoch, pos, event.master, event.level)
            case MasterJoined():
                self._put(
                    "master_changes",
                    at.actor,
                    pos,
                    "joined",
                    event.instance,
                    event.level,
                    event.host,
                    event.pid,
                )
            case MasterLeft():
                self._put("master_changes", at.actor, pos, "left", event.instance, None, None, None)
            case LockAcquired() | LockReleased() | LockLost():
                self._lock(event, pos, at)
            case PolicyChanged():
                self._put("policies", event.policy.version, pos, encode(event.policy).decode())
            case _:
                pass

    def _put(self, table: str, key: Any, pos: int, *rest: Any) -> None:
        """A row that begins with its key, the position and the log time."""
        self._table(table).append((key, pos, self.state.clock_ms, *rest))

    # Workflows ---------------------------------------------------------------------------

    def _part(self, event: WorkflowPart, pos: int) -> None:
        if not event.part:
            self._parts.clear()
        self._parts.append((pos, event))

    def _workflow_submitted(self, event: WorkflowSubmitted, pos: int, at: At) -> None:
        parts = self._parts[-event.parts :] if event.parts else []
        self._parts = []
        works = [(where, work) for where, part in parts for work in part.tasks]
        works += [(pos, work) for work in event.tasks]
        tasks = {node_of(task).task_id: task for task, _ in self._steps}
        workflow_id = event.id or ids.derived(at.seq, at.index)
        self._workflows[workflow_id] = pos
        self._table("workflow_submissions").append(
            (
                pos,
                workflow_id,
                self.state.clock_ms,
                event.name or None,
                event.description or None,
                at.actor,
                len(works),
            )
        )
        for where, work in works:
            self._workflow_task(work, tasks[work.task_id], where, pos, at.actor)
        self._table("task_dependencies").extend(
            (tasks[work.task_id].number, tasks[needed].number)
            for _, work in works
            for needed in dict.fromkeys(work.dependencies)
        )

    def _workflow_task(self, work: Any, task: Task, where: int, workflow: int, client: str) -> None:
        runs_kind, runs = _runs(work)
        terms, demand = task.terms, task.terms.demand
        self._submissions.append(
            (
                task.number,
                task.id,
                where,
                self.state.clock_ms,
                workflow,
                work.task_id,
                work.title or None,
                runs_kind,
                runs,
                client,
                priority_of(work.priority),
                terms.retry.max_attempts if terms.retry is not None else 1,
                terms.timeout_s or None,
                work.queue_timeout_s or None,
                demand.cpu or None,
                demand.memory_mb or None,
                demand.gpus or None,
                demand.group or None,
                _text_of(dict(demand.labels)),
                demand.lock or None,
            )
        )

    def _end_workflows(self, what_ended: Sequence[Ended]) -> None:
        """The fold's own word on which workflows ended."""
        for ended in what_ended:
            if isinstance(ended.state, WorkflowState):
                pos = ended.seq * INDEXES + ended.index
                self._put("workflow_ends", self._workflows.pop(ended.id), pos, str(ended.state))

    def _cancel_requested(self, event: TaskCancelRequested | WorkflowCancelRequested, pos: int) -> None:
        if isinstance(event, TaskCancelRequested):
            wanted = [self.state.tasks[event.id]]
        else:
            workflow = self.state.workflows[event.id]
            wanted = [task for task in workflow.tasks.values() if task.cancel is not None]
        for task in wanted:
            self._put("task_cancels", task.number, pos, task.cancel)

    # Workers and locks ---------------------------------------------------------------------

    def _worker(
        self,
        event: WorkerJoined | WorkerDraining | WorkerLeft | WorkerLost | WorkerDrainRequested,
        pos: int,
        at: At,
    ) -> None:
        match event:
            case WorkerJoined():
                self._worker_joined(event, pos, at)
            case WorkerDraining():
                self._put("worker_changes", event.incarnation, pos, "draining", None)
            case WorkerLeft():
                self._put("worker_changes", event.incarnation, pos, "left", None)
            case WorkerLost():
                self._put("worker_changes", event.incarnation, pos, "lost", event.reason or None)
            case WorkerDrainRequested():
                incarnation = self.state.workers[event.worker].incarnation
                self._put("worker_changes", incarnation, pos, "draining", event.reason or None)

    def _worker_joined(self, event: WorkerJoined, pos: int, at: At) -> None:
        self._table("worker_joins").append(
            (
                at.seq,
                at.actor,
                self.state.clock_ms,
                event.slots,
                event.ahead,
                event.group or None,
                _text_of(event.labels),
                event.cpu,
                event.memory_mb,
                event.gpus,
                list(event.functions),
                event.host or None,
                event.pid or None,
                event.level,
            )
        )
        self._put("worker_changes", at.seq, pos, "active", None)

    def _lock(self, event: LockAcquired | LockReleased | LockLost, pos: int, at: At) -> None:
        holder = (event.holder or None, at.actor)
        row: Row
        match event:
            case LockAcquired():
                metadata = _text_of(event.metadata)
                row = ("acquired", *holder, event.mode, event.permits, event.ttl_s, metadata, None)
            case LockReleased():
                row = ("released", *holder, None, None, None, None, None)
            case LockLost():
                row = ("lost", *holder, None, None, None, None, event.reason or None)
        self._changed_locks(event.name, event.token, pos, row)

    def _changed_locks(self, name: str, token: int, pos: int, row: Row) -> None:
        """A row for the event itself, and one for each hold that a later holder proves to be over."""
        now_ms, before = self.state.clock_ms, self._holds.pop(name, {})
        holds = self.state.locks.get(name)
        if holds:
            self._holds[name] = dict(holds)
        changes = self._table("lock_changes")
        changes.extend(
            (name, other, pos, now_ms, "lost", hold.holder or None, hold.client, *_LATER, f"{token} holds it")
            for other, hold in before.items()
            if other != token and (not holds or other not in holds)
        )
        changes.append((name, token, pos, now_ms, *row))

    def _table(self, name: str) -> Columns:
        found = self._rows.get(name)
        if found is None:
            found = self._rows[name] = Columns()
        return found


_LATER: Final = (None, None, None, None)
_DETERMINISTIC: Final = msgspec.json.Encoder(order="deterministic")


def _alike(values: list[Any]) -> Any:
    """A column: one value, if all are the same."""
    first = values[0]
    return first if values[-1] == first and values.count(first) == len(values) else values


def _numbers(values: list[int]) -> Any:
    """The same, of numbers."""
    alike = _alike(values)
    return array("q", values) if alike is values else alike


def _text_of(value: Mapping[str, str]) -> str | None:
    return _DETERMINISTIC.encode(value).decode() if value else None


def _sound(judged: Judged, data: bytes) -> str | None:
    """The events as text that any JSON reader reads alike: only if it is not `data` itself."""
    if judged.items and data[:1] == b"[" and Bad not in set(map(type, judged.items)):
        return None
    return encode(_shown(judged.items)).decode()


def _shown(items: Sequence[Event | Bad]) -> list[Any]:
    return [None if type(item) is Bad else item for item in items]


def _runs(work: Any) -> tuple[str, str]:
    """What kind of thing a task runs, and which."""
    if work.function:
        return "function", work.function
    if work.shell:
        return "shell", work.shell.strip()[:RUNS_SHOWN_MAX]
    return "argv", " ".join(map(str, work.argv))[:RUNS_SHOWN_MAX]
