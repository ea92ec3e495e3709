"""The fold: what each event makes of the state.

`evolve` is total and deterministic and never raises on history: what makes no sense is
answered with a verdict and changes nothing. Everything else in the project that knows the
state of a task knows it from here.

Only a leader whose epoch is the highest so far decides; only the incarnation that holds
the current attempt reports its outcome. Both are checked here although the log itself
refuses a deposed leader's writes: twice is not too often.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Final, assert_never

from msgspec import UNSET, Raw

from agentflow import ids, wire
from agentflow.checks import Bad, priority_of
from agentflow.domain import policies, workflows
from agentflow.domain.life import FINAL, State, WorkflowState
from agentflow.domain.state import (
    APPLIED,
    DUPLICATE,
    SUPERSEDED,
    At,
    Closed,
    Ended,
    Kind,
    Namespace,
    Node,
    Result,
    Task,
    Timer,
    Verdict,
    Worker,
)
from agentflow.domain.tasks import digest_of_workflow, new_task, release_terms
from agentflow.events import (
    Event,
    EventRejected,
    LeaderElected,
    PolicyChanged,
    Reason,
    Role,
    TaskAssigned,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskQuarantined,
    TaskReprioritized,
    TaskRetried,
    TaskStarted,
    TaskStop,
    TaskSubmitted,
    TaskTimedOut,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowCancelRequested,
    WorkflowCompleted,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.frames import Judged
from agentflow.limits import (
    ANSWERS_MAX,
    EARLY_IDS_MAX,
    FOLD_BYTES_MAX,
    ID_AHEAD_MS_MAX,
    OPEN_TASKS_MAX,
    WORKFLOW_TASKS_MAX,
)

EXPECTATIONS_MAX: Final = 10_000
"""Functions and scripts whose run time is remembered."""

TIMERS_MIN: Final = 1_024
"""Timers below this number are not worth cleaning up."""


def fold(state: Namespace, seq: int, time_ns: int, judged: Judged) -> list[Verdict]:
    """Fold one message; the verdict on each of its events, or on the message as a whole.

    A message at or before the last one folded changes nothing.
    """
    if seq <= state.seq:
        return []
    server_ms = time_ns // 1_000_000
    _advance_clock(state, server_ms)
    state.seq = seq
    if state.parts and (judged.kind not in _PARTS or seq != state.parts_seq + 1):
        state.parts.clear()
    at = At(seq, 0, server_ms, judged.actor)
    if judged.whole is not None:
        at.index = -1
        return [_refuse(state, judged.role, judged.whole, at)]
    if judged.decision is not None:
        at.epoch = judged.decision.epoch
    verdicts: list[Verdict] = []
    for index, item in enumerate(judged.items):
        at.index = index
        if type(item) is Bad:
            verdicts.append(_refuse(state, judged.role, item, at))
            continue
        verdict = evolve(state, item, at)  # type: ignore[arg-type] # mypy does not narrow by `type(...) is`
        if verdict is not APPLIED:
            verdict = _not_applied(state, verdict, item, at)
        verdicts.append(verdict)
    return verdicts


def _advance_clock(state: Namespace, server_ms: int) -> None:
    if not state.seq:
        state.clock_ms = server_ms
    elif server_ms > state.server_ms:
        state.clock_ms += server_ms - state.server_ms
    state.server_ms = server_ms
    state.latest_ms = max(state.latest_ms, server_ms)


_PARTS: Final = frozenset({WorkflowPart.kind, WorkflowSubmitted.kind})


def _refuse(state: Namespace, role: Role | None, bad: Bad, at: At) -> Verdict:
    if role is Role.CLIENT:
        return _answered(state, _rejected(bad.reason, bad.detail), bad.id, at)
    state.quarantined += 1
    return Verdict(Kind.QUARANTINED, bad.reason, bad.detail)


def _not_applied(state: Namespace, verdict: Verdict, event: Any, at: At) -> Verdict:
    """Count it, answer it, and tell a client that waits."""
    if verdict.kind in _TOLD and isinstance(event, TaskSubmitted | WorkflowSubmitted) and event.notify:
        why = (str(verdict.reason), verdict.detail)
        state.ended.append(Ended(event.id, verdict.kind, at.actor, event.notify, at.seq, at.index, why))
    if verdict.kind is Kind.REJECTED:
        given_id = event.workflow if isinstance(event, WorkflowPart) else event.id
        return _answered(state, verdict, given_id, at)
    if verdict.kind is Kind.QUARANTINED:
        state.quarantined += 1
    elif verdict.kind is Kind.SUPERSEDED:
        state.superseded += 1
    return verdict


_TOLD: Final = frozenset({Kind.REJECTED, Kind.DUPLICATE})
"""Verdicts on a submission of which its client is told."""


def _answered(state: Namespace, verdict: Verdict, given_id: str, at: At) -> Verdict:
    """The rejection, to be answered; a quarantine if too many wait for their answer already."""
    if len(state.answers) >= ANSWERS_MAX:
        state.quarantined += 1
        return Verdict(Kind.QUARANTINED, verdict.reason, verdict.detail)
    state.rejected += 1
    state.answers[at.seq, at.index] = EventRejected(
        seq=at.seq,
        index=at.index,
        client=at.actor,
        reason=str(verdict.reason),
        detail=verdict.detail,
        id=given_id,
    )
    return verdict


def evolve(state: Namespace, event: Event, at: At) -> Verdict:  # noqa: C901, PLR0911, PLR0912 - it only routes
    """What one event, at one position, makes of the state."""
    match event:
        case TaskSubmitted():
            return _task_submitted(state, event, at)
        case TaskAssigned():
            return _decided(state, event, at)
        case TaskCompleted():
            return _task_completed(state, event, at)
        case TaskStarted():
            return _task_started(state, event, at)
        case TaskFailed():
            return _task_failed(state, event, at)
        case TaskDeclined():
            return _task_declined(state, event, at)
        case WorkerJoined():
            return _worker_joined(state, event, at)
        case WorkerDraining():
            return _worker_draining(state, event, at)
        case WorkerLeft():
            return _worker_left(state, event, at)
        case WorkflowSubmitted():
            return _workflow_submitted(state, event, at)
        case WorkflowPart():
            return _workflow_part(state, event, at)
        case TaskCancelRequested():
            return _cancel_requested(state, event, at)
        case WorkflowCancelRequested():
            return _workflow_cancel_requested(state, event, at)
        case TaskReprioritized():
            return _reprioritized(state, event, at)
        case LeaderElected():
            return _leader_elected(state, event, at)
        case _:
            return _decided(state, event, at)


def _decided(state: Namespace, event: Any, at: At) -> Verdict:  # noqa: C901, PLR0911 - it only routes
    if at.epoch != state.epoch:
        return Verdict(Kind.SUPERSEDED, Reason.UNFENCED, f"epoch {at.epoch} decided while {state.epoch} led")
    match event:
        case TaskAssigned():
            return _task_assigned(state, event, at)
        case TaskStop():
            return _task_stop(state, event)
        case TaskRetried():
            return _task_retried(state, event)
        case TaskTimedOut():
            return _task_timed_out(state, event, at)
        case TaskCancelled():
            return _task_cancelled(state, event, at)
        case TaskQuarantined():
            return _task_quarantined(state, event, at)
        case WorkerLost():
            return _worker_lost(state, event)
        case PolicyChanged():
            state.policy = event.policy
            return APPLIED
        case EventRejected():
            return APPLIED if state.answers.pop((event.seq, event.index), None) else SUPERSEDED
        case WorkflowCompleted():
            return APPLIED if state.announcements.pop(event.id, None) else SUPERSEDED
        case _ as never:
            assert_never(never)


# What clients ask for ----------------------------------------------------------------


def _rejected(reason: Reason, detail: str) -> Verdict:
    return Verdict(Kind.REJECTED, reason, detail)


def _task_submitted(state: Namespace, event: TaskSubmitted, at: At) -> Verdict:
    task_id = event.id or ids.derived(at.seq, at.index)
    task = new_task(state, event, task_id, at, notify=event.notify)
    if event.id:
        verdict = _known(state, task_id, task.digest)
        if verdict is not None:
            release_terms(state, task.terms)
            return verdict
    verdict = _overloaded(state, 1)
    if verdict is not None:
        release_terms(state, task.terms)
        return verdict
    state.tasks[task_id] = task
    _ready(state, task)
    return APPLIED


def _overloaded(state: Namespace, more: int) -> Verdict | None:
    if len(state.tasks) + more > OPEN_TASKS_MAX:
        return _rejected(Reason.OVERLOADED, f"{len(state.tasks)} tasks are open; at most {OPEN_TASKS_MAX}")
    if not state.policy.accepting:
        return _rejected(Reason.OVERLOADED, "the log is nearly full")
    return None


def _known(state: Namespace, new_id: str, digest: int) -> Verdict | None:
    """What to say of an id that was used before, or cannot be judged any more."""
    known = state.tasks.get(new_id) or state.workflows.get(new_id) or state.closed.get(new_id)
    if known is not None:
        if known.digest == digest:
            return DUPLICATE
        return _rejected(Reason.CONFLICT, f"{new_id} was submitted before with another body")
    # Compared as text first, since most are neither old nor ahead: that spares reading their time.
    if state.closed.oldest < new_id < state.newest:
        return None
    return _out_of_time(state, new_id)


def _out_of_time(state: Namespace, new_id: str) -> Verdict | None:
    made_ms = ids.uuid7_time_ms(new_id)
    if made_ms is None:
        return None
    if made_ms < state.closed.horizon_ms:
        return _rejected(
            Reason.TOO_OLD, f"{new_id} is older than the ids remembered: was it accepted before?"
        )
    if made_ms <= state.latest_ms:
        state.newest = ids.uuid7_prefix(state.latest_ms + 1)
        return None
    if made_ms > state.latest_ms + ID_AHEAD_MS_MAX or len(state.closed.early) >= EARLY_IDS_MAX:
        return _rejected(Reason.FROM_THE_FUTURE, f"{new_id} is from the future: is the client's clock right?")
    state.closed.ahead_ms = max(state.closed.ahead_ms, made_ms)
    return None


def _workflow_part(state: Namespace, event: WorkflowPart, at: At) -> Verdict:
    if event.part != len(state.parts) or not _come_with(state, event.workflow, at):
        state.parts.clear()
        return _rejected(
            Reason.BAD_VALUE, f"part {event.part} of {event.workflow} does not follow the part before it"
        )
    count = sum(len(part.tasks) for _, part in state.parts) + len(event.tasks)
    if count > WORKFLOW_TASKS_MAX:
        state.parts.clear()
        return _rejected(Reason.TOO_LARGE, f"{count} tasks; a workflow has at most {WORKFLOW_TASKS_MAX}")
    state.parts.append((_copy(at), event))
    state.parts_seq = at.seq
    return APPLIED


def _come_with(state: Namespace, workflow_id: str, at: At) -> bool:
    """Whether the parts directly before, if any, are of that workflow and said by the same actor."""
    return all(part.workflow == workflow_id and where.actor == at.actor for where, part in state.parts[:1])


def _copy(at: At) -> At:
    return At(at.seq, at.index, at.server_ms, at.actor)


def _workflow_submitted(state: Namespace, event: WorkflowSubmitted, at: At) -> Verdict:
    belong = _come_with(state, event.id, at)
    parts, state.parts = state.parts, []
    if event.parts != len(parts) or not belong:
        return _rejected(
            Reason.BAD_VALUE, f"{event.parts} parts announced, {len(parts)} came directly before"
        )
    submitted = [(where, task) for where, part in parts for task in part.tasks]
    submitted += [(at, task) for task in event.tasks]
    tasks = [task for _, task in submitted]
    workflow_id = event.id or ids.derived(at.seq, at.index)
    fault = workflows.fault(tasks)
    if fault is not None:
        return _rejected(*fault)
    digest = digest_of_workflow(event, tasks)
    verdict = (_known(state, workflow_id, digest) if event.id else None) or _overloaded(state, len(tasks))
    if verdict is not None:
        return verdict
    workflow = workflows.build(state, event, workflow_id, submitted, digest, at)
    state.workflows[workflow_id] = workflow
    for task in workflow.tasks.values():
        state.tasks[task.id] = task
        if not _node(task).waiting:
            _ready(state, task)
    return APPLIED


def _cancel_requested(state: Namespace, event: TaskCancelRequested, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state in FINAL:
        return _not_open(state, event.id)
    if task.cancel is not None:
        return DUPLICATE
    _request_cancel(state, task, event.reason or f"requested by {at.actor}")
    return APPLIED


def _request_cancel(state: Namespace, task: Task, reason: str) -> None:
    """From here on it waits for nothing but the leader's confirmation."""
    task.cancel = reason
    state.cancels[task.id] = task
    _leave_queue(state, task)


def _workflow_cancel_requested(state: Namespace, event: WorkflowCancelRequested, at: At) -> Verdict:
    workflow = state.workflows.get(event.id)
    if workflow is None:
        return _not_open(state, event.id)
    wanted = [task for task in workflow.tasks.values() if task.state not in FINAL and task.cancel is None]
    for task in wanted:
        _request_cancel(state, task, event.reason or f"requested by {at.actor}")
    return APPLIED if wanted else DUPLICATE


def _not_open(state: Namespace, wanted: str) -> Verdict:
    known = state.tasks.get(wanted) or state.closed.get(wanted)
    if known is not None and known.state in _ENDED:
        return _rejected(Reason.CLOSED, f"{wanted} is {known.state} already")
    if known is not None or wanted in state.workflows:
        what, other = ("task", "workflow") if known is not None else ("workflow", "task")
        return _rejected(Reason.UNKNOWN_ID, f"{wanted} is a {what}, no {other}")
    return _rejected(Reason.UNKNOWN_ID, f"no open task or workflow is called {wanted}")


_ENDED: Final = FINAL.union({WorkflowState.COMPLETED, WorkflowState.FAILED, WorkflowState.CANCELLED})


def _reprioritized(state: Namespace, event: TaskReprioritized, _at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state in FINAL:
        return _not_open(state, event.id)
    if task.state is State.RUNNING:
        return _rejected(
            Reason.CLOSED, f"{event.id} is {task.state}: only a waiting task can be reprioritized"
        )
    priority = priority_of(event.priority)
    if priority == task.priority:
        return DUPLICATE
    queued = task.ticket != 0
    if queued:
        state.queue.remove(task)
    task.priority = priority
    if queued:
        state.queue.push(task)
    return APPLIED


# What the leader decides -------------------------------------------------------------


def _leader_elected(state: Namespace, event: LeaderElected, at: At) -> Verdict:
    if at.actor != wire.ELECTED_ACTOR or event.epoch != state.epoch + 1:
        return Verdict(
            Kind.QUARANTINED, Reason.CONFLICT, f"epoch {event.epoch} does not follow {state.epoch}"
        )
    state.epoch = event.epoch
    state.leader = event.master
    state.elected_seq = at.seq
    return APPLIED


def _task_assigned(state: Namespace, event: TaskAssigned, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    worker = state.workers.get(at.actor)
    if task is None or task.state is not State.READY or event.attempt != task.attempt + 1:
        return SUPERSEDED
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    if task.ticket:
        state.queue.remove(task)
    task.state = State.RUNNING
    task.attempt = event.attempt
    task.worker = worker
    task.started = task.stopping = False
    task.quick_us = quick_us = state.quick_us(task)
    worker.quick_us += quick_us
    worker.slow += not quick_us
    worker.held[task.id] = task
    worker.assigned_seq = at.seq
    worker.suspects += task.suspect
    state.last_worker = worker.name
    state.running += 1
    demand = task.terms.demand
    if not demand.plain:
        worker.used_cpu += demand.cpu
        worker.used_memory_mb += demand.memory_mb
        worker.used_gpus += demand.gpus
    return APPLIED


def _task_stop(state: Namespace, event: TaskStop) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.RUNNING or task.attempt != event.attempt:
        return SUPERSEDED
    task.stopping = True
    state.cancels.pop(task.id, None)
    return APPLIED


def _task_retried(state: Namespace, event: TaskRetried) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.PENDING or not task.due_ms or task.attempt != event.attempt:
        return SUPERSEDED
    task.due_ms = 0
    _ready(state, task)
    return APPLIED


def _task_timed_out(state: Namespace, event: TaskTimedOut, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.READY:
        return SUPERSEDED
    _leave_queue(state, task)
    task.error = "queue_timeout"
    _end(state, task, State.FAILED, at, event)
    return APPLIED


def _task_cancelled(state: Namespace, event: TaskCancelled, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state not in _CANCELLABLE:
        return SUPERSEDED
    _leave_queue(state, task)
    _end(state, task, State.CANCELLED, at, event)
    return APPLIED


_CANCELLABLE: Final = frozenset({State.PENDING, State.READY})


def _task_quarantined(state: Namespace, event: TaskQuarantined, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.READY:
        return SUPERSEDED
    _leave_queue(state, task)
    task.error = f"quarantined: {event.reason}"
    _end(state, task, State.FAILED, at, event)
    return APPLIED


def _worker_lost(state: Namespace, event: WorkerLost) -> Verdict:
    worker = state.workers.get(event.worker)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    _lose(state, worker)
    return APPLIED


# What workers say --------------------------------------------------------------------


def _worker_joined(state: Namespace, event: WorkerJoined, at: At) -> Verdict:
    before = state.workers.get(at.actor)
    if before is not None:
        _lose(state, before)
    state.workers[at.actor] = Worker(
        name=at.actor,
        incarnation=at.seq,
        slots=event.slots,
        ahead=event.ahead,
        group=event.group,
        labels=event.labels,
        cpu=event.cpu,
        memory_mb=event.memory_mb,
        gpus=event.gpus,
        functions=frozenset(event.functions),
        host=event.host,
        joined_ms=state.clock_ms,
    )
    state.workers_version += 1
    return APPLIED


def _worker_draining(state: Namespace, event: WorkerDraining, at: At) -> Verdict:
    worker = state.workers.get(at.actor)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    worker.draining = True
    state.workers_version += 1
    return APPLIED


def _worker_left(state: Namespace, event: WorkerLeft, at: At) -> Verdict:
    worker = state.workers.get(at.actor)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    _dismiss(state, worker)
    for task in _held_backwards(worker):
        _unassign(state, task)
        _requeue(state, task)
    return APPLIED


def _lose(state: Namespace, worker: Worker) -> None:
    """The worker is dead: what it had certainly begun cost it a life, the rest is suspect."""
    _dismiss(state, worker)
    for task in _held_backwards(worker):
        _unassign(state, task)
        if task.started:
            task.losses += 1
            state.struck[task.id] = task
        task.suspect = True
        _requeue(state, task)


def _dismiss(state: Namespace, worker: Worker) -> None:
    del state.workers[worker.name]
    state.workers_version += 1


def _held_backwards(worker: Worker) -> Sequence[Task]:
    """So that putting each in front of the queue keeps their order."""
    return list(reversed(worker.held.values()))


def _held(state: Namespace, event: Any, at: At) -> Task | Verdict:
    """The task whose current attempt the worker speaks of, or why its word does not count."""
    task = state.tasks.get(event.id)
    if task is None:
        if state.closed.get(event.id) is not None:
            return SUPERSEDED
        return Verdict(Kind.QUARANTINED, Reason.UNKNOWN_ID, f"no task is called {event.id[:200]}")
    worker = task.worker
    if (
        worker is None
        or task.attempt != event.attempt
        or worker.incarnation != event.incarnation
        or worker.name != at.actor
    ):
        return SUPERSEDED
    return task


def _task_started(state: Namespace, event: TaskStarted, at: At) -> Verdict:
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    task.started = True
    return APPLIED


def _task_completed(state: Namespace, event: TaskCompleted, at: At) -> Verdict:
    task = _held(state, event, at)
    if type(task) is Verdict:
        return task
    assert type(task) is Task
    worker = task.worker
    assert worker is not None
    worker.completed += 1
    _unassign(state, task)
    _learn(state, task.terms.run_key, event.run_us)
    if task.node is not None:
        task.node.result = _result(event, at)
    _end(state, task, State.COMPLETED, at, event)
    return APPLIED


def _result(event: TaskCompleted, at: At) -> Result:
    value = b"" if event.object is not None else b"null" if event.result is UNSET else _bytes(event.result)
    return Result(at.seq, at.index, value if len(value) <= FOLD_BYTES_MAX else b"")


def _bytes(raw: Any) -> bytes:
    assert isinstance(raw, Raw)
    return bytes(raw)


def _task_failed(state: Namespace, event: TaskFailed, at: At) -> Verdict:
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    assert task.worker is not None
    task.worker.failed += 1
    _unassign(state, task)
    task.suspect = False
    if event.error == "stopped":
        _requeue(state, task)
        return APPLIED
    task.failures += 1
    task.error = f"{event.error}: {event.message}"[:FOLD_BYTES_MAX]
    spent = task.failures + task.losses
    if task.cancel is None and policies.retries(
        task.terms.retry, spent, event.error, retryable=event.retryable
    ):
        _back_off(state, task)
    else:
        _end(state, task, State.FAILED, at, event)
    return APPLIED


def _back_off(state: Namespace, task: Task) -> None:
    task.state = State.PENDING
    task.due_ms = max(1, state.clock_ms + policies.backoff_ms(task.terms.retry, task.failures, task.id))
    _set_timer(state, state.backoffs, task.due_ms, task)


def _task_declined(state: Namespace, event: TaskDeclined, at: At) -> Verdict:
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    _unassign(state, task)
    task.declined = {
        incarnation: until for incarnation, until in (task.declined or {}).items() if until > state.clock_ms
    }
    task.declined[event.incarnation] = state.clock_ms + state.policy.decline_ms
    _requeue(state, task)
    return APPLIED


# Steps -------------------------------------------------------------------------------


def _node(task: Task) -> Node:
    assert task.node is not None
    return task.node


def _ready(state: Namespace, task: Task) -> None:
    task.state = State.READY
    task.ready_ms = state.clock_ms
    if task.cancel is None:
        state.queue.push(task)
        _set_deadline(state, task)


def _requeue(state: Namespace, task: Task) -> None:
    """Back to the front of its lane: it has waited before."""
    task.state = State.READY
    if task.cancel is None:
        state.queue.push(task, front=True)
        _set_deadline(state, task)
    else:
        state.cancels[task.id] = task


def _leave_queue(state: Namespace, task: Task) -> None:
    if task.ticket:
        state.queue.remove(task)


def _set_deadline(state: Namespace, task: Task) -> None:
    wait_ms = task.terms.queue_timeout_ms
    if wait_ms and task.awaits_first_start:
        _set_timer(state, state.deadlines, task.ready_ms + wait_ms, task)


def _set_timer(state: Namespace, timers: list[Timer], due_ms: int, task: Task) -> None:
    """Timers of tasks that ended stay until they are due, unless they become the most."""
    if not task.order:
        state.order += 1
        task.order = state.order
    heapq.heappush(timers, (due_ms, task.order, task))
    if len(timers) > TIMERS_MIN and len(timers) > 2 * len(state.tasks):
        timers[:] = [timer for timer in timers if timer[2].state not in FINAL]
        heapq.heapify(timers)


def _unassign(state: Namespace, task: Task) -> None:
    worker = task.worker
    assert worker is not None
    task.worker = None
    state.running -= 1
    del worker.held[task.id]
    worker.quick_us -= task.quick_us
    worker.slow -= not task.quick_us
    worker.suspects -= task.suspect
    demand = task.terms.demand
    if not demand.plain:
        # Fractions do not add up exactly: what is left over must not pile up.
        worker.used_cpu = worker.used_cpu - demand.cpu if worker.held else 0.0
        worker.used_memory_mb -= demand.memory_mb
        worker.used_gpus -= demand.gpus


def _learn(state: Namespace, run_key: str, run_us: int) -> None:
    expectations = state.expectations
    before = expectations.get(run_key)
    if before is None:
        if len(expectations) >= EXPECTATIONS_MAX:
            del expectations[next(iter(expectations))]
        expectations[run_key] = max(1, run_us)
    else:
        expectations[run_key] = max(1, before + (run_us - before) // 8)


def _end(state: Namespace, task: Task, final: State, at: At, event: Any) -> None:
    """The task reached a final state; what depends on it follows."""
    task.state = final
    task.suspect = False
    if task.cancel is not None:
        state.cancels.pop(task.id, None)
    if task.losses:
        state.struck.pop(task.id, None)
    if task.node is None:
        del state.tasks[task.id]
        terms = task.terms
        state.closed.add(task.id, Closed(final, at.seq, at.index, task.digest), state.latest_ms)
        if terms.notify:
            state.ended.append(Ended(task.id, final, terms.client, terms.notify, at.seq, at.index, event))
        release_terms(state, terms)
        return
    workflow = task.node.workflow
    _count_ended(workflow, task, at)
    if final is State.COMPLETED:
        for dependent in task.node.dependents:
            node = _node(dependent)
            node.waiting -= 1
            if not node.waiting and dependent.state is State.PENDING:
                _ready(state, dependent)
    else:
        _skip_dependents(task, at)
    if not workflow.open:
        _end_workflow(state, workflow.id, at)


def _count_ended(workflow: Any, task: Task, at: At) -> None:
    node = _node(task)
    node.end_seq, node.end_index = at.seq, at.index
    workflow.open -= 1
    workflow.counts[task.state] = workflow.counts.get(task.state, 0) + 1


def _skip_dependents(task: Task, at: At) -> None:
    waiting = list(_node(task).dependents)
    while waiting:
        dependent = waiting.pop()
        if dependent.state is not State.PENDING or dependent.cancel is not None:
            continue  # what was asked to be cancelled ends with that being confirmed
        dependent.state = State.SKIPPED
        dependent.error = f"{task.id} ended {task.state}"
        _count_ended(_node(dependent).workflow, dependent, at)
        waiting += _node(dependent).dependents


def _end_workflow(state: Namespace, workflow_id: str, at: At) -> None:
    workflow = state.workflows.pop(workflow_id)
    final = workflows.outcome(workflow.counts)
    state.closed.add(workflow_id, Closed(final, at.seq, at.index, workflow.digest), state.latest_ms)
    ended = Ended(
        workflow_id, final, workflow.client, workflow.notify, at.seq, at.index, dict(workflow.counts)
    )
    state.announcements[workflow_id] = ended
    state.ended.append(ended)
    for task in workflow.tasks.values():
        del state.tasks[task.id]
        node = _node(task)
        assert isinstance(task.state, State)
        state.closed.add(
            task.id, Closed(task.state, node.end_seq, node.end_index, task.digest), state.latest_ms
        )
        release_terms(state, task.terms)
        node.dependents = []
        task.node = None
    workflow.tasks = {}
