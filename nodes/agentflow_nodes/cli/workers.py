"""`agentflow workers`.

What a worker holds and has done is in the log; when it was last heard of, the masters know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import OperatingError
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import (
    DIM,
    console,
    duration,
    moment,
    plain,
    print_json,
    say,
    state_text,
    table,
)
from agentflow_nodes.cli.past import Archive, load, open_logged
from agentflow_nodes.cli.session import (
    CLIENT_NAME,
    REACH_TIMEOUT_S,
    Target,
    client_logs,
    now_ms,
    run,
    target,
)
from agentflow_nodes.master.liveness import SIGNS_SERVICE, Sign, decode_signs
from agentflow_projections.history_begun import fill_workers
from agentflow_projections.history_rows import WorkerRow, WorkerState

_GONE: Final = (WorkerState.LOST, WorkerState.LEFT)
_LATELY_MS: Final = 3_600_000
"""Workers that went this long ago are still listed."""
_ASK_S: Final = 1.0

Known = Mapping[tuple[str, int], Sign]
"""The last signs of life, by name and incarnation."""


def workers_command(
    everyone: Annotated[
        bool, typer.Option("--all", help="Also those that left or were lost more than an hour ago.")
    ] = False,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the workers: slots, load, what they have done.

    A worker is active, busy (all its slots are taken), draining (it takes nothing new),
    stalled (a task keeps it from saying anything) or offline (it left or was lost).

    For example:

        agentflow workers
        agentflow workers --all --json
    """
    main = _workers(target(nats, namespace), archive, everyone=everyone, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _workers(where: Target, archive: str | None, *, everyone: bool, as_json: bool) -> None:
    async with open_logged(where, archive, quiet=as_json or not everyone) as past:
        history = await load(past, keep=lambda _: False)
        await fill_workers(past, history.workers.values())
    known = await _signs(where)
    now, rows = now_ms(history), history.worker_rows()
    shown = [row for row in rows if everyone or row.state not in _GONE or now - row.ended_ms < _LATELY_MS]
    if as_json:
        for row in shown:
            print_json({**worker_document(row, known), "known_from": past.known_from})
        return
    if shown:
        console().print(_table(shown, known, now))
    else:
        gone = f"; {len(rows)} were here before (--all)" if rows else ""
        say(f"No worker is there{gone}: start one with 'agentflow worker'.", DIM)


async def _signs(where: Target) -> Known:
    """What the masters have heard; nothing if none answers."""
    try:
        async with Bus(where.urls, name=f"agentflow {CLIENT_NAME}", connect_timeout_s=REACH_TIMEOUT_S) as bus:
            return await signs(bus, where.namespace)
    except OperatingError:
        return {}


async def signs(bus: Bus, namespace: str) -> Known:
    """The workers' last signs of life, as a master heard them. Raises OperatingError if none answers."""
    answer = decode_signs(await bus.request(wire.service(namespace, SIGNS_SERVICE), b"", _ASK_S))
    return {(sign.worker, sign.incarnation): sign for sign in answer.signs}


def shown_state(row: WorkerRow, sign: Sign | None) -> str:
    """A worker's state as people are told it."""
    if row.state in _GONE:
        return "offline"
    if row.state is WorkerState.DRAINING:
        return "draining"
    if sign is not None and sign.stalled:
        return "stalled"
    return "busy" if row.held >= row.slots else "active"


def _load(row: WorkerRow) -> tuple[int, int]:
    """How much of what it holds runs, and how much waits for a slot."""
    running = min(row.held, row.slots)
    return running, row.held - running


def _table(rows: list[WorkerRow], known: Known, now: int) -> Table:
    numbers = ("slots", "running", "queued", "done", "failed", "level")
    made = table(
        "worker", "state", *numbers, "offers", "functions", "host", "since", "heard of", right=numbers
    )
    for row in rows:
        sign = known.get((row.name, row.incarnation))
        running, queued = _load(row)
        made.add_row(
            plain(row.name),
            _state(row, sign),
            str(row.slots),
            str(running),
            str(queued),
            str(row.completed),
            Text(str(row.failed), style="red" if row.failed else ""),
            str(row.level),
            plain(_offers(row)),
            str(len(row.functions)),
            plain(f"{row.host}:{row.pid or '?'}", DIM),
            moment(row.ended_ms or row.joined_ms),
            _heard_of(row, sign, now),
        )
    return made


def _state(row: WorkerRow, sign: Sign | None) -> Text:
    state = shown_state(row, sign)
    made = state_text(state)
    if state == "offline":
        made.append_text(plain(f" ({row.state})", DIM))
    return made


def _heard_of(row: WorkerRow, sign: Sign | None, now: int) -> str:
    if row.state in _GONE:
        return f"gone for {duration(now - row.ended_ms)}"
    return f"{duration(sign.age_ms)} ago" if sign is not None else ""


def _offers(row: WorkerRow) -> str:
    parts = [f"{row.cpu:g} cpu", f"{row.memory_mb} MiB"]
    parts += [f"{row.gpus} gpu"] if row.gpus else []
    parts += [f"group {row.group}"] if row.group else []
    parts += [f"{key}={value}" for key, value in sorted(row.labels.items())]
    return ", ".join(parts)


def worker_document(row: WorkerRow, known: Known) -> dict[str, Any]:
    """A worker as JSON."""
    sign = known.get((row.name, row.incarnation))
    running, queued = _load(row)
    return {
        "name": row.name,
        "incarnation": row.incarnation,
        "state": shown_state(row, sign),
        "ended": str(row.state) if row.state in _GONE else None,
        "slots": row.slots,
        "running": running,
        "queued": queued,
        "completed": row.completed,
        "failed": row.failed,
        "group": row.group,
        "labels": row.labels,
        "cpu": row.cpu,
        "memory_mb": row.memory_mb,
        "gpus": row.gpus,
        "functions": row.functions,
        "host": row.host,
        "pid": row.pid or None,
        "level": row.level,
        "joined_ms": row.joined_ms,
        "ended_ms": row.ended_ms or None,
        "reason": row.reason,
        "heartbeat_age_ms": sign.age_ms if sign is not None else None,
        "stalled": sign is not None and sign.stalled,
    }
