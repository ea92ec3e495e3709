"""`agentflow workflow`: one workflow as a tree."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from agentflow.domain import dag
from agentflow_nodes.cli.errors import not_found
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, duration, plain, print_json, state_text
from agentflow_nodes.cli.past import Archive, load, open_logged
from agentflow_nodes.cli.session import Target, client_logs, now_ms, run, target
from agentflow_nodes.cli.summary import headline
from agentflow_nodes.cli.tasks import attempts_text, ended_before, shown_error, task_document
from agentflow_projections.history import History
from agentflow_projections.history_begun import fill_workflow
from agentflow_projections.history_rows import TaskRow, WorkflowRow


def workflow_command(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="The workflow's id.", show_default=False)],
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show one workflow as a tree of its tasks.

    A task hangs below the dependency it waits for longest; others are named beside it.

    For example:

        agentflow workflow release-7
        agentflow workflow release-7 --json | jq .counts
    """
    main = _workflow(target(nats, namespace), wanted, archive, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _workflow(where: Target, wanted: str, archive: str | None, *, as_json: bool) -> None:
    async with open_logged(where, archive, quiet=as_json) as past:
        history = await load(past, keep=lambda key: key == wanted)
        row = history.workflows.get(wanted)
        if row is None:
            raise not_found(_unknown(history, wanted))
        await fill_workflow(past, row)
    if as_json:
        print_json({**workflow_document(row, now_ms(history)), "known_from": past.known_from})
    else:
        console().print(workflow_tree(row, now_ms(history)))


def _unknown(history: History, wanted: str) -> str:
    if wanted in history.tasks:
        return f"{wanted!r} is a task: see 'agentflow task {wanted}'"
    return ended_before(history, wanted) or f"no workflow is called {wanted!r}"


def workflow_tree(row: WorkflowRow, now_ms: int) -> Tree:
    """The workflow's tasks, each below the last of its dependencies."""
    graph = {task_id: task.dependencies for task_id, task in row.tasks.items()}
    root = Tree(headline(row, now_ms), guide_style=DIM)
    branches: dict[str, Tree] = {}
    level: dict[str, int] = {}
    for task_id in dag.execution_order(graph):
        parents = graph[task_id]
        level[task_id] = 1 + max((level[parent] for parent in parents), default=-1)
        above = max(parents, key=level.__getitem__, default=None)
        stem = root if above is None else branches[above]
        others = [parent for parent in parents if parent != above]
        branches[task_id] = stem.add(_leaf(row.tasks[task_id], others, now_ms))
    return root


def _leaf(row: TaskRow, others: list[str], now_ms: int) -> Text:
    line = Text.assemble(state_text(row.state), "  ", plain(row.task_id, "bold"))
    if row.title:
        line.append_text(plain(f"  {row.title}"))
    if row.attempts:
        line.append_text(plain(f"  {duration(row.run_ms(now_ms))} on {row.worker}", DIM))
    if row.tries > 1:
        line.append(f"  attempt {attempts_text(row)}", style="yellow")
    if others:
        line.append_text(plain(f"  after {', '.join(others)} too", DIM))
    if row.error:
        line.append_text(plain(f"  {shown_error(row)}", "red" if row.state == "failed" else DIM))
    return line


def workflow_document(row: WorkflowRow, now_ms: int) -> dict[str, Any]:
    """A workflow as JSON."""
    return {
        "id": row.id,
        "name": row.name,
        "description": row.description,
        "state": str(row.state),
        "client": row.client,
        "position": [row.seq, row.index],
        "submitted_ms": row.submitted_ms or None,
        "ended_ms": row.ended_ms or None,
        "counts": row.counts(),
        "tasks": [task_document(task, now_ms) for task in row.tasks.values()],
    }
