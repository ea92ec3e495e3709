"""What a history tells of tasks, workflows and workers: a row for each."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec import Raw, Struct, field

from agentflow.domain.life import State, WorkflowState
from agentflow.domain.state import Task, Worker
from agentflow.events import ObjectRef, Work
from agentflow.frames import decode_any
from agentflow.limits import LEVEL_FIRST

RUNS_SHOWN_MAX: Final = 200
"""Characters kept of what a task runs."""


class WorkerState(enum.StrEnum):
    """Where a worker's incarnation is."""

    ACTIVE = "active"
    DRAINING = "draining"
    LOST = "lost"
    LEFT = "left"


class Attempt(Struct):
    """One assignment of a task. Times are Unix milliseconds; 0: not yet, or not known."""

    number: int
    worker: str
    incarnation: int
    assigned_ms: int
    started_ms: int = 0
    """By the worker's clock."""
    ended_ms: int = 0
    run_us: int = 0
    outcome: str = ""
    """completed, failed, stopped, declined, lost or left; empty while it goes on."""
    error: str = ""
    """What kind of failure."""
    message: str = ""
    traceback: str = ""
    stdout: str = ""
    stderr: str = ""
    seq: int = 0
    """Position of the event that ended it."""
    index: int = 0

    @property
    def begun_ms(self) -> int:
        """When it started, or was assigned if no worker told; 0: before what the history knows."""
        return self.started_ms or self.assigned_ms

    def took_ms(self, now_ms: int) -> float | None:
        """How long it ran; None: its beginning is not known."""
        if self.run_us:
            return self.run_us / 1000
        return max(0, (self.ended_ms or now_ms) - self.begun_ms) if self.begun_ms else None


class TaskRow(Struct, kw_only=True):
    """What became of a task."""

    id: str
    task_id: str
    """Its name inside its workflow; otherwise its id."""
    workflow: str = ""
    title: str = ""
    runs_kind: str
    """function, shell or argv."""
    runs: str
    """The function's name, the script or the command, cut to RUNS_SHOWN_MAX."""
    client: str
    seq: int
    """Position of its submission."""
    index: int
    priority: int
    attempts_max: int
    dependencies: list[str] = []
    state: State
    submitted_ms: int
    """0: before what the history knows."""
    ready_ms: int = 0
    """When it first became ready."""
    due_ms: int = 0
    """End of its backoff, while it waits for one."""
    ended_ms: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    tries_before: int = 0
    """Attempts before these, from before what the history knows."""
    is_lacking: bool = False
    """Its submission is from before what the history knows: a title, say, is not in here."""
    result: Raw | None = None
    """The result, unless it is large: then it is at the last attempt's position."""
    object: ObjectRef | None = None
    error: str = ""
    """Why it failed or was skipped."""
    cancel_requested: bool = False
    cancel_reason: str = ""
    live: Task | None = None
    """The fold's own object, until the task ends."""

    @property
    def worker(self) -> str:
        """Where it runs or ran last."""
        return self.attempts[-1].worker if self.attempts else ""

    @property
    def tries(self) -> int:
        """Its attempts so far."""
        return self.tries_before + len(self.attempts)

    @property
    def started_ms(self) -> int:
        """When its first attempt started, or was assigned if no worker told; 0: never, or not known."""
        return self.attempts[0].begun_ms if self.attempts and not self.tries_before else 0

    def wait_ms(self, now_ms: int) -> int | None:
        """How long it waited for its first start once it was ready; None if it never was, or it is not known."""
        if not self.ready_ms or (self.tries and not self.started_ms):
            return None
        until = self.started_ms or self.ended_ms or now_ms
        return max(0, until - self.ready_ms)

    def run_ms(self, now_ms: int) -> float | None:
        """How long its last attempt ran; None if it never started, or it is not known."""
        return self.attempts[-1].took_ms(now_ms) if self.attempts else None


class WorkflowRow(Struct, kw_only=True):
    """What became of a workflow."""

    id: str
    name: str = ""
    description: str = ""
    client: str
    seq: int
    index: int
    state: WorkflowState = WorkflowState.RUNNING
    submitted_ms: int
    """0: before what the history knows."""
    ended_ms: int = 0
    tasks: dict[str, TaskRow]
    """By task_id, in the order given."""
    dependents: dict[str, list[str]]
    """task_id -> the task_ids that depend on it."""

    def took_ms(self, now_ms: int) -> int | None:
        """From its submission to its end, or to now; None: its submission is not known."""
        return (self.ended_ms or now_ms) - self.submitted_ms if self.submitted_ms else None

    def counts(self) -> dict[str, int]:
        """Tasks by state, in the order of a task's life; states nobody is in left out."""
        found = [row.state for row in self.tasks.values()]
        return {str(state): found.count(state) for state in State if state in found}


class WorkerRow(Struct, kw_only=True):
    """A worker's latest incarnation."""

    name: str
    incarnation: int
    state: WorkerState = WorkerState.ACTIVE
    slots: int
    group: str
    labels: dict[str, str]
    cpu: float
    memory_mb: int
    gpus: int
    functions: list[str]
    host: str
    pid: int
    """0: what it said when it joined is from before what the history knows."""
    is_lacking: bool = False
    """Whether that is so."""
    level: int = LEVEL_FIRST
    """The highest contract level it lets be used."""
    joined_ms: int
    ended_ms: int = 0
    reason: str = ""
    """Why it was given up for lost."""
    held: int = 0
    completed: int = 0
    failed: int = 0
    """These three as of the last `History.worker_rows`."""
    live: Worker | None = None


def runs_of(work: Work) -> tuple[str, str]:
    """What a task runs: the kind, and the function, script or command, shortened."""
    return _runs(work.function, work.shell, work.argv)


def runs_of_task(task: Task) -> tuple[str, str]:
    """As `runs_of`, out of what the fold keeps; a program with long arguments is left empty."""
    payload = task.payload
    argv = decode_any(payload.argv) if payload is not None and payload.argv else []
    return _runs(task.terms.function, task.terms.shell, argv)


def _runs(function: str, shell: str, argv: Sequence[Any]) -> tuple[str, str]:
    if function:
        return "function", function[:RUNS_SHOWN_MAX]
    if shell:
        return "shell", shell.strip()[:RUNS_SHOWN_MAX]
    return "argv", " ".join(map(str, argv))[:RUNS_SHOWN_MAX]


def dependents_of(rows: Iterable[TaskRow]) -> dict[str, list[str]]:
    """task_id -> the task_ids that depend on it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for dependency in row.dependencies:
            found.setdefault(dependency, []).append(row.task_id)
    return found
