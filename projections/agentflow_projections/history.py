"""History: what became of every task, workflow and worker, kept while the log is folded.

The fold forgets what ends; people do not. `History` folds each message once and writes rows
from what the fold made of it: from its verdicts, and from the states of the fold's own
objects before and after. It decides nothing itself, so it cannot come to another result.

It lives in memory and keeps a row for everything it is told to `keep`: a log of a million
tasks takes about a gigabyte if everything is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast

from msgspec import UNSET, Raw, Struct

from agentflow import ids
from agentflow.checks import priority_of
from agentflow.domain.fold import fold
from agentflow.domain.life import FINAL, State, WorkflowState
from agentflow.domain.state import Ended, Kind, Namespace, Task, Verdict
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskQuarantined,
    TaskStarted,
    TaskSubmitted,
    Work,
    WorkerDraining,
    WorkerDrainRequested,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.frames import Judged, judge
from agentflow.limits import FOLD_BYTES_MAX
from agentflow.log.port import Message
from agentflow_projections.history_begun import task_rows, worker_rows, workflow_rows
from agentflow_projections.history_rows import (
    Attempt,
    TaskRow,
    WorkerRow,
    WorkerState,
    WorkflowRow,
    dependents_of,
    runs_of,
)
from agentflow_projections.past import TO_THE_END, Past, Progress, Until, walk

REFUSED_MAX: Final = 10_000
"""Latest refused events kept; `Namespace.quarantined` and `.rejected` count them all."""
TAIL_KEPT_MAX: Final = 4_096
"""Characters kept of a tail of output; the event at the attempt's position has all of it."""

Keep = Callable[[str], bool]
"""Says of the id of a task outside a workflow, or of a workflow, whether rows are kept."""


class Refused(Struct, frozen=True, kw_only=True):
    """An event that was not accepted."""

    seq: int
    index: int
    """-1: the whole message."""
    time_ms: int
    verdict: Kind
    """rejected (a client's) or quarantined."""
    kind: str
    actor: str
    reason: str
    detail: str


class History:
    """Rows of a namespace, up to date with `state.seq`."""

    def __init__(self, namespace: str, *, keep: Keep | None = None, begun: Namespace | None = None) -> None:
        """`begun`: the state before the first message, of which it begins with rows, too; changed from then on."""
        self.state: Final = begun or Namespace(namespace)
        self.tasks: Final[dict[str, TaskRow]] = {}
        self.workflows: Final[dict[str, WorkflowRow]] = {}
        self.workers: Final[dict[str, WorkerRow]] = {}
        self.refused: Final[deque[Refused]] = deque(maxlen=REFUSED_MAX)
        self._keep = keep
        self._parts = [(at.seq, at.index, part) for at, part in self.state.parts]
        self._begin()

    def _begin(self) -> None:
        """Rows for what the state knows already."""
        self.workers.update(worker_rows(self.state))
        for row in task_rows(self.state):
            if self.wants(row.workflow or row.id):
                self.tasks[row.id] = row
        self.workflows.update(
            (row.id, row) for row in workflow_rows(self.state, self.tasks) if self.wants(row.id)
        )

    @property
    def now_ms(self) -> int:
        """Log time."""
        return self.state.clock_ms

    def apply(self, message: Message, judged: Judged | None = None) -> list[Verdict]:
        """Fold one message and bring the rows up to date; the fold's verdicts."""
        if judged is None:
            judged = judge(message.subject, message.data, message.headers)
        before = self._held_before(judged)
        verdicts = fold(self.state, message.seq, message.time_ns, judged)
        if not verdicts:
            return verdicts
        if judged.whole is not None:
            self._refuse(message, judged, -1, verdicts[0])
        for index, (item, verdict) in enumerate(zip(judged.items, verdicts, strict=False)):
            if verdict.kind is Kind.APPLIED:
                _Step(self, message.seq, index, judged.actor).enter(cast("Event", item), before)
            elif verdict.kind in _REFUSED:
                self._refuse(message, judged, index, verdict)
        self._follow_parts(message.seq, judged, verdicts)
        self._take_ended()
        return verdicts

    def _held_before(self, judged: Judged) -> dict[str, list[str]]:
        """What workers hold of whom the message says that they are gone, or new."""
        if judged.kind not in _WORKER_ENDS:
            return {}
        names = {judged.actor} | {item.worker for item in judged.items if type(item) is WorkerLost}
        workers = (self.state.workers.get(name) for name in names)
        return {worker.name: list(worker.held) for worker in workers if worker is not None}

    def _refuse(self, message: Message, judged: Judged, index: int, verdict: Verdict) -> None:
        self.refused.append(
            Refused(
                seq=message.seq,
                index=index,
                time_ms=self.now_ms,
                verdict=verdict.kind,
                kind=judged.kind,
                actor=judged.actor,
                reason=str(verdict.reason or ""),
                detail=verdict.detail,
            )
        )

    def _follow_parts(self, seq: int, judged: Judged, verdicts: Sequence[Verdict]) -> None:
        """Keep the parts of a workflow as long as the fold does."""
        if not self.state.parts:
            self._parts.clear()
            return
        for index, (item, verdict) in enumerate(zip(judged.items, verdicts, strict=False)):
            if type(item) is WorkflowPart and verdict.kind is Kind.APPLIED:
                self._parts.append((seq, index, item))
        del self._parts[: -len(self.state.parts)]

    def _take_ended(self) -> None:
        """The fold's own word on which workflows ended."""
        for ended in self.state.ended:
            row = self.workflows.get(ended.id)
            if row is not None and isinstance(ended.state, WorkflowState):
                _end_workflow(row, ended, self.now_ms)
        self.state.ended.clear()

    def worker_rows(self) -> list[WorkerRow]:
        """The workers in order of joining, with what each holds and has done by now."""
        for row in self.workers.values():
            if row.live is not None:
                row.held = len(row.live.held)
                row.completed, row.failed = row.live.completed, row.live.failed
        return sorted(self.workers.values(), key=lambda row: row.incarnation)

    def wants(self, key: str) -> bool:
        """Whether rows are kept for a task outside a workflow, or a workflow."""
        return self._keep is None or self._keep(key)

    def take_parts(self) -> list[tuple[int, int, WorkflowPart]]:
        """The parts that belong to the workflow just submitted."""
        parts, self._parts = self._parts, []
        return parts


_REFUSED: Final = frozenset({Kind.REJECTED, Kind.QUARANTINED})
_WORKER_ENDS: Final = frozenset({WorkerJoined.kind, WorkerLeft.kind, WorkerLost.kind})


def _end_workflow(row: WorkflowRow, ended: Ended, now_ms: int) -> None:
    assert isinstance(ended.state, WorkflowState)
    row.state = ended.state
    row.ended_ms = now_ms


class _Step:
    """One applied event on its way into the rows."""

    __slots__ = ("actor", "history", "index", "seq", "state")

    def __init__(self, history: History, seq: int, index: int, actor: str) -> None:
        self.history = history
        self.state = history.state
        self.seq = seq
        self.index = index
        self.actor = actor

    def enter(self, event: Event, before: dict[str, list[str]]) -> None:
        match event:
            case TaskSubmitted():
                self._task_submitted(event)
            case WorkflowSubmitted():
                self._workflow_submitted(event)
            case TaskAssigned():
                self._assigned(event)
            case TaskStarted() | TaskCompleted() | TaskFailed() | TaskDeclined():
                self._reported(event)
            case TaskCancelRequested() | WorkflowCancelRequested():
                self._cancel_requested(event)
            case WorkerJoined() | WorkerDraining() | WorkerLeft() | WorkerLost():
                self._worker(event, before)
            case WorkerDrainRequested():
                self._refresh_worker(event.worker)
            case TaskCancelled() | TaskQuarantined():
                self._given_up(event)
            case _:
                self._touch(getattr(event, "id", ""))

    # Tasks ---------------------------------------------------------------------------

    def _task_submitted(self, event: TaskSubmitted) -> None:
        task_id = event.id or ids.derived(self.seq, self.index)
        if self.history.wants(task_id):
            row = self._new_row(event, task_id, (self.seq, self.index))
            self.history.tasks[task_id] = row
            self._refresh(row)

    def _workflow_submitted(self, event: WorkflowSubmitted) -> None:
        workflow_id = event.id or ids.derived(self.seq, self.index)
        parts = self.history.take_parts()
        if not self.history.wants(workflow_id):
            return
        submitted = [((seq, index), task) for seq, index, part in parts for task in part.tasks]
        submitted += [((self.seq, self.index), task) for task in event.tasks]
        rows = {task.task_id: self._workflow_task(workflow_id, task, where) for where, task in submitted}
        self.history.workflows[workflow_id] = WorkflowRow(
            id=workflow_id,
            name=event.name,
            description=event.description,
            client=self.actor,
            seq=self.seq,
            index=self.index,
            submitted_ms=self.history.now_ms,
            tasks=rows,
            dependents=dependents_of(rows.values()),
        )

    def _workflow_task(self, workflow_id: str, task: WorkflowTask, where: tuple[int, int]) -> TaskRow:
        row = self._new_row(task, ids.in_workflow(workflow_id, task.task_id), where)
        row.workflow = workflow_id
        row.task_id = task.task_id
        row.dependencies = list(dict.fromkeys(task.dependencies))
        self.history.tasks[row.id] = row
        self._refresh(row)
        return row

    def _new_row(self, work: Work, task_id: str, where: tuple[int, int]) -> TaskRow:
        runs_kind, runs = runs_of(work)
        return TaskRow(
            id=task_id,
            task_id=task_id,
            title=work.title,
            runs_kind=runs_kind,
            runs=runs,
            client=self.actor,
            seq=where[0],
            index=where[1],
            priority=priority_of(work.priority),
            attempts_max=work.retry.max_attempts if work.retry is not None else 1,
            state=State.PENDING,
            submitted_ms=self.history.now_ms,
            live=self.state.tasks.get(task_id),
        )

    def _touch(self, task_id: str) -> TaskRow | None:
        row = self.history.tasks.get(task_id)
        if row is not None:
            self._refresh(row)
        return row

    def _refresh(self, row: TaskRow) -> None:
        """Copy what the fold knows of the task; if it ended, what depends on it changed too."""
        live = row.live
        if live is None:
            return
        row.state = State(live.state)
        row.priority = live.priority
        row.due_ms = live.due_ms if live.state is State.PENDING else 0
        row.error = live.error
        row.ready_ms = row.ready_ms or live.ready_ms
        row.cancel_requested = live.cancel is not None
        row.cancel_reason = live.cancel or ""
        if row.state in FINAL:
            row.live = None
            row.ended_ms = self.history.now_ms
            row.error = "" if row.state is State.COMPLETED else row.error
            self._refresh_dependents(row)

    def _refresh_dependents(self, row: TaskRow) -> None:
        workflow = self.history.workflows.get(row.workflow)
        if workflow is None:
            return
        waiting = list(workflow.dependents.get(row.task_id, ()))
        while waiting:
            dependent = workflow.tasks[waiting.pop()]
            live = dependent.live
            if live is None or live.state is dependent.state:
                continue
            if live.state is State.SKIPPED:
                waiting += workflow.dependents.get(dependent.task_id, ())
            self._copy_follower(dependent, live)

    def _copy_follower(self, row: TaskRow, live: Task) -> None:
        """A dependent that became ready, or was skipped."""
        row.state = State(live.state)
        row.error = live.error
        row.ready_ms = row.ready_ms or live.ready_ms
        if row.state in FINAL:
            row.live = None
            row.ended_ms = self.history.now_ms

    # Attempts ------------------------------------------------------------------------

    def _assigned(self, event: TaskAssigned) -> None:
        row = self._touch(event.id)
        if row is not None:
            row.attempts.append(Attempt(event.attempt, self.actor, event.incarnation, self.history.now_ms))

    def _reported(self, event: TaskStarted | TaskCompleted | TaskFailed | TaskDeclined) -> None:
        row = self.history.tasks.get(event.id)
        if row is None:
            return
        attempt = row.attempts[-1]
        if not isinstance(event, TaskDeclined):
            attempt.started_ms = event.started_at_ms or attempt.started_ms
        if isinstance(event, TaskCompleted):
            self._completed(row, attempt, event)
        elif isinstance(event, TaskFailed):
            self._failed(attempt, event)
        elif isinstance(event, TaskDeclined):
            self._end_attempt(attempt, "declined")
            attempt.message = event.reason
        self._refresh(row)

    def _end_attempt(self, attempt: Attempt, outcome: str) -> None:
        attempt.outcome = outcome
        attempt.ended_ms = self.history.now_ms
        attempt.seq, attempt.index = self.seq, self.index

    def _completed(self, row: TaskRow, attempt: Attempt, event: TaskCompleted) -> None:
        self._end_attempt(attempt, "completed")
        attempt.run_us = event.run_us
        attempt.stdout, attempt.stderr = _tail(event.stdout), _tail(event.stderr)
        row.object = event.object
        if event.object is None:
            value = event.result if event.result is not UNSET else _NULL
            assert isinstance(value, Raw)
            row.result = value.copy() if len(bytes(value)) <= FOLD_BYTES_MAX else None

    def _failed(self, attempt: Attempt, event: TaskFailed) -> None:
        self._end_attempt(attempt, "stopped" if event.error == "stopped" else "failed")
        attempt.run_us = event.run_us
        attempt.error, attempt.message = event.error, event.message
        attempt.traceback = _tail(event.traceback)
        attempt.stdout, attempt.stderr = _tail(event.stdout), _tail(event.stderr)

    def _cancel_requested(self, event: TaskCancelRequested | WorkflowCancelRequested) -> None:
        workflow = self.history.workflows.get(event.id)
        rows = [row.id for row in workflow.tasks.values()] if workflow is not None else [event.id]
        for each in rows:
            self._touch(each)

    def _given_up(self, event: TaskCancelled | TaskQuarantined) -> None:
        row = self._touch(event.id)
        if row is None:
            return
        if isinstance(event, TaskCancelled):
            row.cancel_reason = event.reason or row.cancel_reason
        elif event.detail:
            row.error = f"{row.error}: {event.detail}"

    # Workers -------------------------------------------------------------------------

    def _worker(
        self, event: WorkerJoined | WorkerDraining | WorkerLeft | WorkerLost, before: dict[str, list[str]]
    ) -> None:
        match event:
            case WorkerJoined():
                self._worker_ended(self.actor, WorkerState.LOST, "it started anew", before)
                self._worker_joined(event)
            case WorkerDraining():
                self._refresh_worker(self.actor)
            case WorkerLeft():
                self._worker_ended(self.actor, WorkerState.LEFT, "", before)
            case WorkerLost():
                self._worker_ended(event.worker, WorkerState.LOST, event.reason, before)

    def _worker_joined(self, event: WorkerJoined) -> None:
        self.history.workers[self.actor] = WorkerRow(
            name=self.actor,
            incarnation=self.seq,
            slots=event.slots,
            group=event.group,
            labels=dict(event.labels),
            cpu=event.cpu,
            memory_mb=event.memory_mb,
            gpus=event.gpus,
            functions=list(event.functions),
            host=event.host,
            pid=event.pid,
            level=event.level,
            joined_ms=self.history.now_ms,
            live=self.state.workers.get(self.actor),
        )

    def _refresh_worker(self, name: str) -> None:
        row = self.history.workers.get(name)
        if row is not None and row.live is not None:
            row.state = WorkerState.DRAINING if row.live.draining else WorkerState.ACTIVE

    def _worker_ended(self, name: str, state: WorkerState, reason: str, before: dict[str, list[str]]) -> None:
        row = self.history.workers.get(name)
        if row is not None and row.live is not None:
            row.held, row.completed, row.failed = 0, row.live.completed, row.live.failed
            row.state, row.reason, row.live = state, reason, None
            row.ended_ms = self.history.now_ms
        for task_id in before.pop(name, ()):
            task = self._touch(task_id)
            if task is not None and task.attempts and not task.attempts[-1].outcome:
                self._end_attempt(task.attempts[-1], str(state))


_NULL: Final = Raw(b"null")


def _tail(text: str) -> str:
    return text[-TAIL_KEPT_MAX:]


async def read_history(
    past: Past, *, until: Until = TO_THE_END, progress: Progress | None = None, keep: Keep | None = None
) -> History:
    """Read a past from its beginning to its end, or to `until`. Raises what the past raises."""
    history = History(past.namespace, keep=keep, begun=past.begin())
    await walk(past, history.state, history.apply, until=until, progress=progress)
    return history
