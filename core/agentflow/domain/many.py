"""Many events of one frame, folded at one go.

Most frames hold a hundred events of one kind that differ in little but the task: a client
submits, a worker is assigned to, a worker reports. Where it is certain that each of them is
applied and makes no more than its own task's step, the state is changed a column at a time.
The result is what folding one after the other comes to, to the byte; a test holds the two
against each other.

Each way looks at the whole frame first, and changes nothing unless it is certain. A no says
nothing: whoever gets it folds event by event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from agentflow import ids
from agentflow.domain.life import State
from agentflow.domain.state import At, Ended, Namespace, Task, Worker
from agentflow.domain.steps import learn
from agentflow.domain.tasks import are_alike, new_tasks, release_terms
from agentflow.events import TaskAssigned, TaskCompleted, TaskSubmitted
from agentflow.limits import OPEN_TASKS_MAX

MANY_MIN: Final = 4
"""Frames of fewer events are folded one by one: that is as fast."""


def all_applied(state: Namespace, kind: str, events: Sequence[Any], at: At) -> bool:
    """Apply all events of a frame. False: one of them may be no plain one, and nothing was changed."""
    known = _KNOWN.get(kind)
    if known is None:
        return False
    said, apply = known
    return set(map(type, events)) == {said} and apply(state, events, at)


def _submitted(state: Namespace, events: Sequence[TaskSubmitted], at: At) -> bool:
    new = [event.id for event in events]
    if not (_is_room(state, len(new)) and are_alike(events) and _are_unknown(state, new)):
        return False
    newest = _newest(state, new)
    if newest is None:
        return False
    tasks = new_tasks(state, events, at)
    if tasks is None:
        return False
    state.newest = newest
    state.tasks.update(zip(new, tasks, strict=True))
    state.queue.push_all(tasks)
    _step(state, tasks, State.READY)
    return True


def _is_room(state: Namespace, more: int) -> bool:
    return state.policy.accepting and len(state.tasks) + more <= OPEN_TASKS_MAX


def _are_unknown(state: Namespace, new: Sequence[str]) -> bool:
    """Whether the ids are given, differ, and are none that is remembered."""
    closed = state.closed
    return (
        "" not in (once := set(new))
        and len(once) == len(new)
        and state.tasks.keys().isdisjoint(once)
        and state.workflows.keys().isdisjoint(once)
        and closed.current.keys().isdisjoint(once)
        and closed.previous.keys().isdisjoint(once)
        and closed.early.keys().isdisjoint(once)
    )


def _newest(state: Namespace, new: Sequence[str]) -> str | None:
    """What `newest` becomes with these ids; None if one may be too old or ahead of the log."""
    closed, newest = state.closed, state.newest
    if closed.oldest < min(new) and max(new) < newest:
        return newest
    for each in new:
        if closed.oldest < each < newest:
            continue
        made_ms = ids.uuid7_time_ms(each)
        if made_ms is None:
            continue
        if not closed.horizon_ms <= made_ms <= state.latest_ms:
            return None
        newest = ids.uuid7_prefix(state.latest_ms + 1)
    return newest


def _assigned(state: Namespace, events: Sequence[TaskAssigned], at: At) -> bool:
    worker = state.workers.get(at.actor)
    tasks = _named(state, events)
    if worker is None or tasks is None or at.epoch != state.epoch:
        return False
    incarnation, terms = worker.incarnation, None
    for task, event in zip(tasks, events, strict=True):
        if (
            not task.ticket
            or task.suspect
            or event.attempt != task.attempt + 1
            or event.incarnation != incarnation
        ):
            return False
        if task.terms is not terms:
            terms = task.terms
            if not terms.line.plain:
                return False
    _assign(state, worker, tasks, at)
    return True


def _assign(state: Namespace, worker: Worker, tasks: Sequence[Task], at: At) -> None:
    state.queue.remove_all(tasks)
    terms, quick_us, total_us, slow = None, 0, 0, 0
    for task in tasks:
        if task.terms is not terms:
            terms, quick_us = task.terms, state.quick_us(task)
        task.state = State.RUNNING
        task.attempt += 1
        task.worker = worker
        if task.started or task.stopping:
            task.started = task.stopping = False
        task.quick_us = quick_us
        total_us += quick_us
        slow += not quick_us
    worker.quick_us += total_us
    worker.slow += slow
    worker.held.update(zip([task.id for task in tasks], tasks, strict=True))
    worker.assigned_seq = at.seq
    state.last_worker = worker.name
    state.running += len(tasks)
    _step(state, tasks, State.RUNNING)


def _completed(state: Namespace, events: Sequence[TaskCompleted], at: At) -> bool:
    worker = state.workers.get(at.actor)
    tasks = _named(state, events)
    if worker is None or tasks is None:
        return False
    incarnation, terms = worker.incarnation, None
    for task, event in zip(tasks, events, strict=True):
        if (
            task.worker is not worker
            or task.node is not None
            or task.cancel is not None
            or task.suspect
            or task.losses
            or event.attempt != task.attempt
            or event.incarnation != incarnation
        ):
            return False
        if task.terms is not terms:
            terms = task.terms
            if not terms.line.plain:
                return False
    _take_back(state, worker, tasks)
    _close(state, tasks, events, at)
    _settle(state, tasks, events)
    return True


def _take_back(state: Namespace, worker: Worker, tasks: Sequence[Task]) -> None:
    opened, held = state.tasks, worker.held
    for task in tasks:
        task.state = State.COMPLETED
        task.worker = None
        worker.quick_us -= task.quick_us
        worker.slow -= not task.quick_us
        del held[task.id], opened[task.id]
    worker.completed += len(tasks)
    state.running -= len(tasks)
    _step(state, tasks, State.COMPLETED)


def _close(state: Namespace, tasks: Sequence[Task], events: Sequence[TaskCompleted], at: At) -> None:
    seq, final = at.seq, State.COMPLETED
    state.closed.add_all(
        [task.id for task in tasks], final, seq, [task.digest for task in tasks], now_ms=state.latest_ms
    )
    state.ended += [
        Ended(task.id, final, terms.client, terms.notify, seq, index, event)
        for index, (task, event) in enumerate(zip(tasks, events, strict=True))
        if (terms := task.terms).notify
    ]


def _settle(state: Namespace, tasks: Sequence[Task], events: Sequence[TaskCompleted]) -> None:
    """Learn run times, and let go of the terms."""
    terms = tasks[0].terms
    if all([task.terms is terms for task in tasks]):  # noqa: C419 - a list is faster
        learn(state, terms.run_key, [event.run_us for event in events])
        release_terms(state, terms, len(tasks))
        return
    for task, event in zip(tasks, events, strict=True):
        learn(state, task.terms.run_key, [event.run_us])
        release_terms(state, task.terms)


def _named(state: Namespace, events: Sequence[TaskAssigned] | Sequence[TaskCompleted]) -> list[Task] | None:
    """The open tasks that events name, each another one; None if there is one they do not."""
    named = [event.id for event in events]
    try:
        tasks = list(map(state.tasks.__getitem__, named))
    except KeyError:
        return None
    return tasks if len(set(named)) == len(named) else None


def _step(state: Namespace, tasks: Sequence[Task], to: State) -> None:
    if state.steps is not None:
        state.steps += [(task, to) for task in tasks]


_KNOWN: Final[dict[str, tuple[type, Callable[[Namespace, Any, At], bool]]]] = {
    TaskSubmitted.kind: (TaskSubmitted, _submitted),
    TaskAssigned.kind: (TaskAssigned, _assigned),
    TaskCompleted.kind: (TaskCompleted, _completed),
}
