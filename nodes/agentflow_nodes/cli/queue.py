"""`agentflow queue`: what waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer
from msgspec import Struct
from rich.text import Text

from agentflow.domain.life import State
from agentflow.domain.policies import eligible
from agentflow.domain.queue import Demand, Line
from agentflow.domain.state import Namespace as Folded
from agentflow.limits import PRIORITIES
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, duration, plain, print_json, table
from agentflow_nodes.cli.past import load, open_logged
from agentflow_nodes.cli.session import Target, client_logs, now_ms, run, target

_NAMES: Final = {number: name for name, number in PRIORITIES.items()}
_HEAD: Final = 10


class Parked(Struct):
    """Tasks of equal demand that no worker can run."""

    demand: Demand
    count: int


class Waiting(Struct):
    """The queue in numbers."""

    by_priority: dict[int, int]
    oldest_ms: dict[int, int]
    """Log time at which the one that waits longest became ready, by priority."""
    parked: list[Parked]
    running: int
    pending: int
    slots: int
    workers: int


def queue_command(
    head: Annotated[int, typer.Option("--head", min=0, help="How many of the next tasks to name.")] = _HEAD,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what waits, how long, and what fits no worker.

    For example:

        agentflow queue
        agentflow queue --json | jq .ready
    """
    run(_queue(target(nats, namespace), head, as_json=as_json), logs=client_logs(debug=debug))


async def _queue(where: Target, head: int, *, as_json: bool) -> None:
    async with open_logged(where, quiet=True) as past:  # what waits is all in the state
        history = await load(past, keep=lambda _: False)
    state, now = history.state, now_ms(history)
    waiting = measure(state)
    if as_json:
        print_json(_document(state, waiting, head, now))
    else:
        _show(state, waiting, head, now)


def measure(state: Folded) -> Waiting:
    """The queue in numbers."""
    workers = [worker for worker in state.workers.values() if not worker.draining]
    pending = sum(task.state is State.PENDING for task in state.tasks.values())
    lines = list(state.queue.all_waiting())
    return Waiting(
        by_priority=dict(sorted(state.queue.depth_by_priority().items(), reverse=True)),
        oldest_ms=_oldest(lines),
        parked=list(_parked(state, lines)),
        running=state.running,
        pending=pending,
        slots=sum(worker.slots for worker in workers),
        workers=len(workers),
    )


def _oldest(lines: list[Line]) -> dict[int, int]:
    oldest: dict[int, int] = {}
    for line in lines:
        for priority, lane in line.lanes.items():
            first = min((task.ready_ms for task in lane), default=0)
            if first:
                oldest[priority] = min(first, oldest.get(priority, first))
    return oldest


def _parked(state: Folded, lines: list[Line]) -> Iterator[Parked]:
    workers = [worker for worker in state.workers.values() if not worker.draining]
    for line in lines:
        if not any(eligible(line.demand, worker) for worker in workers):
            yield Parked(line.demand, line.size)


def _show(state: Folded, waiting: Waiting, head: int, now: int) -> None:
    out = console()
    out.print(_summary(state, waiting))
    if not state.queue.size:
        return
    made = table("priority", "ready", "oldest waits", right=("ready", "oldest waits"))
    for priority, count in waiting.by_priority.items():
        oldest = now - waiting.oldest_ms.get(priority, now)
        name = f"{_NAMES[priority]} {priority}" if priority in _NAMES else str(priority)
        made.add_row(name, str(count), duration(oldest))
    out.print(Text(), made, sep="\n")
    if waiting.parked:
        out.print(Text(), Text("These fit no worker:", style="yellow"), sep="\n")
        for parked in waiting.parked:
            out.print(plain(f"  {parked.count} that need {_described(parked.demand)}"))
    _show_head(state, head, now)


def _summary(state: Folded, waiting: Waiting) -> Text:
    parked = sum(each.count for each in waiting.parked)
    parts = [
        Text(f"{state.queue.size} ready", style="yellow" if state.queue.size else DIM),
        Text(f"{waiting.running} running", style="cyan" if waiting.running else DIM),
        Text(f"{waiting.pending} pending", style=DIM),
    ]
    parts += [Text(f"{parked} fit no worker", style="red")] if parked else []
    line = Text(", ").join(parts)
    plural = "" if waiting.workers == 1 else "s"
    return line.append(f"; {waiting.workers} worker{plural} with {waiting.slots} slots", style=DIM)


def _show_head(state: Folded, head: int, now: int) -> None:
    tasks = state.queue.head(head, state.policy.ageing_per_s)
    if not tasks:
        return
    made = table("next", "priority", "waits", "runs", right=("priority", "waits"))
    for task in tasks:
        waits = duration(now - task.ready_ms)
        runs = task.terms.function or task.terms.shell.strip().partition("\n")[0] or "a program"
        made.add_row(plain(task.id), str(task.priority), waits, plain(runs, DIM))
    console().print(Text(), made, sep="\n")


def _described(demand: Demand) -> str:
    parts = [f"function {demand.function}"] if demand.function else []
    parts += [f"{demand.cpu:g} cpu"] if demand.cpu else []
    parts += [f"{demand.memory_mb} MiB"] if demand.memory_mb else []
    parts += [f"{demand.gpus} gpu"] if demand.gpus else []
    parts += [f"group {demand.group}"] if demand.group else []
    parts += [f"{key}={value}" for key, value in demand.labels]
    return ", ".join(parts) or "any worker"


def _document(state: Folded, waiting: Waiting, head: int, now: int) -> dict[str, Any]:
    return {
        "seq": state.seq,
        "ready": state.queue.size,
        "running": waiting.running,
        "pending": waiting.pending,
        "workers": waiting.workers,
        "slots": waiting.slots,
        "by_priority": [
            {
                "priority": priority,
                "ready": count,
                "oldest_wait_ms": now - waiting.oldest_ms.get(priority, now),
            }
            for priority, count in waiting.by_priority.items()
        ],
        "parked": [{"count": each.count, "needs": _described(each.demand)} for each in waiting.parked],
        "next": [
            {"id": task.id, "priority": task.priority, "wait_ms": now - task.ready_ms}
            for task in state.queue.head(head, state.policy.ageing_per_s)
        ],
    }
