"""The plan: what the leader would do now.

`plan` reads the fold and changes nothing in it. It names at most one decision for each
task; somebody else writes the decisions, and the next plan is made on a fold that has read
them back. The same state, time and observations give the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Final

from msgspec import UNSET, Raw, Struct, UnsetType

from agentflow.domain import policies
from agentflow.domain.life import State
from agentflow.domain.policies import Room, Strategy, Turn
from agentflow.domain.queue import Line, Rank, rank
from agentflow.domain.state import Namespace, Result, Task, Timer
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
from agentflow.frames import nesting
from agentflow.limits import FOLD_BYTES_MAX, INPUT_DEPTH_MAX

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

    def __bool__(self) -> bool:
        return bool(self.decisions)


Watch = Callable[[Line, Sequence[Room], Strategy], Strategy]
"""Told of each line that is served, with the rooms and the strategy: what it returns takes the strategy's place."""


def plan(
    state: Namespace, now_ms: int, silences: Sequence[Silence] = (), *, watch: Watch | None = None
) -> Plan:
    """What the leader does at log time `now_ms`. `watch` may look on, to explain it."""
    draft = _Draft(state, now_ms, watch)
    if silences:
        _lose(draft, silences)
    if state.cancels:
        _cancel(draft)
    if state.deadlines:
        _time_out(draft)
    if state.backoffs:
        _retry(draft)
    _quarantine(draft)
    if state.answers:
        _answer(draft)
    if state.announcements:
        _announce(draft)
    if state.queue.size:
        _assign(draft)
    return Plan(draft.decisions, _wake_ms(state, now_ms))


class _Draft:
    """A plan in the making."""

    __slots__ = ("decisions", "locks", "lost", "now_ms", "state", "touched", "watch")

    def __init__(self, state: Namespace, now_ms: int, watch: Watch | None) -> None:
        self.state = state
        self.now_ms = now_ms
        self.watch = watch
        self.decisions: dict[tuple[str, str], list[Event]] = {}
        self.touched: set[str] = set()
        """Tasks that something else was decided about."""
        self.locks: set[str] = set(state.lock_users)
        """Locks that a task runs under, or is about to."""
        self.lost: set[str] = set()
        """Workers given up, which get nothing more."""

    def say(self, event: Event, actor: str) -> None:
        """Decide something. `actor` is the worker spoken to, or the leader."""
        key = (event.kind, actor)
        events = self.decisions.get(key)
        if events is None:
            self.decisions[key] = [event]
        else:
            events.append(event)


def _lose(draft: _Draft, silences: Sequence[Silence]) -> None:
    for silence in silences:
        worker = draft.state.workers.get(silence.worker)
        if worker is not None and worker.incarnation == silence.incarnation and worker.name not in draft.lost:
            draft.lost.add(worker.name)
            lost = WorkerLost(worker=worker.name, incarnation=worker.incarnation, reason=silence.reason)
            draft.say(lost, draft.state.leader)


def _cancel(draft: _Draft) -> None:
    """Confirm what can end at once; ask workers to stop the rest."""
    for task in islice(draft.state.cancels.values(), DECISIONS_MAX):
        reason = task.cancel or ""
        worker = task.worker
        if worker is None:
            draft.say(TaskCancelled(id=task.id, reason=reason), draft.state.leader)
        else:
            incarnation = worker.incarnation
            stop = TaskStop(id=task.id, attempt=task.attempt, incarnation=incarnation, reason=reason)
            draft.say(stop, worker.name)


def _time_out(draft: _Draft) -> None:
    for task in _due(draft, draft.state.deadlines, _still_waits):
        draft.say(TaskTimedOut(id=task.id), draft.state.leader)


def _still_waits(task: Task, _due_ms: int) -> bool:
    return task.awaits_first_start


def _retry(draft: _Draft) -> None:
    for task in _due(draft, draft.state.backoffs, Task.backs_off_until):
        draft.say(TaskRetried(id=task.id, attempt=task.attempt), draft.state.leader)


def _due(draft: _Draft, timers: list[Timer], counts: Callable[[Task, int], bool]) -> Iterator[Task]:
    """Tasks whose timers are due and still count, earliest first."""
    # The heap is an index, not part of the state: what no longer counts may leave it.
    while timers and not counts(timers[0][2], timers[0][0]):
        heapq.heappop(timers)
    due = takewhile(lambda timer: timer[0] <= draft.now_ms, _in_order(timers))
    counting = (task for due_ms, _, task in due if counts(task, due_ms))
    for task in islice(counting, DECISIONS_MAX):
        if task.id not in draft.touched:
            draft.touched.add(task.id)
            yield task


def _in_order(timers: list[Timer]) -> Iterator[Timer]:
    """The entries of a heap, sorted, without taking them off it."""
    places = [(timers[0][:2], 0)] if timers else []
    while places:
        _, place = heapq.heappop(places)
        yield timers[place]
        for child in range(2 * place + 1, min(2 * place + 3, len(timers))):
            heapq.heappush(places, (timers[child][:2], child))


def _quarantine(draft: _Draft) -> None:
    """Give up tasks that cost too many workers their lives."""
    losses_max = draft.state.policy.losses_max
    for task in draft.state.struck.values():
        if task.losses >= losses_max and task.state is State.READY and task.cancel is None:
            draft.touched.add(task.id)
            detail = f"{task.losses} workers were lost while they ran it"
            draft.say(TaskQuarantined(id=task.id, reason="losses", detail=detail), draft.state.leader)


def _answer(draft: _Draft) -> None:
    for answer in islice(draft.state.answers.values(), DECISIONS_MAX):
        draft.say(answer, draft.state.leader)


def _announce(draft: _Draft) -> None:
    for ended in islice(draft.state.announcements.values(), DECISIONS_MAX):
        counts = {str(key): count for key, count in ended.event.items()}
        draft.say(WorkflowCompleted(id=ended.id, state=str(ended.state), **counts), draft.state.leader)


def _wake_ms(state: Namespace, now_ms: int) -> int | None:
    heads = [timers[0][0] for timers in (state.backoffs, state.deadlines) if timers]
    if state.queue.size:
        heads += [until for until in _declines_end(state) if until > now_ms]
    return min(heads, default=None)


def _declines_end(state: Namespace) -> Iterator[int]:
    for line in state.queue.waiting.values():
        for task in islice(line.tasks(state.policy.ageing_per_s), LOOKAHEAD_MAX):
            if task.declined is None:
                break
            yield from task.declined.values()


# Placement ---------------------------------------------------------------------------


def _assign(draft: _Draft) -> None:
    """Serve the lines, the one with the best task first, until nothing more has room."""
    heap = _candidates(draft)
    left = DECISIONS_MAX
    while heap and left:
        candidate = heap[0][1]
        # While no other line can come first, the heap need not be asked again.
        limit = min((entry[0] for entry in heap[1:3]), default=None)
        left -= candidate.serve(draft, limit, left)
        if candidate.next is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (candidate.rank, candidate))


def _candidates(draft: _Draft) -> list[tuple[Rank, _Candidate]]:
    """A heap of the lines that some worker can serve."""
    state = draft.state
    rooms = _rooms(draft)
    turn = Turn(state.last_worker)
    heap: list[tuple[Rank, _Candidate]] = []
    for line in _open_lines(state):
        if line.demand.lock in draft.locks:
            continue
        fitting = [rooms[worker.name] for worker in line.eligible if worker.name in rooms]
        candidate = _Candidate(state, line, fitting, turn)
        if draft.watch is not None:
            candidate.strategy = draft.watch(line, fitting, candidate.strategy)
        heap.append((candidate.rank, candidate))
    heapq.heapify(heap)
    return heap


def _rooms(draft: _Draft) -> dict[str, Room]:
    workers = draft.state.workers.values()
    present = (worker for worker in workers if not worker.draining and worker.name not in draft.lost)
    return {worker.name: Room(worker, order) for order, worker in enumerate(present)}


def _open_lines(state: Namespace) -> list[Line]:
    """Lines that some worker can serve; the others are set aside until the workers change."""
    queue = state.queue
    queue.unpark(state.workers_version)
    found: list[Line] = []
    for line in list(queue.waiting.values()):
        if line.version != state.workers_version:
            present = (worker for worker in state.workers.values() if not worker.draining)
            line.eligible = [worker for worker in present if policies.eligible(line.demand, worker)]
            line.version = state.workers_version
        if line.eligible:
            found.append(line)
        else:
            queue.park(line)
    return found


class _Candidate:
    """A line on its way through one plan."""

    __slots__ = ("line", "next", "passed", "quick_us", "rank", "strategy", "tasks", "terms")

    def __init__(self, state: Namespace, line: Line, rooms: Sequence[Room], turn: Turn) -> None:
        self.line = line
        self.tasks = line.tasks(state.policy.ageing_per_s)
        first = next(self.tasks)
        self.next: Task | None = first
        """None: nothing more of the line can go anywhere."""
        self.rank = rank(first, state.policy.ageing_per_s)
        self.strategy: Strategy = policies.strategy(state.policy, rooms, line, turn)
        self.passed = 0
        self.terms = first.terms
        self.quick_us = state.quick_us(first)

    def serve(self, draft: _Draft, limit: Rank | None, left: int) -> int:
        """Place tasks while the next is before `limit`, at most `left`; how many were placed."""
        placed = 0
        ageing = draft.state.policy.ageing_per_s
        while self.next is not None and placed < left:
            placed += self._place(draft, self.next)
            if self.next is not None and limit is not None:
                self.rank = rank(self.next, ageing)
                if self.rank > limit:
                    break
        return placed

    def _place(self, draft: _Draft, task: Task) -> bool:
        """Place a task, if it can go anywhere, and go on to the next."""
        if self.line.demand.lock in draft.locks:
            self.next = None
            return False
        if task.id in draft.touched:
            self.next = next(self.tasks, None)
            return False
        if task.terms is not self.terms:
            self.terms = task.terms
            self.quick_us = draft.state.quick_us(task)
        room = self.strategy.pick(task, self.quick_us, draft.now_ms)
        if room is not None:
            room.take(self.line, self.quick_us)
            draft.say(_assignment(task, room.worker.incarnation), room.worker.name)
            if self.line.demand.lock:
                draft.locks.add(self.line.demand.lock)
        self.next = next(self.tasks, None) if room is not None or self._may_pass(task) else None
        return room is not None

    def _may_pass(self, task: Task) -> bool:
        """Whether those behind a task may go first: workers that declined it may take them."""
        self.passed += 1
        return task.declined is not None and self.passed < LOOKAHEAD_MAX


def _assignment(task: Task, incarnation: int) -> TaskAssigned:
    terms = task.terms
    if task.payload is None and task.node is None and terms.only_function:
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
        lock=terms.demand.lock,
    )


def _raw(text: bytes) -> Raw | UnsetType:
    return Raw(text) if text else UNSET


def _inputs(task: Task) -> dict[str, Input]:
    if task.node is None:
        return {}
    inputs: dict[str, Input] = {}
    room = INPUTS_BYTES_MAX
    for task_id in task.node.uses:
        source = task.node.workflow.tasks[task_id].node
        assert source is not None
        result = source.result
        assert result is not None
        if _fits(result, room):
            inputs[task_id] = Input(value=Raw(result.value))
            room -= len(result.value)
        else:
            inputs[task_id] = Input(seq=result.seq, index=result.index)
    return inputs


def _fits(result: Result, room: int) -> bool:
    return 0 < len(result.value) <= room and nesting(result.value) <= INPUT_DEPTH_MAX
