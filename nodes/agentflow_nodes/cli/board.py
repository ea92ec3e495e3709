"""The view of a workflow under way: live on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from agentflow.domain.life import FINAL, State
from agentflow_nodes.cli.output import DIM, MARKS, STYLES, clean, console, duration, plain
from agentflow_nodes.cli.tasks import attempts_text, shown_error
from agentflow_projections.history_rows import TaskRow, WorkflowRow

_REFRESHES_PER_S: Final = 10
_BAR_WIDTH: Final = 32
_LINES_BESIDE: Final = 6
"""Lines of the view that are no tasks."""
_LINES_MIN: Final = 5


class Board(Protocol):
    """Shows a workflow under way. A context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def note(self, text: str) -> None:
        """Show a line about something beside the workflow."""

    def phase(self, text: str) -> None:
        """Show what happens before the workflow runs."""

    def show(self, row: WorkflowRow, now_ms: int) -> None:
        """Show the workflow as it is at log time `now_ms`."""


class QuietBoard:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def note(self, text: str) -> None:
        """Nothing."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def show(self, row: WorkflowRow, now_ms: int) -> None:
        """Nothing."""


class PlainBoard(QuietBoard):
    """A line for each change of a task: for pipes and build logs."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._begun = time.monotonic()

    def note(self, text: str) -> None:
        """A line."""
        self._print(Text(clean(text)))

    def show(self, row: WorkflowRow, now_ms: int) -> None:
        """A line for each task whose state is worth one."""
        for task in row.tasks.values():
            known = self._states.get(task.task_id)
            if task.state is not known:
                self._states[task.task_id] = task.state
                if task.state is State.RUNNING or task.state in FINAL:
                    self._print(_line(task, now_ms))

    def _print(self, line: Text) -> None:
        elapsed = f"{time.monotonic() - self._begun:7.1f} s  "
        console().print(Text.assemble(Text(elapsed, style=DIM), line))


def _line(task: TaskRow, now_ms: int) -> Text:
    line = Text(f"{MARKS[task.state]} {task.state:<10}", style=STYLES[task.state])
    line.append_text(plain(task.task_id, "bold"))
    if task.tries > 1:
        line.append(f"  attempt {attempts_text(task)}", style="yellow")
    if task.state in FINAL and task.attempts:
        line.append_text(plain(f"  {duration(task.run_ms(now_ms))} on {task.worker}", DIM))
    if task.error and task.state is not State.RUNNING:
        line.append_text(plain(f"  {shown_error(task)}", STYLES[task.state]))
    return line


class LiveBoard:
    """All tasks with their states, redrawn in place, with a bar below."""

    def __init__(self) -> None:
        self._row: WorkflowRow | None = None
        self._phase = "Starting"
        self._spinner = Spinner("dots", style="cyan")
        self._spinners: dict[str, Spinner] = {}
        self._behind_ms = 0.0
        self._live = Live(
            get_renderable=self._render,
            console=console(),
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """A line above the view."""
        self._live.console.print(plain(text, DIM))

    def phase(self, text: str) -> None:
        """What the view says until the workflow runs."""
        self._phase = text

    def show(self, row: WorkflowRow, now_ms: int) -> None:
        """Draw this from now on; what runs goes on counting."""
        self._row = row
        self._behind_ms = time.time() * 1000 - now_ms

    def _render(self) -> RenderableType:
        row = self._row
        if row is None:
            self._spinner.update(text=Text(self._phase, style=DIM))
            return self._spinner
        now_ms = int(time.time() * 1000 - self._behind_ms)
        done = sum(task.state in FINAL for task in row.tasks.values())
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=len(row.tasks), completed=done, width=_BAR_WIDTH, complete_style="green"),
            Text(f"{done}/{len(row.tasks)}"),
            plain(row.name or row.id, "bold"),
            Text(duration(now_ms - row.submitted_ms), style=DIM),
        )
        return Group(self._tasks(row, now_ms), Text(), bar)

    def _tasks(self, row: WorkflowRow, now_ms: int) -> Table:
        grid = Table.grid(padding=(0, 2))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        room = max(_LINES_MIN, console().height - _LINES_BESIDE)
        tasks = list(row.tasks.values())
        if len(tasks) > room:
            tasks = [task for task in tasks if task.state in {State.RUNNING, State.FAILED}][:room]
        for task in tasks:
            grid.add_row(self._mark(task), *_cells(task, now_ms))
        return grid

    def _mark(self, task: TaskRow) -> RenderableType:
        if task.state is not State.RUNNING:
            return Text(MARKS[task.state], style=STYLES[task.state])
        return self._spinners.setdefault(task.task_id, Spinner("dots", style="cyan"))


def _cells(task: TaskRow, now_ms: int) -> tuple[Text, Text, Text]:
    waiting = task.state in {State.PENDING, State.SKIPPED}
    name = plain(task.task_id, DIM if waiting else "")
    took = duration(task.run_ms(now_ms)) if task.attempts else ""
    if task.state is State.PENDING and task.due_ms:
        return name, Text(took, style=DIM), plain(f"again soon: {shown_error(task)}", "yellow")
    about = shown_error(task) if task.state in FINAL and task.error else task.title
    tries = f"attempt {attempts_text(task)}  " if task.tries > 1 else ""
    return name, Text(took, style=DIM), plain(tries + about, STYLES[task.state] if task.error else DIM)
