"""What workers say: that they are there or gone, and what became of their attempts.

Only the incarnation that holds the current attempt reports its outcome; anything later is
superseded and changes nothing.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Raw

from agentflow.domain import policies
from agentflow.domain.life import State
from agentflow.domain.state import APPLIED, SUPERSEDED, At, Kind, Namespace, Result, Task, Verdict, Worker
from agentflow.domain.steps import back_off, dismiss, end, is_at_stake, learn, lose, requeue, unassign
from agentflow.events import (
    Reason,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskStarted,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
)
from agentflow.limits import FOLD_BYTES_MAX


def worker_joined(state: Namespace, event: WorkerJoined, at: At) -> Verdict:
    """A new incarnation; one of the same name that was there before is dead."""
    before = state.workers.get(at.actor)
    if before is not None:
        lose(state, before)
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
        level=event.level,
    )
    state.workers_version += 1
    return APPLIED


def worker_draining(state: Namespace, event: WorkerDraining, at: At) -> Verdict:
    """The worker takes nothing new."""
    worker = state.workers.get(at.actor)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    worker.draining = True
    state.workers_version += 1
    return APPLIED


def worker_left(state: Namespace, event: WorkerLeft, at: At) -> Verdict:
    """The worker is gone and has stopped what it held: that is queued again, none of it suspect."""
    worker = state.workers.get(at.actor)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    for task in dismiss(state, worker):
        unassign(state, task)
        requeue(state, task)
    return APPLIED


def task_started(state: Namespace, event: TaskStarted, at: At) -> Verdict:
    """The worker has certainly begun the attempt: if it dies now, that is known."""
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    task.started = True
    if task.suspect and not is_at_stake(state, task):
        assert task.worker is not None
        task.worker.suspects -= 1
        task.suspect = False
    return APPLIED


def task_completed(state: Namespace, event: TaskCompleted, at: At) -> Verdict:
    """The attempt succeeded, and with it the task."""
    task = _held(state, event, at)
    if type(task) is Verdict:
        return task
    assert type(task) is Task
    worker = task.worker
    assert worker is not None
    worker.completed += 1
    unassign(state, task)
    learn(state, task.terms.run_key, (event.run_us,))
    if task.node is not None:
        task.node.result = _result(event, at)
    end(state, task, State.COMPLETED, at, event)
    return APPLIED


def _result(event: TaskCompleted, at: At) -> Result:
    value = b"" if event.object is not None else b"null" if event.result is UNSET else _bytes(event.result)
    return Result(at.seq, at.index, value if len(value) <= FOLD_BYTES_MAX else b"")


def _bytes(raw: Any) -> bytes:
    assert isinstance(raw, Raw)
    return bytes(raw)


def task_failed(state: Namespace, event: TaskFailed, at: At) -> Verdict:
    """The attempt failed or was stopped: another follows, or the task ends with it."""
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    assert task.worker is not None
    task.worker.failed += 1
    unassign(state, task)
    task.suspect = False
    if event.error == "stopped":
        requeue(state, task)
        return APPLIED
    task.failures += 1
    task.error = f"{event.error}: {event.message}"[:FOLD_BYTES_MAX]
    spent = task.failures + task.losses
    if task.cancel is None and policies.retries(
        task.terms.retry, spent, event.error, retryable=event.retryable
    ):
        back_off(state, task)
    else:
        end(state, task, State.FAILED, at, event)
    return APPLIED


def task_declined(state: Namespace, event: TaskDeclined, at: At) -> Verdict:
    """The worker will not run the attempt; it is not asked again for a while."""
    task = _held(state, event, at)
    if isinstance(task, Verdict):
        return task
    unassign(state, task)
    task.declined = {
        incarnation: until for incarnation, until in (task.declined or {}).items() if until > state.clock_ms
    }
    task.declined[event.incarnation] = state.clock_ms + state.policy.decline_ms
    requeue(state, task)
    return APPLIED


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
