"""The plan: what the leader would do now.

`plan` reads the fold and changes nothing in it. It names at most one decision for each
task; somebody else writes the decisions, and the next plan is made on a fold that has read
them back. The same state, time and observations give the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import UNSET, Raw, Struct, UnsetType

from agentflow import wire
from agentflow.domain import policies
from agentflow.domain.life import State
from agentflow.domain.policies import Room
from agentflow.domain.queue import Line, rank
from agentflow.domain.state import Namespace, Task
from agentflow.events import (
    Event,
    Input,
    TaskAssigned,
    TaskCancelled,
    TaskQuarantined,
    TaskRetried,
    TaskStop,
    TaskTimedOut,
    WorkerLost,
    WorkflowCompleted,
)
from agentflow.limits import FOLD_BYTES_MAX

DECISIONS_MAX: Final = 4_000
"""Most decisions of one kind in one plan: a plan must not keep the leader from reading."""
INPUTS_BYTES_MAX: Final = 32 * FOLD_BYTES_MAX
"""Results handed over inside one assignment; beyond it they go as positions."""
LOOKAHEAD_MAX: Final = 100
"""Tasks of a line passed over because the only workers with room declined them."""


class Silence(Struct, frozen=True, gc=False):
    """An observation: nothing was heard of a worker's incarnation for too long."""

    worker: str
    incarnation: int
    reason: str


class Plan(Struct, frozen=True):
    """What to do."""

    decisions: dict[tuple[str, str], list[Event]]
    """Events to write, by kind and by the actor in their subject."""
    wake_ms: int | None
    """Log time at which to look again even if nothing happens."""
    more: bool = False
    """There was more to decide than one plan holds."""

    def __bool__(self) -> bool:
        return bool(self.decisions)


def plan(state: Namespace, now_ms: int, silences: Sequence[Silence] = ()) -> Plan:
    """What the leader does at log time `now_ms`."""
    decisions: dict[tuple[str, str], list[Event]] = {}
    leader = state.leader
    touched: set[str] = set()
    _add(decisions, WorkerLost.kind, leader, list(_lost(state, silences)))
    for kind, actor, event in _cancels(state, touched):
        decisions.setdefault((kind, actor), []).append(event)
    _add(decisions, TaskTimedOut.kind, leader, list(_timed_out(state, now_ms, touched)))
    _add(decisions, TaskRetried.kind, leader, list(_retried(state, now_ms, touched)))
    _add(decisions, TaskQuarantined.kind, leader, list(_quarantined(state, touched)))
    _add(decisions, "event.rejected", leader, list(state.answers.values())[:DECISIONS_MAX])
    _add(decisions, WorkflowCompleted.kind, leader, list(_announced(state)))
    if state.queue.size:
        _assign(state, now_ms, touched, decisions)
    more = any(len(events) >= DECISIONS_MAX for events in decisions.values())
    return Plan(decisions, _wake_ms(state, now_ms), more)


def _add(decisions: dict[tuple[str, str], list[Event]], kind: str, actor: str, events: list[Event]) -> None:
    if events:
        decisions[kind, actor] = events


def _lost(state: Namespace, silences: Sequence[Silence]) -> Iterator[WorkerLost]:
    for silence in silences:
        worker = state.workers.get(silence.worker)
        if worker is not None and worker.incarnation == silence.incarnation:
            yield WorkerLost(worker=silence.worker, incarnation=silence.incarnation, reason=silence.reason)


def _cancels(state: Namespace, touched: set[str]) -> Iterator[tuple[str, str, Event]]:
    for task in list(state.cancels.values())[:DECISIONS_MAX]:
        reason = task.cancel or ""
        if task.state in (State.PENDING, State.READY):
            touched.add(task.id)
            yield TaskCancelled.kind, state.leader, TaskCancelled(id=task.id, reason=reason)
        elif task.worker is not None and not task.stopping:
            touched.add(task.id)
            incarnation = task.worker.incarnation
            stop = TaskStop(id=task.id, attempt=task.attempt, incarnation=incarnation, reason=reason)
            yield TaskStop.kind, task.worker.name, stop


def _due(timers: list[tuple[int, int, Task]], now_ms: int) -> Iterator[tuple[int, Task]]:
    """Timers due by now, without taking them off their heap."""
    waiting = [0] if timers else []
    while waiting:
        place = waiting.pop()
        due_ms, _, task = timers[place]
        if due_ms > now_ms:
            continue
        yield due_ms, task
        waiting += [child for child in (2 * place + 1, 2 * place + 2) if child < len(timers)]


def _timed_out(state: Namespace, now_ms: int, touched: set[str]) -> Iterator[TaskTimedOut]:
    _drop_passed(state.deadlines, _still_waits)
    for _, task in _due(state.deadlines, now_ms):
        if _still_waits(0, task) and task.id not in touched and len(touched) < DECISIONS_MAX:
            touched.add(task.id)
            yield TaskTimedOut(id=task.id)


def _still_waits(_due_ms: int, task: Task) -> bool:
    return task.state is State.READY and not task.attempt


def _retried(state: Namespace, now_ms: int, touched: set[str]) -> Iterator[TaskRetried]:
    _drop_passed(state.backoffs, _still_backs_off)
    for due_ms, task in _due(state.backoffs, now_ms):
        if _still_backs_off(due_ms, task) and task.id not in touched and len(touched) < DECISIONS_MAX:
            touched.add(task.id)
            yield TaskRetried(id=task.id, attempt=task.attempt)


def _still_backs_off(due_ms: int, task: Task) -> bool:
    return task.state is State.PENDING and task.due_ms == due_ms


def _drop_passed(timers: list[tuple[int, int, Task]], counts: object) -> None:
    """Take off the heap what no longer counts; it is an index, not part of the state."""
    assert callable(counts)
    while timers and not counts(timers[0][0], timers[0][2]):
        heapq.heappop(timers)


def _quarantined(state: Namespace, touched: set[str]) -> Iterator[TaskQuarantined]:
    """Tasks that cost too many workers their lives. Only suspects can be among them."""
    for line in state.queue.all_waiting():
        if not line.suspect:
            continue
        for task in line.tasks(state.policy.ageing_per_s):
            if task.losses >= state.policy.losses_max and task.id not in touched:
                touched.add(task.id)
                detail = f"{task.losses} workers were lost while they ran it"
                yield TaskQuarantined(id=task.id, reason="losses", detail=detail)


def _announced(state: Namespace) -> Iterator[WorkflowCompleted]:
    for ended in list(state.announcements.values())[:DECISIONS_MAX]:
        counts = {str(key): count for key, count in ended.event.items()}
        yield WorkflowCompleted(id=ended.id, state=str(ended.state), **counts)


def _wake_ms(state: Namespace, now_ms: int) -> int | None:
    heads = [timers[0][0] for timers in (state.backoffs, state.deadlines) if timers]
    if state.queue.size:
        heads += [until for until in _declines_end(state) if until > now_ms]
    return min(heads, default=None)


def _declines_end(state: Namespace) -> Iterator[int]:
    for line in state.queue.waiting.values():
        for count, task in enumerate(line.tasks(state.policy.ageing_per_s)):
            if task.declined is None or count > LOOKAHEAD_MAX:
                break
            yield from task.declined.values()


# Placement ---------------------------------------------------------------------------


class _Candidate:
    """A line on its way through one plan."""

    __slots__ = ("expected_us", "line", "next", "passed", "strategy", "tasks")

    def __init__(self, state: Namespace, line: Line, rooms: Sequence[Room]) -> None:
        self.line = line
        self.tasks = line.tasks(state.policy.ageing_per_s)
        self.next = next(self.tasks)
        self.expected_us = state.expectations.get(self.next.terms.run_key, 0)
        self.strategy = policies.strategy(state.policy, rooms, line, self.expected_us, state.last_worker)
        self.passed = 0

    def advance(self) -> bool:
        found = next(self.tasks, None)
        if found is None:
            return False
        self.next = found
        return True


def _assign(
    state: Namespace, now_ms: int, touched: set[str], decisions: dict[tuple[str, str], list[Event]]
) -> None:
    rooms = _rooms(state)
    if not rooms:
        return
    ageing = state.policy.ageing_per_s
    heap: list[tuple[tuple[float, int], _Candidate]] = []
    for line in _open_lines(state):
        candidate = _Candidate(state, line, [rooms[worker.name] for worker in line.eligible])
        heap.append((rank(candidate.next, ageing), candidate))
    heapq.heapify(heap)
    assigned = 0
    while heap and assigned < DECISIONS_MAX:
        candidate = heap[0][1]
        # While no other line can come first, the heap need not be asked again.
        limit = min((entry[0] for entry in heap[1:3]), default=None)
        while assigned < DECISIONS_MAX:
            task = candidate.next
            took = _place(state, candidate, now_ms, touched, decisions)
            if took is None or not candidate.advance():
                heapq.heappop(heap)
                break
            assigned += took
            if limit is not None and rank(candidate.next, ageing) > limit:
                heapq.heapreplace(heap, (rank(candidate.next, ageing), candidate))
                break
            del task


def _place(
    state: Namespace,
    candidate: _Candidate,
    now_ms: int,
    touched: set[str],
    decisions: dict[tuple[str, str], list[Event]],
) -> int | None:
    """Place the candidate's next task: 1 if it went somewhere, 0 if it is passed over.

    None if nothing more of the line can go anywhere.
    """
    task = candidate.next
    if task.id in touched or task.cancel is not None:
        return 0
    if task.declined is not None:
        _forget_declines(task, now_ms)
    room = candidate.strategy.pick(task)
    if room is None:
        candidate.passed += 1
        return 0 if task.declined and candidate.passed < LOOKAHEAD_MAX else None
    expected_us = state.expectations.get(task.terms.run_key, 0)
    room.take(candidate.line, expected_us)
    worker = room.worker
    event = _assignment(task, worker.incarnation)
    key = (TaskAssigned.kind, worker.name)
    events = decisions.get(key)
    if events is None:
        decisions[key] = [event]
    else:
        events.append(event)
    return 1


def _forget_declines(task: Task, now_ms: int) -> None:
    assert task.declined is not None
    kept = {incarnation: until for incarnation, until in task.declined.items() if until > now_ms}
    task.declined = kept or None


def _rooms(state: Namespace) -> dict[str, Room]:
    workers = (worker for worker in state.workers.values() if not worker.draining)
    return {worker.name: Room(worker, order) for order, worker in enumerate(workers)}


def _open_lines(state: Namespace) -> list[Line]:
    """Lines that some worker can serve; the others are set aside until the workers change."""
    queue = state.queue
    queue.unpark(state.workers_version)
    found = []
    for line in list(queue.waiting.values()):
        if line.version != state.workers_version:
            workers = state.workers.values()
            line.eligible = [
                worker for worker in workers if not worker.draining and policies.eligible(line.demand, worker)
            ]
            line.version = state.workers_version
        if line.eligible:
            found.append(line)
        else:
            queue.park(line)
    return found


def _assignment(task: Task, incarnation: int) -> TaskAssigned:
    terms = task.terms
    if task.payload is None and task.node is None and not terms.timeout_s and not terms.shell:
        return TaskAssigned(
            id=task.id,
            attempt=task.attempt + 1,
            incarnation=incarnation,
            function=terms.function,
            args=Raw(task.args) if task.args else UNSET,
            suspect=task.suspect,
        )
    return _full_assignment(task, incarnation)


def _full_assignment(task: Task, incarnation: int) -> TaskAssigned:
    terms, payload = task.terms, task.payload
    fetch = payload is not None and payload.fetch
    return TaskAssigned(
        id=task.id,
        attempt=task.attempt + 1,
        incarnation=incarnation,
        function=terms.function,
        shell=terms.shell,
        args=_raw(task.args),
        kwargs=_raw(payload.kwargs) if payload else UNSET,
        argv=_raw(payload.argv) if payload else UNSET,
        env=_raw(payload.env) if payload else UNSET,
        cwd=terms.cwd,
        object=payload.object if payload else None,
        seq=task.seq if fetch else 0,
        index=task.index if fetch else 0,
        inputs=_inputs(task),
        timeout_s=terms.timeout_s,
        non_retryable=terms.retry.non_retryable if terms.retry else [],
        suspect=task.suspect,
    )


def _raw(text: bytes) -> Raw | UnsetType:
    return Raw(text) if text else UNSET


def _inputs(task: Task) -> dict[str, Input]:
    if task.node is None:
        return {}
    inputs = {}
    room = INPUTS_BYTES_MAX
    for task_id in task.node.uses:
        source = task.node.workflow.tasks[task_id].node
        assert source is not None
        result = source.result
        assert result is not None
        inline = bool(result.value) and len(result.value) <= room
        room -= len(result.value) if inline else 0
        inputs[task_id] = Input(value=Raw(result.value)) if inline else Input(seq=result.seq, index=result.index)
    return inputs


def epoch_subject(state: Namespace) -> str:
    """The subject whose last message fences this namespace's decisions."""
    return wire.elected(state.name)
