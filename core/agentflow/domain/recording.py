"""What happened in a stretch of history, taken apart: what came from outside, how long tasks ran, and figures.

From outside come submissions, requests, workers, elections; the rest (assignments, outcomes,
retries) follows from these, from the policy, and from how long each run took and how it ended.
That is what `agentflow.domain.simulate` needs to let it happen again otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from agentflow import ids
from agentflow.checks import Bad
from agentflow.domain.life import FINAL, State
from agentflow.domain.state import APPLIED, At, Namespace, Task, Verdict
from agentflow.events import (
    Event,
    LeaderElected,
    MasterJoined,
    MasterLeft,
    PolicyChanged,
    TaskCancelRequested,
    TaskCompleted,
    TaskFailed,
    TaskReprioritized,
    TaskSubmitted,
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

_FROM_OUTSIDE: Final = (
    TaskSubmitted,
    WorkflowSubmitted,
    TaskCancelRequested,
    WorkflowCancelRequested,
    TaskReprioritized,
    WorkerJoined,
    WorkerDraining,
    WorkerDrainRequested,
    WorkerLeft,
    WorkerLost,
    PolicyChanged,
    LeaderElected,
    MasterJoined,
    MasterLeft,
)


class Outside(Struct, frozen=True):
    """Something that came from outside."""

    time_ms: int
    """Log time."""
    actor: str
    event: Any


class Ran(Struct, frozen=True):
    """How one run of a task went."""

    run_us: int
    error: str = ""
    """Empty: it completed."""
    retryable: bool = True
    end_ms: int = 0
    """Log time at which it ended."""


class Figures(Struct, frozen=True, kw_only=True):
    """A stretch in numbers."""

    took_ms: int
    """From its beginning to the last end of a task."""
    ended: dict[str, int]
    """Tasks by the state in which they ended."""
    open: int
    """Tasks that had not ended."""
    wait_ms_mean: float
    """From ready to the first run."""
    wait_ms_p50: int
    wait_ms_p95: int
    wait_ms_max: int
    wait_ms_by_priority: dict[int, float]
    """Means."""
    utilisation: float
    """Share of the workers' slots that ran something, up to the last end."""


class _Life(Struct):
    """A task's times; 0: not yet."""

    priority: int
    ready_ms: int = 0
    begun_ms: int = 0
    ended_ms: int = 0
    state: State = State.PENDING


class Journal:
    """Keeps the times of tasks and the slots of workers, and makes figures of them."""

    def __init__(self, state: Namespace) -> None:
        self.begin_ms = 0
        """Log time of the first event of the stretch."""
        self.lives: Final[dict[str, _Life]] = {}
        self.busy_us = 0
        self._slots: Final[list[tuple[int, int]]] = []
        """Log time, and how many slots there were from then on."""
        for task in state.tasks.values():
            if task.state in {State.PENDING, State.READY}:
                self.lives[task.id] = _Life(task.priority, task.ready_ms)
        self.count_slots(state)

    def step(self, task: Task, to: State, now_ms: int) -> None:
        """A task came into another state."""
        life = self.lives.get(task.id)
        if life is None:
            life = self.lives[task.id] = _Life(task.priority)
        life.priority, life.state = task.priority, to
        if to is State.READY and not life.ready_ms:
            life.ready_ms = now_ms
        if to in FINAL:
            life.ended_ms = now_ms

    def ran(self, task: str, run_us: int, end_ms: int) -> None:
        """A run of a task ended."""
        self.busy_us += run_us
        life = self.lives.get(task)
        if life is not None and not life.begun_ms:
            life.begun_ms = max(life.ready_ms, end_ms - run_us // 1000)

    def count_slots(self, state: Namespace) -> None:
        """Workers came, went or began to drain."""
        slots = sum(worker.slots for worker in state.workers.values() if not worker.draining)
        self._slots.append((state.clock_ms, slots))

    def figures(self) -> Figures:
        """In numbers."""
        lives = list(self.lives.values())
        end_ms = max((life.ended_ms for life in lives), default=self.begin_ms)
        waits = sorted(life.begun_ms - life.ready_ms for life in lives if life.begun_ms and life.ready_ms)
        offered_ms = self._offered_ms(end_ms)
        return Figures(
            took_ms=max(0, end_ms - self.begin_ms),
            ended=_counts([life.state for life in lives if life.ended_ms]),
            open=sum(not life.ended_ms for life in lives),
            wait_ms_mean=_mean(waits),
            wait_ms_p50=_at(waits, 0.5),
            wait_ms_p95=_at(waits, 0.95),
            wait_ms_max=waits[-1] if waits else 0,
            wait_ms_by_priority=_by_priority(lives),
            utilisation=round(min(1.0, self.busy_us / 1000 / offered_ms), 4) if offered_ms else 0.0,
        )

    def _offered_ms(self, end_ms: int) -> int:
        ends = [time_ms for time_ms, _ in self._slots[1:]] + [end_ms]
        return sum(
            slots * max(0, min(until_ms, end_ms) - max(from_ms, self.begin_ms))
            for (from_ms, slots), until_ms in zip(self._slots, ends, strict=True)
        )


def _counts(states: Sequence[State]) -> dict[str, int]:
    return {str(state): states.count(state) for state in State if state in states}


def _mean(values: Sequence[int]) -> float:
    return round(sum(values) / len(values), 1) if values else 0.0


def _at(values: Sequence[int], share: float) -> int:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def _by_priority(lives: Sequence[_Life]) -> dict[int, float]:
    found: dict[int, list[int]] = {}
    for life in lives:
        if life.begun_ms and life.ready_ms:
            found.setdefault(life.priority, []).append(life.begun_ms - life.ready_ms)
    return {priority: _mean(waits) for priority, waits in sorted(found.items(), reverse=True)}


class Recording:
    """Told by the fold of each event of the stretch (`observe`), from the state before it on."""

    def __init__(self, state: Namespace) -> None:
        self.outside: Final[list[Outside]] = []
        self.runs: Final[dict[str, list[Ran]]] = {}
        """By task, in order."""
        self.run_keys: Final[dict[str, str]] = {}
        """Under which name run times are learnt, by task that ran."""
        self.journal: Final = Journal(state)
        self.end_ms = state.clock_ms
        self._state = state
        self._assigned_ms: dict[str, int] = {task.id: state.clock_ms for task in state.tasks.values()}
        self._parts: list[WorkflowTask] = [task for _, part in state.parts for task in part.tasks]
        self._steps: list[tuple[Task, State]] = []
        state.steps = self._steps

    def observe(self, at: At, event: Event | Bad, verdict: Verdict) -> None:
        """An event was folded."""
        state, steps = self._state, self._steps
        self.end_ms = now_ms = state.clock_ms
        self.journal.begin_ms = self.journal.begin_ms or now_ms
        if verdict is APPLIED:
            for task, to in steps:
                self.journal.step(task, to, now_ms)
                if to is State.RUNNING:
                    self._assigned_ms[task.id] = now_ms
            if isinstance(event, TaskCompleted | TaskFailed):
                self._ran(event, steps[0][0], now_ms)
            elif isinstance(event, WorkflowPart):
                self._parts += event.tasks
            elif isinstance(event, _FROM_OUTSIDE):
                self.outside.append(Outside(now_ms, at.actor, self._named(event, at)))
                self.journal.count_slots(state)
        steps.clear()

    def _named(self, event: Any, at: At) -> Any:
        """A submission under the id that it got, and whole: in another log it would get another one."""
        if isinstance(event, TaskSubmitted):
            return replace(event, id=event.id or ids.derived(at.seq, at.index), notify="")
        if isinstance(event, WorkflowSubmitted):
            tasks, self._parts = [*self._parts, *event.tasks], []
            name = event.id or ids.derived(at.seq, at.index)
            return replace(event, id=name, tasks=tasks, parts=0, notify="")
        return event

    def _ran(self, event: TaskCompleted | TaskFailed, task: Task, now_ms: int) -> None:
        run_us = event.run_us or max(0, now_ms - self._assigned_ms.get(event.id, now_ms)) * 1000
        self.journal.ran(event.id, run_us, now_ms)
        ran = Ran(run_us, end_ms=now_ms)
        if isinstance(event, TaskFailed):
            if event.error == "stopped":
                return
            ran = Ran(run_us, event.error, event.retryable, now_ms)
        self.run_keys[event.id] = task.terms.run_key
        self.runs.setdefault(event.id, []).append(ran)

    def means(self) -> Mapping[str, int]:
        """Mean run time in microseconds by the name it is learnt under; "": of all."""
        found: dict[str, list[int]] = {"": []}
        for task, runs in self.runs.items():
            times = [run.run_us for run in runs]
            found[""] += times
            found.setdefault(self.run_keys[task], []).extend(times)
        return {key: sum(times) // len(times) for key, times in found.items() if times}
