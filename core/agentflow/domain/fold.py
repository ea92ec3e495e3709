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
from agentflow.domain.life import FINAL, State
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
from agentflow.limits import ANSWERS_MAX, FOLD_BYTES_MAX, ID_AHEAD_MS_MAX, OPEN_TASKS_MAX

EXPECTATIONS_MAX: Final = 10_000
"""Functions and scripts whose run time is remembered."""

TIMERS_MIN: Final = 1_024
"""Timers below this number are not worth cleaning up."""

_NEWEST_STEP_MS: Final = 60_000
"""How often the bound on ids from the future moves on."""


def fold(state: Namespace, seq: int, time_ns: int, judged: Judged) -> list[Verdict]:
    """Fold one message; the verdict on each of its events, or on the message as a whole.

    A message at or before the last one folded changes nothing.
    """
    if seq <= state.seq:
        return []
    server_ms = time_ns // 1_000_000
    if state.server_ms and server_ms > state.server_ms:
        state.clock_ms += server_ms - state.server_ms
    elif not state.server_ms:
        state.clock_ms = server_ms
    state.server_ms = server_ms
    state.seq = seq
    if server_ms > state.newest_ms - ID_AHEAD_MS_MAX + _NEWEST_STEP_MS:
        state.newest_ms = server_ms + ID_AHEAD_MS_MAX
        state.newest = ids.uuid7_prefix(state.newest_ms)
    if state.parts and (judged.kind not in _PARTS or seq != state.parts_seq + 1):
        state.parts.clear()
    at = At(seq, 0, server_ms, judged.actor)
    if judged.whole is not None:
        at.index = -1
        return [_refuse(state, judged.role, judged.whole, at)]
    if judged.decision is not None:
        at.epoch = judged.decision.epoch
    verdicts = []
    for index, item in enumerate(judged.items):
        at.index = index
        if type(item) is Bad:
            verdicts.append(_refuse(state, judged.role, item, at))
            continue
        verdict = evolve(state, item, at)  # type: ignore[arg-type]
        if verdict is not APPLIED:
            _count(state, verdict, item, at)
        verdicts.append(verdict)
    return verdicts


_PARTS: Final = frozenset({WorkflowPart.kind, WorkflowSubmitted.kind})


def _refuse(state: Namespace, role: Role | None, bad: Bad, at: At) -> Verdict:
    kind = Kind.REJECTED if role is Role.CLIENT else Kind.QUARANTINED
    verdict = Verdict(kind, bad.reason, bad.detail)
    if kind is Kind.REJECTED:
        state.rejected += 1
        _answer(state, verdict, bad.id, at)
    else:
        state.quarantined += 1
    return verdict


def _count(state: Namespace, verdict: Verdict, event: Any, at: At) -> None:
    if verdict.kind is Kind.REJECTED:
        state.rejected += 1
        _answer(state, verdict, getattr(event, "id", ""), at)
    elif verdict.kind is Kind.QUARANTINED:
        state.quarantined += 1
    elif verdict.kind is Kind.SUPERSEDED:
        state.superseded += 1
    if verdict.kind in _TOLD and isinstance(event, TaskSubmitted | WorkflowSubmitted) and event.notify:
        why = (str(verdict.reason), verdict.detail)
        state.ended.append(Ended(event.id, verdict.kind, at.actor, event.notify, at.seq, at.index, why))


_TOLD: Final = frozenset({Kind.REJECTED, Kind.DUPLICATE})
"""Verdicts on a submission of which its client is told."""


def _answer(state: Namespace, verdict: Verdict, given_id: str, at: At) -> None:
    if len(state.answers) < ANSWERS_MAX:
        state.answers[at.seq, at.index] = EventRejected(
            seq=at.seq,
            index=at.index,
            client=at.actor,
            reason=str(verdict.reason),
            detail=verdict.detail,
            id=given_id,
        )


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


def _decided(state: Namespace, event: Any, at: At) -> Verdict:  # noqa: C901, PLR0911, PLR0912 - it only routes
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
    if state.closed.oldest < new_id < state.newest:
        return None
    return _out_of_time(state, new_id)


def _out_of_time(state: Namespace, new_id: str) -> Verdict | None:
    made_ms = ids.uuid7_time_ms(new_id)
    if made_ms is None or state.closed.horizon_ms <= made_ms < state.newest_ms:
        return None
    if made_ms < state.newest_ms:
        return _rejected(Reason.TOO_OLD, f"{new_id} is older than the ids remembered: was it accepted before?")
    return _rejected(Reason.FROM_THE_FUTURE, f"{new_id} is from the future: is the client's clock right?")


def _workflow_part(state: Namespace, event: WorkflowPart, at: At) -> Verdict:
    first = state.parts[0][1] if state.parts else event
    if event.part != len(state.parts) or event.workflow != first.workflow:
        state.parts.clear()
        return _rejected(Reason.BAD_VALUE, f"part {event.part} of {event.workflow} does not follow the part before it")
    state.parts.append((_copy(at), event))
    state.parts_seq = at.seq
    return APPLIED


def _copy(at: At) -> At:
    return At(at.seq, at.index, at.server_ms, at.actor)


def _workflow_submitted(state: Namespace, event: WorkflowSubmitted, at: At) -> Verdict:
    parts, state.parts = state.parts, []
    if event.parts != len(parts) or any(part.workflow != event.id for _, part in parts):
        return _rejected(Reason.BAD_VALUE, f"{event.parts} parts announced, {len(parts)} came directly before")
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
    task.cancel = reason
    state.cancels[task.id] = task


def _workflow_cancel_requested(state: Namespace, event: WorkflowCancelRequested, at: At) -> Verdict:
    workflow = state.workflows.get(event.id)
    if workflow is None:
        return _not_open(state, event.id)
    for task in workflow.tasks.values():
        if task.state not in FINAL and task.cancel is None:
            _request_cancel(state, task, event.reason or f"requested by {at.actor}")
    return APPLIED


def _not_open(state: Namespace, wanted: str) -> Verdict:
    status, _ = state.status(wanted)
    if status == "unknown":
        return _rejected(Reason.UNKNOWN_ID, f"no open task or workflow is called {wanted}")
    return _rejected(Reason.CLOSED, f"{wanted} is {status} already")


def _reprioritized(state: Namespace, event: TaskReprioritized, _at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state in FINAL:
        return _not_open(state, event.id)
    if task.state is State.RUNNING:
        return _rejected(Reason.CLOSED, f"{event.id} is {task.state}: only a waiting task can be reprioritized")
    queued = task.ticket != 0
    if queued:
        state.queue.remove(task)
    task.priority = priority_of(event.priority)
    if queued:
        state.queue.push(task)
    return APPLIED


# What the leader decides -------------------------------------------------------------


def _leader_elected(state: Namespace, event: LeaderElected, at: At) -> Verdict:
    if at.actor != wire.ELECTED_ACTOR or event.epoch != state.epoch + 1:
        return Verdict(Kind.QUARANTINED, Reason.CONFLICT, f"epoch {event.epoch} does not follow {state.epoch}")
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
    state.queue.remove(task)
    task.state = State.RUNNING
    task.attempt = event.attempt
    task.worker = worker
    task.started = task.stopping = False
    terms = task.terms
    expected_us = state.expectations.get(terms.run_key, 0)
    task.expected_us = expected_us
    worker.expected_us += expected_us
    worker.held[task.id] = task
    worker.assigned_seq = at.seq
    worker.suspects += task.suspect
    state.last_worker = worker.name
    state.running += 1
    demand = terms.demand
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
    state.queue.remove(task)
    task.error = "queue_timeout"
    _end(state, task, State.FAILED, at, event)
    return APPLIED


def _task_cancelled(state: Namespace, event: TaskCancelled, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state not in _CANCELLABLE:
        return SUPERSEDED
    if task.ticket:
        state.queue.remove(task)
    _end(state, task, State.CANCELLED, at, event)
    return APPLIED


_CANCELLABLE: Final = frozenset({State.PENDING, State.READY})


def _task_quarantined(state: Namespace, event: TaskQuarantined, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.READY:
        return SUPERSEDED
    state.queue.remove(task)
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
        started = task.started
        _unassign(state, task)
        task.losses += started
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
    if task.cancel is None and policies.retries(task.terms.retry, task.failures, event.error, retryable=event.retryable):
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
    if task.declined is None:
        task.declined = {}
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
    state.queue.push(task)
    wait_ms = task.terms.queue_timeout_ms
    if wait_ms and not task.attempt:
        _set_timer(state, state.deadlines, state.clock_ms + wait_ms, task)


def _set_timer(state: Namespace, timers: list[tuple[int, int, Task]], due_ms: int, task: Task) -> None:
    """Timers of tasks that ended stay until they are due, unless they become the most."""
    state.order += 1
    heapq.heappush(timers, (due_ms, state.order, task))
    if len(timers) > TIMERS_MIN and len(timers) > 2 * len(state.tasks):
        timers[:] = [timer for timer in timers if timer[2].state not in FINAL]
        heapq.heapify(timers)


def _requeue(state: Namespace, task: Task) -> None:
    """Back to the front of its lane: it has waited before."""
    task.state = State.READY
    state.queue.push(task, front=True)
    if task.cancel is not None:
        state.cancels[task.id] = task


def _unassign(state: Namespace, task: Task) -> None:
    worker = task.worker
    assert worker is not None
    task.worker = None
    state.running -= 1
    del worker.held[task.id]
    worker.expected_us -= task.expected_us
    worker.suspects -= task.suspect
    demand = task.terms.demand
    if not demand.plain:
        worker.used_cpu -= demand.cpu
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
    if task.node is None:
        del state.tasks[task.id]
        terms = task.terms
        state.closed.add(task.id, Closed(final, at.seq, at.index, task.digest), at.server_ms)
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
        _skip_dependents(state, task, at)
    if not workflow.open:
        _end_workflow(state, workflow.id, at, event)


def _count_ended(workflow: Any, task: Task, at: At) -> None:
    node = _node(task)
    node.end_seq, node.end_index = at.seq, at.index
    workflow.open -= 1
    workflow.counts[task.state] = workflow.counts.get(task.state, 0) + 1


def _skip_dependents(state: Namespace, task: Task, at: At) -> None:
    waiting = list(_node(task).dependents)
    while waiting:
        dependent = waiting.pop()
        if dependent.state is not State.PENDING:
            continue
        dependent.state = State.SKIPPED
        dependent.error = f"{task.id} ended {task.state}"
        state.cancels.pop(dependent.id, None)
        _count_ended(_node(dependent).workflow, dependent, at)
        waiting += _node(dependent).dependents


def _end_workflow(state: Namespace, workflow_id: str, at: At, event: Any) -> None:
    workflow = state.workflows.pop(workflow_id)
    final = workflows.outcome(workflow.counts)
    state.closed.add(workflow_id, Closed(final, at.seq, at.index, workflow.digest), at.server_ms)
    ended = Ended(workflow_id, final, workflow.client, workflow.notify, at.seq, at.index, dict(workflow.counts))
    state.announcements[workflow_id] = ended
    state.ended.append(ended)
    for task in workflow.tasks.values():
        del state.tasks[task.id]
        node = _node(task)
        assert isinstance(task.state, State)
        state.closed.add(task.id, Closed(task.state, node.end_seq, node.end_index, task.digest), at.server_ms)
        release_terms(state, task.terms)
        node.dependents = []
        task.node = None
    workflow.tasks = {}
