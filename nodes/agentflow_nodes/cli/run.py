"""`agentflow run`: a workflow file, from its start to its end, before one's eyes."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import agentflow
from agentflow.domain.life import WorkflowState
from agentflow.ending import end_tasks
from agentflow_nodes.cli.board import Board, LiveBoard, PlainBoard, QuietBoard
from agentflow_nodes.cli.cluster import Cluster, ClusterConfig
from agentflow_nodes.cli.errors import CliError, Exit
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats, default_slots
from agentflow_nodes.cli.output import DIM, console, print_json, say
from agentflow_nodes.cli.session import Target, client_logs, open_client, run, target
from agentflow_nodes.cli.summary import finish, summary
from agentflow_nodes.cli.workflows import workflow_document
from agentflow_projections.history import History
from agentflow_projections.past import LoggedPast

_DRAIN_S: Final = 2.0
"""An interrupted run is over: what it runs gets no more time than this."""
_CAUGHT_UP_S: Final = 10.0


def run_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A workflow file, YAML or JSON.", show_default=False)
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Where the log is kept.", show_default="a temporary folder"),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=1, help="Tasks run at once.", show_default="twice the cores, 4 or more"),
    ] = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a workflow file and show how it goes.

    Without --nats everything it takes is started for it and stopped afterwards: a NATS server,
    a master, and a worker that has loaded the file's app. With --nats it runs on the workers
    that are there.

    Exits with 0 if the workflow completed, with 1 if it did not.

    For example:

        agentflow run release.yaml
        agentflow run release.yaml --data-dir .agentflow --json | jq .counts
    """
    where = target(nats, namespace)
    workflow = agentflow.load_workflow(file)
    main = _main(where, workflow, data_dir, slots or default_slots(), embedded=nats is None, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _main(
    where: Target,
    workflow: agentflow.WorkflowFile,
    data_dir: Path | None,
    slots: int,
    *,
    embedded: bool,
    as_json: bool,
) -> None:
    board: Board = QuietBoard() if as_json else LiveBoard() if console().is_terminal else PlainBoard()
    async with AsyncExitStack() as stack:
        with board:
            if embedded:
                apps = (workflow.app,) if workflow.app else ()
                folder = data_dir or Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="agentflow-"))
                )
                config = ClusterConfig(
                    data_dir=folder,
                    namespace=where.namespace,
                    slots=slots,
                    apps=apps,
                    drain_s=_DRAIN_S,
                    projector=False,  # nobody asks a cluster of one workflow for its history
                )
                cluster = await stack.enter_async_context(Cluster(config, board.note))
                where = Target(cluster.url, where.namespace)
            client = await stack.enter_async_context(open_client(where))
            past = await LoggedPast.of(client.log, client.objects)
            history, workflow_id = await _follow_to_end(client, past, workflow, board, embedded=embedded)
        row = history.workflows[workflow_id]
        results = await finish(client, past, row)
    if as_json:
        print_json({**workflow_document(row, history.now_ms), "results": results})
    else:
        console().print(summary(row, results))
    if row.state is not WorkflowState.COMPLETED:
        raise typer.Exit(Exit.FAILED)


async def _follow_to_end(
    client: agentflow.Client,
    past: LoggedPast,
    workflow: agentflow.WorkflowFile,
    board: Board,
    *,
    embedded: bool,
) -> tuple[History, str]:
    """Submit, and fold the log until the workflow has ended. Raises CliError if it is rejected."""
    board.phase("Submitting")
    handle = await client.submit_workflow(workflow)
    history = History(client.namespace, keep=lambda key: key == handle.id, begun=past.begin())
    following = asyncio.create_task(_fold_until_ended(past, history, handle.id, board))
    try:
        outcome = await _first(handle.outcome(), following)
        if outcome is not None and outcome.state == "rejected":
            raise CliError(f"{handle.id} was rejected: {outcome.error}: {outcome.message}", Exit.REJECTED)
        await asyncio.wait_for(following, _CAUGHT_UP_S)
    except asyncio.CancelledError:
        await _interrupted(handle, embedded=embedded)
        raise
    finally:
        await end_tasks(following)
    if history.workflows[handle.id].seq <= past.last_seq:
        board.note(f"{handle.id} ran before, this is what came of it: to run it again, give it another id")
    return history, handle.id


async def _first(outcome: Any, following: asyncio.Task[None]) -> Any:
    """The outcome, unless the log tells the end first."""
    waiting = asyncio.ensure_future(outcome)
    try:
        await asyncio.wait([waiting, following], return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()


async def _fold_until_ended(past: LoggedPast, history: History, workflow_id: str, board: Board) -> None:
    async with aclosing(past.messages(history.state.seq)) as following:
        async for messages in following:
            for message in messages:
                history.apply(message)
            row = history.workflows.get(workflow_id)
            if row is None:
                continue
            board.show(row, history.now_ms)
            if row.state is not WorkflowState.RUNNING:
                return


async def _interrupted(handle: agentflow.WorkflowHandle, *, embedded: bool) -> None:
    """Ctrl-C: our own cluster ends with us; on others the workflow goes on."""
    if not embedded:
        say(f"{handle.id} goes on; 'agentflow cancel {handle.id}' stops it")
        return
    say("Interrupted: what runs is stopped.", DIM)
    with contextlib.suppress(agentflow.AgentFlowError, TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            await handle.cancel("interrupted")
