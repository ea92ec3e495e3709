"""`agentflow drain`: a worker is to finish what it runs, and leave."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Final

import typer

import agentflow
from agentflow import wire
from agentflow.client.operating import drain_worker
from agentflow.errors import OperatingError
from agentflow.events import SINCE, WorkerDrainRequested, WorkerJoined, WorkerLeft, WorkerLost
from agentflow_nodes.cli.errors import CliError, Exit, not_found
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, plain, print_json, say
from agentflow_nodes.cli.past import load
from agentflow_nodes.cli.session import Target, client_logs, open_client, run, target
from agentflow_nodes.cli.workers import signs
from agentflow_projections.history import History
from agentflow_projections.history_rows import WorkerRow, WorkerState
from agentflow_projections.past import LoggedPast

_LEVEL: Final = SINCE[WorkerDrainRequested.kind]
_TELL_S: Final = 1.0


def drain_command(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="The worker's name.", show_default=False)],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has left.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept in the log.")] = "",
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a worker to take nothing new, finish what it runs, and end.

    What waits at the worker goes back to the queue at once; what runs may take as long as
    it takes. The worker's process then ends with status 0; 'agentflow up' does not start it
    again. SIGTERM to the process bounds the time (--drain-s).

    For example:

        agentflow drain worker-2 --wait --reason 'new kernel'
    """
    where = target(nats, namespace)
    run(_drain(where, worker, reason, wait=wait, as_json=as_json), logs=client_logs(debug=debug))


async def _drain(where: Target, name: str, reason: str, *, wait: bool, as_json: bool) -> None:
    async with open_client(where) as client:
        past = await LoggedPast.of(client.log, client.objects)
        row = _require_drainable(await load(past, keep=lambda _: False), name)
        seq = await drain_worker(client, name, reason)
        if wait:
            await _wait_left(client, row, seq, quiet=as_json)
    state = "left" if wait else "requested"
    if as_json:
        print_json({"worker": name, "incarnation": row.incarnation, "drain": state})
    else:
        console().print(plain(f"{name} has left" if wait else f"{name}: drain requested"))


def _require_drainable(history: History, name: str) -> WorkerRow:
    """The worker, if it is there and understands. Raises CliError."""
    row = history.workers.get(name)
    if row is None:
        raise not_found(f"no worker is called {name!r}; 'agentflow workers' lists them")
    if row.state in {WorkerState.LOST, WorkerState.LEFT}:
        how = "left" if row.state is WorkerState.LEFT else "was lost"
        raise not_found(f"worker {name!r} is not there: it {how}; 'agentflow workers' lists them")
    if min(row.level, history.state.level) < _LEVEL:
        raise CliError(
            f"worker {name!r} cannot be asked: that takes contract level {_LEVEL}, the worker knows {row.level}"
            f" and {history.state.level} is in force; send its process SIGTERM instead",
            Exit.REJECTED,
        )
    return row


async def _wait_left(client: agentflow.Client, row: WorkerRow, seq: int, *, quiet: bool) -> None:
    """Wait for the worker's end, telling now and then what it still runs. Raises CliError if it was lost."""
    telling = asyncio.create_task(_tell(client, row, quiet=quiet))
    subjects = [
        wire.event(client.namespace, WorkerLeft.kind, row.name),
        wire.event(client.namespace, WorkerJoined.kind, row.name),
        wire.event(client.namespace, WorkerLost.kind, "*"),
    ]
    try:
        async for logged in client.events(after=seq, subjects=subjects):
            match logged.event:
                case WorkerLeft(incarnation=incarnation) if incarnation == row.incarnation:
                    return
                case WorkerLost(incarnation=incarnation) if incarnation == row.incarnation:
                    raise CliError(f"{row.name} was lost before it had left", Exit.FAILED)
                case WorkerJoined():
                    raise CliError(f"another worker joined as {row.name}", Exit.FAILED)
                case _:
                    pass
    finally:
        telling.cancel()


async def _tell(client: agentflow.Client, row: WorkerRow, *, quiet: bool) -> None:
    told = -1
    while not quiet:
        with contextlib.suppress(OperatingError):
            sign = (await signs(client.bus, client.namespace)).get((row.name, row.incarnation))
            if sign is not None and sign.running != told:
                told = sign.running
                say(f"{row.name} still runs {told}", DIM)
        await asyncio.sleep(_TELL_S)
