"""How a workflow went: the table at the end, what failed and why, what came out."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

import agentflow
from agentflow.domain.life import State
from agentflow_nodes.cli.output import DIM, STYLES, duration, plain, state_text
from agentflow_nodes.cli.tasks import complete, output_block, shown_error, task_table
from agentflow_projections.history_rows import TaskRow, WorkflowRow
from agentflow_projections.past import LoggedPast

ROWS_MAX: Final = 200
FAILURES_MAX: Final = 5
RESULTS_MAX: Final = 10
_TAIL_LINES: Final = 20
_RESULT_SHOWN_MAX: Final = 2_000


async def finish(client: agentflow.Client, past: LoggedPast, row: WorkflowRow) -> dict[str, Any]:
    """Read what the history keeps in part; the results of the tasks nothing depends on."""
    last = [task for task in row.tasks.values() if task.task_id not in row.dependents]
    failed = [task for task in row.tasks.values() if task.state is State.FAILED]
    for task in last[:RESULTS_MAX] + failed[:FAILURES_MAX]:
        await complete(past, task)
    results = {}
    for task in last[:RESULTS_MAX]:
        if task.object is not None:
            task.result = msgspec.Raw(await client.objects.get(task.object))
        if task.result is not None:
            results[task.task_id] = msgspec.json.decode(task.result)
    return results


def summary(row: WorkflowRow, results: dict[str, Any]) -> RenderableType:
    """Table, failures, results, and the last line."""
    rows = list(row.tasks.values())
    shown = rows if len(rows) <= ROWS_MAX else [task for task in rows if task.state is not State.COMPLETED]
    shown = shown[:ROWS_MAX]
    parts: list[RenderableType] = [task_table(shown, row.ended_ms, inside=True)] if shown else []
    if len(shown) < len(rows):
        parts.append(Text(f"{len(rows) - len(shown)} tasks more; 'agentflow tasks' lists them", style=DIM))
    failed = [task for task in rows if task.state is State.FAILED]
    for task in failed[:FAILURES_MAX]:
        parts += failure(task)
    if len(failed) > FAILURES_MAX:
        parts.append(Text(f"{len(failed) - FAILURES_MAX} more failed", style="red"))
    for task_id, value in results.items():
        parts += _result(task_id, value)
    return Group(*parts, Text(), headline(row, row.ended_ms))


def headline(row: WorkflowRow, now_ms: int) -> Text:
    """A workflow on one line: its state, name, time and how many tasks are in which state."""
    counts = Text(", ").join(
        Text(f"{count} {state}", style=STYLES[state]) for state, count in row.counts().items()
    )
    line = Text.assemble(state_text(row.state), "  ", plain(row.name or row.id, "bold"))
    if row.name:
        line.append_text(plain(f"  {row.id}", DIM))
    took = duration(row.took_ms(now_ms))
    line.append(f"  {took}  ", style=DIM)
    return line.append_text(counts)


def failure(task: TaskRow) -> list[RenderableType]:
    """Why a task failed, and the end of what its last attempt wrote."""
    line = Text.assemble(
        Text("✗ ", style="red"), plain(task.task_id, "bold"), plain(f"  {shown_error(task)}", "red")
    )
    parts: list[RenderableType] = [Text(), line]
    if task.attempts:
        last = task.attempts[-1]
        for name, text in (("stdout", last.stdout), ("stderr", last.stderr), ("traceback", last.traceback)):
            parts += output_block(name, "\n".join(text.rstrip().splitlines()[-_TAIL_LINES:]))
    return parts


def _result(task_id: str, value: Any) -> list[RenderableType]:
    if value is None:
        return []
    text = (
        value
        if isinstance(value, str)
        else msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    )
    more = len(text) - _RESULT_SHOWN_MAX
    text = text if more <= 0 else f"{text[:_RESULT_SHOWN_MAX]}\n… {more} characters more"
    return output_block(f"result of {task_id}", text)
