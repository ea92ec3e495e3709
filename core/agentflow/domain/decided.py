"""What the leader decides.

Only a leader whose epoch is the highest so far decides. This is checked here although the
log itself refuses a deposed leader's writes: twice is not too often. A decision made before
the leader had read what overtook it is superseded and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from agentflow.domain.life import State
from agentflow.domain.state import APPLIED, SUPERSEDED, At, Kind, Namespace, Verdict
from agentflow.domain.steps import end, leave_queue, lose, make_ready, step
from agentflow.events import (
    EventRejected,
    PolicyChanged,
    Reason,
    TaskAssigned,
    TaskCancelled,
    TaskQuarantined,
    TaskRetried,
    TaskStop,
    TaskTimedOut,
    WorkerLost,
    WorkflowCompleted,
)


def decided(state: Namespace, event: Any, at: At) -> Verdict:
    """A decision of the leader; it counts only while no other has been elected."""
    if at.epoch != state.epoch:
        return Verdict(Kind.SUPERSEDED, Reason.UNFENCED, f"epoch {at.epoch} decided while {state.epoch} led")
    return _MEANING[type(event)](state, event, at)


def _task_assigned(state: Namespace, event: TaskAssigned, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    worker = state.workers.get(at.actor)
    if task is None or task.state is not State.READY or event.attempt != task.attempt + 1:
        return SUPERSEDED
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    demand = task.terms.demand
    if demand.lock in state.lock_users:
        return SUPERSEDED
    if task.ticket:
        state.queue.remove(task)
    task.attempt = event.attempt
    task.worker = worker
    step(state, task, State.RUNNING)
    task.started = task.stopping = False
    task.quick_us = quick_us = state.quick_us(task)
    worker.quick_us += quick_us
    worker.slow += not quick_us
    worker.held[task.id] = task
    worker.assigned_seq = at.seq
    worker.suspects += task.suspect
    state.last_worker = worker.name
    state.running += 1
    if not task.terms.line.plain:
        if demand.lock:
            state.lock_users[demand.lock] = task.id
        worker.used_cpu += demand.cpu
        worker.used_memory_mb += demand.memory_mb
        worker.used_gpus += demand.gpus
    return APPLIED


def _task_stop(state: Namespace, event: TaskStop, _at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.RUNNING or task.attempt != event.attempt:
        return SUPERSEDED
    task.stopping = True
    state.cancels.pop(task.id, None)
    return APPLIED


def _task_retried(state: Namespace, event: TaskRetried, _at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.PENDING or not task.due_ms or task.attempt != event.attempt:
        return SUPERSEDED
    task.due_ms = 0
    make_ready(state, task)
    return APPLIED


def _task_timed_out(state: Namespace, event: TaskTimedOut, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.READY:
        return SUPERSEDED
    leave_queue(state, task)
    task.error = "queue_timeout"
    end(state, task, State.FAILED, at, event)
    return APPLIED


def _task_cancelled(state: Namespace, event: TaskCancelled, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state not in _CANCELLABLE:
        return SUPERSEDED
    leave_queue(state, task)
    end(state, task, State.CANCELLED, at, event)
    return APPLIED


_CANCELLABLE: Final = frozenset({State.PENDING, State.READY})


def _task_quarantined(state: Namespace, event: TaskQuarantined, at: At) -> Verdict:
    task = state.tasks.get(event.id)
    if task is None or task.state is not State.READY:
        return SUPERSEDED
    leave_queue(state, task)
    task.error = f"quarantined: {event.reason}"
    end(state, task, State.FAILED, at, event)
    return APPLIED


def _worker_lost(state: Namespace, event: WorkerLost, _at: At) -> Verdict:
    worker = state.workers.get(event.worker)
    if worker is None or worker.incarnation != event.incarnation:
        return SUPERSEDED
    lose(state, worker)
    return APPLIED


def _policy_changed(state: Namespace, event: PolicyChanged, _at: At) -> Verdict:
    state.policy = event.policy
    return APPLIED


def _event_rejected(state: Namespace, event: EventRejected, _at: At) -> Verdict:
    return APPLIED if state.answers.pop((event.seq, event.index), None) else SUPERSEDED


def _workflow_completed(state: Namespace, event: WorkflowCompleted, _at: At) -> Verdict:
    return APPLIED if state.announcements.pop(event.id, None) else SUPERSEDED


_MEANING: Final[dict[type, Callable[[Namespace, Any, At], Verdict]]] = {
    TaskAssigned: _task_assigned,
    TaskStop: _task_stop,
    TaskRetried: _task_retried,
    TaskTimedOut: _task_timed_out,
    TaskCancelled: _task_cancelled,
    TaskQuarantined: _task_quarantined,
    WorkerLost: _worker_lost,
    PolicyChanged: _policy_changed,
    EventRejected: _event_rejected,
    WorkflowCompleted: _workflow_completed,
}

DECISIONS: Final = tuple(_MEANING)
"""Kinds of events that only a leader says."""
