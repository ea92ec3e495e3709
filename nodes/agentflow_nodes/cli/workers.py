"""`agentflow workers`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, duration, plain, print_json, say, state_text, table
from agentflow_nodes.cli.session import Target, client_logs, load, now_ms, open_log, run, target
from agentflow_projections.history import WorkerRow, WorkerState

_GONE = (WorkerState.LOST, WorkerState.LEFT)


def workers_command(
    everyone: Annotated[bool, typer.Option("--all", help="Also those that left or were lost.")] = False,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the workers: slots, load, what they have done.

    For example:

        agentflow workers
        agentflow workers --all --json
    """
    run(_workers(target(nats, namespace), everyone=everyone, as_json=as_json), logs=client_logs(debug=debug))


async def _workers(where: Target, *, everyone: bool, as_json: bool) -> None:
    async with open_log(where) as log:
        history = await load(log, keep=lambda _: False)
    rows = history.worker_rows()
    shown = rows if everyone else [row for row in rows if row.state not in _GONE]
    if as_json:
        for row in shown:
            print_json(worker_document(row))
        return
    if shown:
        console().print(_table(shown, now_ms(history)))
    else:
        gone = f"; {len(rows)} were here before (--all)" if rows else ""
        say(f"No worker is there{gone}: start one with 'agentflow worker'.", DIM)


def _table(rows: list[WorkerRow], now_ms: int) -> Table:
    numbers = ("slots", "held", "done", "failed")
    made = table("worker", "state", *numbers, "offers", "functions", "host", "for", right=numbers)
    for row in rows:
        made.add_row(
            plain(row.name),
            state_text(row.state),
            str(row.slots),
            str(row.held),
            str(row.completed),
            Text(str(row.failed), style="red" if row.failed else ""),
            plain(_offers(row)),
            str(len(row.functions)),
            plain(f"{row.host}:{row.pid}", DIM),
            duration((row.ended_ms or now_ms) - row.joined_ms),
        )
    return made


def _offers(row: WorkerRow) -> str:
    parts = [f"{row.cpu:g} cpu", f"{row.memory_mb} MiB"]
    parts += [f"{row.gpus} gpu"] if row.gpus else []
    parts += [f"group {row.group}"] if row.group else []
    parts += [f"{key}={value}" for key, value in sorted(row.labels.items())]
    return ", ".join(parts)


def worker_document(row: WorkerRow) -> dict[str, Any]:
    """A worker as JSON."""
    return {
        "name": row.name,
        "incarnation": row.incarnation,
        "state": str(row.state),
        "slots": row.slots,
        "held": row.held,
        "completed": row.completed,
        "failed": row.failed,
        "group": row.group,
        "labels": row.labels,
        "cpu": row.cpu,
        "memory_mb": row.memory_mb,
        "gpus": row.gpus,
        "functions": row.functions,
        "host": row.host,
        "pid": row.pid,
        "joined_ms": row.joined_ms,
        "ended_ms": row.ended_ms or None,
        "reason": row.reason,
    }
