"""History: what became of every task, workflow and worker, kept while the log is folded.

The fold forgets what ends; people do not. A `History` is told of each event by the fold itself,
with the fold's verdict and the steps that tasks took because of it, and writes rows of that. It
decides nothing itself, so it cannot come to another result.

It lives in memory and keeps a row for everything it is told to `keep`: a log of a million
tasks takes about a gigabyte if everything is kept. Who shows the `latest` only keeps these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast

from msgspec import UNSET, Raw, Struct

from agentflow import ids
from agentflow.checks import Bad, priority_of
from agentflow.domain.fold import fold
from agentflow.domain.life import FINAL, State, WorkflowState
from agentflow.domain.state import At, Kind, Namespace, Task, Verdict
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskQuarantined,
    TaskReprioritized,
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
from agentflow.frames import judge
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
_LOOK_AT_MIN: Final = 1_000
TAIL_KEPT_MAX: Final = 4_096
"""Characters kept of a tail of output; the event at the attempt's position has all of it."""

Keep = Callable[[str], bool]
"""Says of the id of a task outside a workflow, or of a workflow, whether rows are kept."""


class Latest(Struct, frozen=True):
    """Which tasks are enough, of those that have ended."""

    states: frozenset[str]
    """Only these; none: all."""
    limit: int
    """The latest so many of them."""


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

    def __init__(
        self,
        namespace: str,
        *,
        keep: Keep | None = None,
        latest: Latest | None = None,
        begun: Namespace | None = None,
    ) -> None:
        """`begun`: the state before the first message, of which it begins with rows, too; changed from then on."""
        self.state: Final = begun or Namespace(namespace)
        self.tasks: Final[dict[str, TaskRow]] = {}
        self.workflows: Final[dict[str, WorkflowRow]] = {}
        self.workers: Final[dict[str, WorkerRow]] = {}
        self.refused: Final[deque[Refused]] = deque(maxlen=REFUSED_MAX)
        self.forgotten = 0
        """Rows not kept because the latest are enough; of those in the states asked for."""
        self._keep = keep
        self._latest = latest
        self._look_at = _LOOK_AT_MIN
        """Rows are looked through for those to forget once there are so many."""
        self._kind = ""
        self._parts: Sequence[tuple[At, WorkflowPart]] = ()
        """Those that came directly before the message."""
        self._steps: list[tuple[Task, State]] = []
        self.state.steps = self._steps
        self._begin()

    def _begin(self) -> None:
        """Rows for what the state knows already."""
        self.workers.update(worker_rows(self.state))
        for row in task_rows(self.state):
            if self._wants(row.workflow or row.id):
                self.tasks[row.id] = row
        self.workflows.update(
            (row.id, row) for row in workflow_rows(self.state, self.tasks) if self._wants(row.id)
        )

    @property
    def now_ms(self) -> int:
        """Log time."""
        return self.state.clock_ms

    def apply(self, message: Message) -> list[Verdict]:
        """Fold one message and bring the rows up to date; the fold's verdicts."""
        judged = judge(message.subject, message.data, message.headers)
        self._kind, self._parts = judged.kind, tuple(self.state.parts)
        verdicts = fold(self.state, message.seq, message.time_ns, judged, self._observe)
        self._take_ended()
        if len(self.tasks) > self._look_at and self._latest is not None:
            self._forget(self._latest)
            self._look_at = max(_LOOK_AT_MIN, 2 * len(self.tasks))
        return verdicts

    def worker_rows(self) -> list[WorkerRow]:
        """The workers in order of joining, with what each holds and has done by now."""
        for row in self.workers.values():
            if row.live is not None:
                row.held = len(row.live.held)
                row.completed, row.failed = row.live.completed, row.live.failed
        return sorted(self.workers.values(), key=lambda row: row.incarnation)

    def _forget(self, latest: Latest) -> None:
        """Forget rows of what has ended but the latest, which are enough."""
        ended = [row for row in self.tasks.values() if row.live is None and self._is_over(row)]
        asked = [row for row in ended if not latest.states or row.state in latest.states]
        kept = {row.id for row in asked[-latest.limit :]}
        self.forgotten += len(asked) - len(kept)
        for row in ended:
            if row.id not in kept:
                del self.tasks[row.id]
                self.workflows.pop(row.workflow, None)

    def _is_over(self, row: TaskRow) -> bool:
        """Whether nobody will look at the task again: its workflow has ended, too."""
        workflow = self.workflows.get(row.workflow)
        return workflow is None or workflow.state is not WorkflowState.RUNNING

    def _wants(self, key: str) -> bool:
        """Whether rows are kept for a task outside a workflow, or a workflow."""
        return self._keep is None or self._keep(key)

    def _observe(self, at: At, event: Event | Bad, verdict: Verdict) -> None:
        if verdict.kind is Kind.APPLIED:
            self._enter(at, cast("Event", event))
        elif verdict.kind in _REFUSED:
            self._refuse(at, verdict)
        self._steps.clear()

    def _refuse(self, at: At, verdict: Verdict) -> None:
        self.refused.append(
            Refused(
                seq=at.seq,
                index=at.index,
                time_ms=self.now_ms,
                verdict=verdict.kind,
                kind=self._kind,
                actor=at.actor,
                reason=str(verdict.reason or ""),
                detail=verdict.detail,
            )
        )

    def _take_ended(self) -> None:
        """The fold's own word on which workflows ended."""
        for ended in self.state.ended:
            row = self.workflows.get(ended.id)
            if row is not None and isinstance(ended.state, WorkflowState):
                row.state, row.ended_ms = ended.state, self.now_ms
        self.state.ended.clear()

    def _enter(self, at: At, event: Event) -> None:
        match event:
            case TaskSubmitted():
                self._task_submitted(at, event)
            case WorkflowSubmitted():
                self._workflow_submitted(at, event)
            case TaskAssigned():
                self._assigned(at, event)
            case TaskStarted() | TaskCompleted() | TaskFailed() | TaskDeclined():
                self._reported(at, event)
            case TaskCancelRequested() | TaskReprioritized() | WorkflowCancelRequested():
                self._asked(event.id)
            case WorkerJoined() | WorkerLeft() | WorkerLost():
                self._worker(at, event)
            case WorkerDraining() | WorkerDrainRequested():
                self._drains(at.actor if isinstance(event, WorkerDraining) else event.worker)
            case _:
                pass
        self._step()
        if isinstance(event, TaskCancelled | TaskQuarantined):
            self._given_up(event)

    # Tasks ---------------------------------------------------------------------------

    def _task_submitted(self, at: At, event: TaskSubmitted) -> None:
        task_id = event.id or ids.derived(at.seq, at.index)
        if self._wants(task_id):
            self.tasks[task_id] = self._new_row(event, task_id, at, at.actor)

    def _workflow_submitted(self, at: At, event: WorkflowSubmitted) -> None:
        workflow_id = event.id or ids.derived(at.seq, at.index)
        if not self._wants(workflow_id):
            return
        parts = self._parts if event.parts else ()
        submitted = [(where, task) for where, part in parts for task in part.tasks]
        submitted += [(at, task) for task in event.tasks]
        rows = {
            task.task_id: self._workflow_task(workflow_id, task, where, at.actor) for where, task in submitted
        }
        self.workflows[workflow_id] = WorkflowRow(
            id=workflow_id,
            name=event.name,
            description=event.description,
            client=at.actor,
            seq=at.seq,
            index=at.index,
            submitted_ms=self.now_ms,
            tasks=rows,
            dependents=dependents_of(rows.values()),
        )

    def _workflow_task(self, workflow_id: str, task: WorkflowTask, where: At, client: str) -> TaskRow:
        row = self._new_row(task, ids.in_workflow(workflow_id, task.task_id), where, client)
        row.workflow = workflow_id
        row.task_id = task.task_id
        row.dependencies = list(dict.fromkeys(task.dependencies))
        self.tasks[row.id] = row
        return row

    def _new_row(self, work: Work, task_id: str, where: At, client: str) -> TaskRow:
        runs_kind, runs = runs_of(work)
        return TaskRow(
            id=task_id,
            task_id=task_id,
            title=work.title,
            runs_kind=runs_kind,
            runs=runs,
            client=client,
            seq=where.seq,
            index=where.index,
            priority=priority_of(work.priority),
            attempts_max=work.retry.max_attempts if work.retry is not None else 1,
            state=State.PENDING,
            submitted_ms=self.now_ms,
            live=self.state.tasks[task_id],
        )

    def _step(self) -> None:
        """Bring the rows of those tasks up to date that came into another state."""
        for task, _ in self._steps:
            row = self.tasks.get(task.id)
            if row is not None:
                self._refresh(row, task)

    def _asked(self, wanted: str) -> None:
        """A client wants something of a task or of the tasks of a workflow, none of which takes a step."""
        workflow = self.workflows.get(wanted)
        rows = [self.tasks.get(wanted)] if workflow is None else workflow.tasks.values()
        for row in rows:
            if row is not None and row.live is not None:
                self._refresh(row, row.live)

    def _refresh(self, row: TaskRow, task: Task) -> None:
        """Copy what the fold knows of the task."""
        row.state = State(task.state)
        row.priority = task.priority
        row.due_ms = task.due_ms if task.state is State.PENDING else 0
        row.error = "" if task.state is State.COMPLETED else task.error
        row.ready_ms = row.ready_ms or task.ready_ms
        row.cancel_requested = task.cancel is not None
        row.cancel_reason = task.cancel or ""
        if task.state in FINAL:
            row.live = None
            row.ended_ms = self.now_ms

    # Attempts ------------------------------------------------------------------------

    def _assigned(self, at: At, event: TaskAssigned) -> None:
        row = self.tasks.get(event.id)
        if row is not None:
            row.attempts.append(Attempt(event.attempt, at.actor, event.incarnation, self.now_ms))

    def _reported(self, at: At, event: TaskStarted | TaskCompleted | TaskFailed | TaskDeclined) -> None:
        row = self.tasks.get(event.id)
        if row is None:
            return
        attempt = row.attempts[-1]
        if isinstance(event, TaskDeclined):
            self._end_attempt(attempt, at, "declined")
            attempt.message = event.reason
            return
        attempt.started_ms = event.started_at_ms or attempt.started_ms
        if isinstance(event, TaskStarted):
            return
        attempt.run_us = event.run_us
        attempt.stdout, attempt.stderr = _tail(event.stdout), _tail(event.stderr)
        if isinstance(event, TaskCompleted):
            self._end_attempt(attempt, at, "completed")
            _keep_result(row, event)
        else:
            self._end_attempt(attempt, at, "stopped" if event.error == "stopped" else "failed")
            attempt.error, attempt.message = event.error, event.message
            attempt.traceback = _tail(event.traceback)

    def _end_attempt(self, attempt: Attempt, at: At, outcome: str) -> None:
        attempt.outcome = outcome
        attempt.ended_ms = self.now_ms
        attempt.seq, attempt.index = at.seq, at.index

    def _given_up(self, event: TaskCancelled | TaskQuarantined) -> None:
        row = self.tasks.get(event.id)
        if row is None:
            return
        if isinstance(event, TaskCancelled):
            row.cancel_reason = event.reason or row.cancel_reason
        elif event.detail:
            row.error = f"{row.error}: {event.detail}"

    # Workers -------------------------------------------------------------------------

    def _worker(self, at: At, event: WorkerJoined | WorkerLeft | WorkerLost) -> None:
        match event:
            case WorkerJoined():
                self._worker_ended(at, at.actor, WorkerState.LOST, "it started anew")
                self._worker_joined(at, event)
            case WorkerLeft():
                self._worker_ended(at, at.actor, WorkerState.LEFT)
            case WorkerLost():
                self._worker_ended(at, event.worker, WorkerState.LOST, event.reason)

    def _worker_joined(self, at: At, event: WorkerJoined) -> None:
        self.workers[at.actor] = WorkerRow(
            name=at.actor,
            incarnation=at.seq,
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
            joined_ms=self.now_ms,
            live=self.state.workers.get(at.actor),
        )

    def _drains(self, name: str) -> None:
        row = self.workers.get(name)
        if row is not None and row.live is not None:
            row.state = WorkerState.DRAINING if row.live.draining else WorkerState.ACTIVE

    def _worker_ended(self, at: At, name: str, state: WorkerState, reason: str = "") -> None:
        """A worker is gone, and with it the attempts of all tasks that take a step because of that."""
        row = self.workers.get(name)
        if row is not None and row.live is not None:
            row.held, row.completed, row.failed = 0, row.live.completed, row.live.failed
            row.state, row.reason, row.live = state, reason, None
            row.ended_ms = self.now_ms
        for task, _ in self._steps:
            lost = self.tasks.get(task.id)
            if lost is not None and lost.attempts and not lost.attempts[-1].outcome:
                self._end_attempt(lost.attempts[-1], at, str(state))


_REFUSED: Final = frozenset({Kind.REJECTED, Kind.QUARANTINED})
_NULL: Final = Raw(b"null")


def _keep_result(row: TaskRow, event: TaskCompleted) -> None:
    row.object = event.object
    if event.object is None:
        value = event.result if event.result is not UNSET else _NULL
        assert isinstance(value, Raw)
        row.result = value.copy() if len(bytes(value)) <= FOLD_BYTES_MAX else None


def _tail(text: str) -> str:
    return text[-TAIL_KEPT_MAX:]


async def read_history(
    past: Past,
    *,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
    keep: Keep | None = None,
    latest: Latest | None = None,
) -> History:
    """Read a past from its beginning to its end, or to `until`. Raises what the past raises."""
    history = History(past.namespace, keep=keep, latest=latest, begun=past.begin())
    await walk(past, history.state, history.apply, until=until, progress=progress)
    return history
