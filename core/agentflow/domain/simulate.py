"""The same again, otherwise: a stretch of history under another policy, in simulated time.

Fold and plan are the real ones. Around them workers are simulated that run each task for as
long as it ran, and let it end as it ended. What came from outside comes again when it came.
What is assumed is in ASSUMPTIONS.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from msgspec import Raw, Struct
from msgspec.structs import asdict, replace

from agentflow import ids
from agentflow.domain.fold import fold
from agentflow.domain.life import State
from agentflow.domain.plan import plan
from agentflow.domain.recording import Figures, Journal, Outside, Ran, Recording
from agentflow.domain.state import Namespace, Task
from agentflow.events import (
    ROLES,
    Event,
    PolicyChanged,
    Role,
    TaskAssigned,
    TaskCompleted,
    TaskFailed,
    TaskReprioritized,
    TaskStarted,
    TaskStop,
    TaskSubmitted,
    WorkerDraining,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowSubmitted,
)
from agentflow.frames import Decision, Judged

ASSUMPTIONS: Final = (
    "a task runs as long as it ran then, wherever it runs; one that never ran takes the mean of its kind",
    "attempts fail as they failed then, in the same order; further ones end as the last one did",
    "deciding, sending and starting take no time",
    "clients ask for the same at the same times, and workers come and go when they did",
    "workers that are added are copies of the first one there is; those taken away are the last that joined",
)
_STARTED_US: Final = 100_000
"""Runs from this length on say that they began."""
_PLANS_MAX: Final = 10_000
"""More plans at one moment than this are a bug."""
_US: Final = 1_000
_ADDED: Final = "what-if"

Progress = Callable[[int, int], None]


class Change(Struct, frozen=True, kw_only=True):
    """What is otherwise. Patterns are a function, the id or name of a task, the id of a workflow, or "*"."""

    strategy: str = ""
    workers: int = 0
    """So many more, or fewer."""
    priorities: tuple[tuple[str, int], ...] = ()
    durations: tuple[tuple[str, float], ...] = ()
    """Factors."""


class _Worker(Struct):
    """What a simulated worker does."""

    slots: int
    running: set[str]
    waiting: deque[str]


class Simulation:
    """One simulated stretch. The state is its own and is changed."""

    def __init__(self, state: Namespace, recording: Recording, change: Change) -> None:
        self.state: Final = state
        self.journal: Final = Journal(state)
        self.journal.begin_ms = recording.journal.begin_ms
        self._recording = recording
        self._change = change
        self._means = recording.means()
        self._offset_ms = state.server_ms - state.clock_ms
        self._now_us = max(state.clock_ms, recording.journal.begin_ms) * _US
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._workers: dict[str, _Worker] = {}
        self._runs: dict[str, int] = {}
        """Runs begun, by task."""
        self._wakes: set[int] = set()
        self._removed = _last_workers(state, recording, -change.workers)
        self._to_add = max(0, change.workers)
        self.estimated = 0
        """Runs whose length is not known and was estimated."""
        self._steps: list[tuple[Task, State]] = []
        state.steps = self._steps

    def run(self, progress: Progress | None = None) -> Figures:
        """Let it happen."""
        self._begin()
        for outside in self._recording.outside:
            self._at(outside.time_ms * _US, partial(self._from_outside, outside))
        total = len(self._heap)
        self._lead()
        while self._heap:
            self._now_us = max(self._now_us, self._heap[0][0])
            while self._heap and self._heap[0][0] <= self._now_us:
                heapq.heappop(self._heap)[2]()
            self._lead()
            if progress is not None:
                progress(max(0, total - len(self._heap)), total)
        return self.journal.figures()

    # The beginning -----------------------------------------------------------------------

    def _begin(self) -> None:
        state = self.state
        self._set_strategy()
        for worker in list(state.workers.values()):
            running = [task.id for task in worker.held.values()]
            self._workers[worker.name] = _Worker(worker.slots, set(running), deque())
            for task_id in running:
                self._go_on(task_id, worker.name)
        for name in self._removed & set(state.workers):
            self._lose(name)
        if state.workers:
            self._add_workers(_joined(state))
        for task in list(state.tasks.values()):
            priority = _matching(self._change.priorities, task.id, task.terms.function)
            if priority is not None and task.state in {State.PENDING, State.READY}:
                self._say("what-if", TaskReprioritized(id=task.id, priority=priority))

    def _go_on(self, task: str, worker: str) -> None:
        """What ran already at the beginning ends when it ended."""
        runs = self._recording.runs.get(task)
        self._runs[task] = 1
        end_us = runs[0].end_ms * _US if runs else self._now_us + self._ran(task, 0).run_us
        attempt = self.state.tasks[task].attempt
        self._at(end_us, partial(self._end, task, attempt, worker, self._ran(task, 0)))

    def _set_strategy(self) -> None:
        if self._change.strategy:
            self.state.policy = replace(self.state.policy, strategy=self._change.strategy)

    def _add_workers(self, like: WorkerJoined) -> None:
        for number in range(1, self._to_add + 1):
            self._join(f"{_ADDED}-{number}", like)
        self._to_add = 0

    # From outside ------------------------------------------------------------------------

    def _from_outside(self, outside: Outside) -> None:
        event, actor = outside.event, outside.actor
        worker = event.worker if isinstance(event, WorkerLost) else actor
        match event:
            case WorkerJoined() | WorkerDraining() | WorkerLeft() | WorkerLost() if worker in self._removed:
                return
            case WorkerJoined():
                self._join(actor, event)
                self._add_workers(event)
            case WorkerLost():
                self._lose(worker)
            case WorkerDraining() | WorkerLeft():
                known = self.state.workers.get(actor)
                if known is not None:
                    self._say(actor, replace(event, incarnation=known.incarnation))
                if isinstance(event, WorkerLeft):
                    self._workers.pop(actor, None)
            case _:
                self._say(actor, self._changed(event))
        if isinstance(event, PolicyChanged):
            self._set_strategy()

    def _changed(self, event: Any) -> Any:
        """A submission with the priority it has now."""
        priorities = self._change.priorities
        if isinstance(event, TaskSubmitted):
            priority = _matching(priorities, event.id, event.function)
            return event if priority is None else replace(event, priority=priority)
        if isinstance(event, WorkflowSubmitted) and priorities:
            found = [
                (task, _matching(priorities, ids.in_workflow(event.id, task.task_id), task.function))
                for task in event.tasks
            ]
            tasks = [task if wanted is None else replace(task, priority=wanted) for task, wanted in found]
            return replace(event, tasks=tasks)
        return event

    def _join(self, name: str, event: WorkerJoined) -> None:
        self._workers[name] = _Worker(event.slots, set(), deque())
        self._say(name, event)

    def _lose(self, name: str) -> None:
        worker = self.state.workers.get(name)
        self._workers.pop(name, None)
        if worker is not None:
            self._say(
                self.state.leader, WorkerLost(worker=name, incarnation=worker.incarnation, reason="then")
            )

    # Leading -----------------------------------------------------------------------------

    def _lead(self) -> None:
        state = self.state
        for _ in range(_PLANS_MAX):
            if not state.epoch:
                return
            made = plan(state, self._now_us // _US)
            for (_kind, actor), decided in made.decisions.items():
                self._say(actor, *decided)
                for event in decided:
                    self._carry_out(event, actor)
            if not made:
                self._wake_at(made.wake_ms)
                return
        raise AssertionError(f"{_PLANS_MAX} plans at one moment: nothing comes of them")

    def _wake_at(self, wake_ms: int | None) -> None:
        if wake_ms is not None and wake_ms * _US > self._now_us and wake_ms not in self._wakes:
            self._wakes.add(wake_ms)
            self._at(wake_ms * _US, partial(self._wakes.discard, wake_ms))

    def _carry_out(self, event: Event, actor: str) -> None:
        worker = self._workers.get(actor)
        if worker is None:
            return
        if isinstance(event, TaskAssigned):
            if len(worker.running) < worker.slots:
                self._start(event.id, actor, worker)
            else:
                worker.waiting.append(event.id)
        elif isinstance(event, TaskStop):
            self._stop(event, actor, worker)

    # Workers -----------------------------------------------------------------------------

    def _start(self, task_id: str, name: str, worker: _Worker) -> None:
        worker.running.add(task_id)
        task = self.state.tasks[task_id]
        ran = self._ran(task_id, self._runs.get(task_id, 0))
        self._runs[task_id] = self._runs.get(task_id, 0) + 1
        factor = _matching(self._change.durations, task_id, task.terms.function)
        if factor is not None:
            ran = replace(ran, run_us=int(ran.run_us * factor))
        if task.suspect or ran.run_us >= _STARTED_US:
            assert task.worker is not None
            incarnation, now_ms = task.worker.incarnation, self._now_us // _US
            started = TaskStarted(
                id=task_id, attempt=task.attempt, incarnation=incarnation, started_at_ms=now_ms
            )
            self._say(name, started)
        self._at(self._now_us + ran.run_us, partial(self._end, task_id, task.attempt, name, ran))

    def _ran(self, task_id: str, number: int) -> Ran:
        """How a run goes: as it went, or as those of its kind did."""
        runs = self._recording.runs.get(task_id)
        if runs:
            return runs[min(number, len(runs) - 1)]
        self.estimated += 1
        run_key = self.state.tasks[task_id].terms.run_key
        known_us = self._means.get(run_key) or self.state.expectations.get(run_key) or self._means.get("", 0)
        return Ran(known_us)

    def _end(self, task_id: str, attempt: int, name: str, ran: Ran) -> None:
        task, worker = self._current(task_id, attempt, name)
        if task is None or worker is None or task_id not in worker.running:
            return
        self._report(task, name, ran, ran.run_us)
        self._free(task_id, name, worker)

    def _stop(self, event: TaskStop, name: str, worker: _Worker) -> None:
        task, _ = self._current(event.id, event.attempt, name)
        if task is None:
            return
        if event.id in worker.waiting:
            worker.waiting.remove(event.id)
        self._report(task, name, Ran(0, "stopped"), 0)
        self._free(event.id, name, worker)

    def _current(self, task_id: str, attempt: int, name: str) -> tuple[Task | None, _Worker | None]:
        """The task, if that attempt is still its current one and held there."""
        task, worker = self.state.tasks.get(task_id), self._workers.get(name)
        if task is None or task.attempt != attempt or task.worker is None or task.worker.name != name:
            return None, worker
        return task, worker

    def _report(self, task: Task, name: str, ran: Ran, run_us: int) -> None:
        assert task.worker is not None
        said: dict[str, Any] = {
            "id": task.id,
            "attempt": task.attempt,
            "incarnation": task.worker.incarnation,
            "run_us": run_us,
        }
        self.journal.ran(task.id, run_us, self._now_us // _US)
        if ran.error:
            self._say(name, TaskFailed(**said, error=ran.error, retryable=ran.retryable))
        else:
            self._say(name, TaskCompleted(**said, result=Raw(b"null")))

    def _free(self, task_id: str, name: str, worker: _Worker) -> None:
        """A slot is free: what waits at the worker is next."""
        worker.running.discard(task_id)
        while worker.waiting and len(worker.running) < worker.slots:
            following = worker.waiting.popleft()
            task = self.state.tasks.get(following)
            if task is not None and task.worker is not None and task.worker.name == name:
                self._start(following, name, worker)

    # Time and log ------------------------------------------------------------------------

    def _at(self, us: int, action: Callable[[], Any]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (us, self._order, action))

    def _say(self, actor: str, *said: Any) -> None:
        """Write to the simulated log, and fold it."""
        state = self.state
        kind = said[0].kind
        role = ROLES[kind]
        decision = None
        if role is Role.LEADER:
            decision = Decision(state.epoch, state.seq, self._now_us // _US, state.policy.version)
        judged = Judged(kind, actor, role, said, decision=decision)
        fold(state, state.seq + 1, (self._now_us + self._offset_ms * _US) * 1_000, judged)
        for task, to in self._steps:
            self.journal.step(task, to, state.clock_ms)
        self._steps.clear()
        state.ended.clear()
        if kind.startswith("worker."):
            self.journal.count_slots(state)


def _matching(wanted: tuple[tuple[str, Any], ...], task: str, function: str) -> Any:
    """What the first pattern that fits says; None: none fits."""
    workflow, _, name = task.partition(ids.TASK_SEPARATOR)
    known = {"*", task, workflow, name, function} - {""}
    return next((value for pattern, value in wanted if pattern in known), None)


def _last_workers(state: Namespace, recording: Recording, count: int) -> set[str]:
    """The names of the workers that joined last. Raises ValueError if there are not more than so many."""
    if count <= 0:
        return set()
    joins = [each.actor for each in recording.outside if isinstance(each.event, WorkerJoined)]
    names = list(dict.fromkeys([*state.workers, *joins]))
    if count >= len(names):
        raise ValueError(f"there were {len(names)} workers in that stretch: {count} cannot be taken away")
    return set(names[-count:])


def _joined(state: Namespace) -> WorkerJoined:
    """The first worker there is, as it would join."""
    worker = next(iter(state.workers.values()))
    known = asdict(worker)
    shared = {name: known[name] for name in WorkerJoined.__struct_fields__ if name in known}
    shared |= {"functions": sorted(worker.functions), "labels": dict(worker.labels)}
    return WorkerJoined(**shared, instance=_ADDED)
