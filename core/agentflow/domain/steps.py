"""The steps that what clients, leader and workers say have in common.

A task gets ready, is assigned, taken back and queued again, backs off, and ends; what depends
on it follows. Each step leaves queue, timers and sums over workers in agreement with the tasks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Final

from agentflow.domain import policies, workflows
from agentflow.domain.life import FINAL, State
from agentflow.domain.state import At, Ended, Namespace, Node, Task, Timer, Worker
from agentflow.domain.tasks import release_terms

EXPECTATIONS_MAX: Final = 10_000
"""Functions and scripts whose run time is remembered."""

SUSPECTS_CLEARED_SINCE: Final = 2
"""The contract level from which on a suspect that has certainly begun is none any more."""

TIMERS_MIN: Final = 1_024
"""Timers below this number are not worth cleaning up."""


def step(state: Namespace, task: Task, to: State) -> None:
    """The task is in another state from here on."""
    task.state = to
    if state.steps is not None:
        state.steps.append((task, to))


def make_ready(state: Namespace, task: Task) -> None:
    """The task waits for a worker from now on."""
    step(state, task, State.READY)
    task.ready_ms = state.clock_ms
    if task.cancel is None:
        state.queue.push(task)
        _set_deadline(state, task)


def requeue(state: Namespace, task: Task) -> None:
    """Back to the front of its lane: it has waited before."""
    step(state, task, State.READY)
    if task.cancel is None:
        state.queue.push(task, front=True)
        _set_deadline(state, task)
    else:
        state.cancels[task.id] = task


def leave_queue(state: Namespace, task: Task) -> None:
    """The task waits for no worker any more."""
    if task.ticket:
        state.queue.remove(task)


def unassign(state: Namespace, task: Task) -> None:
    """Take the task from the worker that holds it."""
    worker = task.worker
    assert worker is not None
    task.worker = None
    state.running -= 1
    del worker.held[task.id]
    worker.quick_us -= task.quick_us
    worker.slow -= not task.quick_us
    worker.suspects -= task.suspect
    if not task.terms.line.plain:
        demand = task.terms.demand
        if demand.lock:
            state.lock_users.pop(demand.lock, None)
        if not demand.plain:
            # Fractions do not add up exactly: what is left over must not pile up.
            worker.used_cpu = worker.used_cpu - demand.cpu if worker.held else 0.0
            worker.used_memory_mb -= demand.memory_mb
            worker.used_gpus -= demand.gpus


def lose(state: Namespace, worker: Worker) -> None:
    """The worker is dead: what it had certainly begun cost it a life, the rest is suspect."""
    for task in dismiss(state, worker):
        unassign(state, task)
        if task.started:
            task.losses += 1
            state.struck[task.id] = task
        task.suspect = not task.started or is_at_stake(state, task)
        requeue(state, task)


def is_at_stake(state: Namespace, task: Task) -> bool:
    """Whether the next loss would be its last: then it runs apart, lest it pay for another's.

    At level 1 that was so from the first loss on, which let a lost worker's long tasks wait
    for each other.
    """
    return state.level < SUSPECTS_CLEARED_SINCE or task.losses >= state.policy.losses_max - 1


def dismiss(state: Namespace, worker: Worker) -> Sequence[Task]:
    """Forget the worker; what it holds, backwards, so that putting each in front of the queue keeps their order."""
    del state.workers[worker.name]
    state.workers_version += 1
    return list(reversed(worker.held.values()))


def back_off(state: Namespace, task: Task) -> None:
    """The task waits a while before it may be tried again."""
    step(state, task, State.PENDING)
    task.due_ms = max(1, state.clock_ms + policies.backoff_ms(task.terms.retry, task.failures, task.id))
    _set_timer(state, state.backoffs, task.due_ms, task)


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


def learn(state: Namespace, run_key: str, runs_us: Sequence[int]) -> None:
    """Let each run time count for an eighth of what is expected of the next run."""
    expectations = state.expectations
    expected = expectations.get(run_key)
    if expected is None and len(expectations) >= EXPECTATIONS_MAX:
        del expectations[next(iter(expectations))]
    for run_us in runs_us:
        expected = run_us if expected is None else expected + (run_us - expected) // 8
        expected = expected if expected > 0 else 1
    assert expected is not None
    expectations[run_key] = expected


def end(state: Namespace, task: Task, final: State, at: At, event: Any) -> None:
    """The task reached a final state; what depends on it follows."""
    step(state, task, final)
    task.suspect = False
    if task.cancel is not None:
        state.cancels.pop(task.id, None)
    if task.losses:
        state.struck.pop(task.id, None)
    if task.node is None:
        del state.tasks[task.id]
        terms = task.terms
        state.closed.add(task.id, final, (at.seq, at.index), task.digest, now_ms=state.latest_ms)
        if terms.notify:
            state.ended.append(Ended(task.id, final, terms.client, terms.notify, at.seq, at.index, event))
        release_terms(state, terms)
        return
    workflow = task.node.workflow
    _count_ended(workflow, task, at)
    if final is State.COMPLETED:
        for dependent in task.node.dependents:
            node = node_of(dependent)
            node.waiting -= 1
            if not node.waiting and dependent.state is State.PENDING:
                make_ready(state, dependent)
    else:
        _skip_dependents(state, task, at)
    if not workflow.open:
        _end_workflow(state, workflow.id, at)


def _count_ended(workflow: Any, task: Task, at: At) -> None:
    node = node_of(task)
    node.end_seq, node.end_index = at.seq, at.index
    workflow.open -= 1
    workflow.counts[task.state] = workflow.counts.get(task.state, 0) + 1


def _skip_dependents(state: Namespace, task: Task, at: At) -> None:
    waiting = list(node_of(task).dependents)
    while waiting:
        dependent = waiting.pop()
        if dependent.state is not State.PENDING or dependent.cancel is not None:
            continue  # what was asked to be cancelled ends with that being confirmed
        step(state, dependent, State.SKIPPED)
        dependent.error = f"{task.id} ended {task.state}"
        _count_ended(node_of(dependent).workflow, dependent, at)
        waiting += node_of(dependent).dependents


def _end_workflow(state: Namespace, workflow_id: str, at: At) -> None:
    workflow = state.workflows.pop(workflow_id)
    final = workflows.outcome(workflow.counts)
    state.closed.add(workflow_id, final, (at.seq, at.index), workflow.digest, now_ms=state.latest_ms)
    ended = Ended(
        workflow_id, final, workflow.client, workflow.notify, at.seq, at.index, dict(workflow.counts)
    )
    state.announcements[workflow_id] = ended
    state.ended.append(ended)
    for task in workflow.tasks.values():
        del state.tasks[task.id]
        node = node_of(task)
        assert isinstance(task.state, State)
        position = (node.end_seq, node.end_index)
        state.closed.add(task.id, task.state, position, task.digest, now_ms=state.latest_ms)
        release_terms(state, task.terms)
        node.dependents = []
        task.node = None
    workflow.tasks = {}


def node_of(task: Task) -> Node:
    """The place in its workflow of a task that is known to have one."""
    assert task.node is not None
    return task.node
