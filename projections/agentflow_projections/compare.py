"""Two runs of a workflow, side by side: tasks of the same name, and what decided how long each run took."""

from __future__ import annotations

from msgspec import Struct

from agentflow_projections.history_rows import TaskRow, WorkflowRow


class Side(Struct, frozen=True, kw_only=True):
    """A task in one run. Times in milliseconds."""

    state: str
    attempts: int
    wait_ms: int | None
    """From ready to its first start; None: it was never ready."""
    run_ms: float | None
    """Of its last attempt; None: it never ran."""
    worker: str
    critical: bool
    """Whether it lies on the run's critical path."""
    error: str = ""


class Pair(Struct, frozen=True, kw_only=True):
    """Tasks of one name; None: that run has none."""

    task: str
    first: Side | None
    second: Side | None

    @property
    def same_state(self) -> bool:
        """Whether both runs have it, and it came to the same."""
        return self.first is not None and self.second is not None and self.first.state == self.second.state

    @property
    def longer_ms(self) -> float:
        """How much longer the second took, waiting and running; 0 if one of the two is not known."""
        if self.first is None or self.second is None:
            return 0.0
        return _took_ms(self.second) - _took_ms(self.first)


def _took_ms(side: Side) -> float:
    return (side.wait_ms or 0) + (side.run_ms or 0.0)


class Run(Struct, frozen=True, kw_only=True):
    """One run as a whole. Times in milliseconds."""

    id: str
    name: str
    state: str
    tasks: int
    attempts: int
    took_ms: int | None
    """From its submission to its end, or to now; None: its submission is not known."""
    waited_ms: int
    """All its tasks together."""
    ran_ms: float
    critical_path: list[str]
    """The tasks that decided when it ended: each one was the last that the next had to wait for."""


class Comparison(Struct, frozen=True, kw_only=True):
    """Two runs."""

    first: Run
    second: Run
    tasks: list[Pair]


def compare(first: WorkflowRow, second: WorkflowRow, now_ms: int) -> Comparison:
    """Compare two runs, as of log time `now_ms`."""
    paths = [critical_path(each) for each in (first, second)]
    names = list(dict.fromkeys([*first.tasks, *second.tasks]))
    pairs = [
        Pair(
            task=name,
            first=_side(first.tasks.get(name), paths[0], now_ms),
            second=_side(second.tasks.get(name), paths[1], now_ms),
        )
        for name in names
    ]
    return Comparison(first=_run(first, paths[0], now_ms), second=_run(second, paths[1], now_ms), tasks=pairs)


def critical_path(workflow: WorkflowRow) -> list[str]:
    """The chain of tasks that ended last, first to last; empty as long as none has ended."""
    ended = [row for row in workflow.tasks.values() if row.ended_ms and row.attempts]
    if not ended:
        return []
    path = [max(ended, key=_end)]
    while True:
        before = [workflow.tasks[name] for name in path[-1].dependencies]
        before = [row for row in before if row.ended_ms]
        if not before:
            return [row.task_id for row in reversed(path)]
        path.append(max(before, key=_end))


def _end(row: TaskRow) -> tuple[int, int, int]:
    """When it ended; events of one millisecond by their position."""
    last = row.attempts[-1] if row.attempts else None
    return row.ended_ms, last.seq if last is not None else 0, last.index if last is not None else 0


def _side(row: TaskRow | None, path: list[str], now_ms: int) -> Side | None:
    if row is None:
        return None
    return Side(
        state=str(row.state),
        attempts=row.tries,
        wait_ms=row.wait_ms(now_ms),
        run_ms=row.run_ms(now_ms),
        worker=row.worker,
        critical=row.task_id in path,
        error=row.error,
    )


def _run(workflow: WorkflowRow, path: list[str], now_ms: int) -> Run:
    rows = list(workflow.tasks.values())
    return Run(
        id=workflow.id,
        name=workflow.name,
        state=str(workflow.state),
        tasks=len(rows),
        attempts=sum(row.tries for row in rows),
        took_ms=workflow.took_ms(now_ms),
        waited_ms=sum(row.wait_ms(now_ms) or 0 for row in rows),
        ran_ms=round(sum(row.run_ms(now_ms) or 0.0 for row in rows), 3),
        critical_path=path,
    )
