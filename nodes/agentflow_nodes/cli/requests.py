"""`agentflow cancel` and `agentflow reprioritize`: wishes about what was submitted."""

from __future__ import annotations

from typing import Annotated

import typer

import agentflow
from agentflow_nodes.cli.errors import CliError, Exit, not_found, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import console, plain, print_json, state_text
from agentflow_nodes.cli.session import Target, client_logs, open_client, run, target

Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a task or workflow.", show_default=False)]


def cancel_command(
    wanted: Id,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept in the log.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended.")] = False,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask for a task or workflow to be stopped.

    What waits is taken out of the queue, what runs is stopped with all its children. With
    --wait the command ends when that is done.

    For example:

        agentflow cancel 0197a3c4-... --reason 'not needed'
        agentflow cancel release-7 --wait
    """
    run(
        _cancel(target(nats, namespace), wanted, reason, wait=wait, as_json=as_json),
        logs=client_logs(debug=debug),
    )


async def _cancel(where: Target, wanted: str, reason: str, *, wait: bool, as_json: bool) -> None:
    async with open_client(where) as client:
        await _require_open(client, wanted, "cancelled")
        await client.cancel(wanted, reason)
        state = (await client.task(wanted).outcome()).state if wait else "requested"
    if as_json:
        print_json(
            {"id": wanted, "cancel": "ended" if wait else "requested", "state": state if wait else None}
        )
    elif wait:
        console().print(plain(wanted), state_text(state))
    else:
        console().print(plain(f"{wanted}: cancel requested"))


def reprioritize_command(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="The id of a task.", show_default=False)],
    priority: Annotated[
        str,
        typer.Argument(
            metavar="PRIORITY", help="urgent, high, medium, low, or 0 to 1000.", show_default=False
        ),
    ],
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a waiting task another priority.

    For example:

        agentflow reprioritize 0197a3c4-... urgent
        agentflow reprioritize release-7/build 900
    """
    given = parse_priority(priority)
    run(_reprioritize(target(nats, namespace), wanted, given, as_json=as_json), logs=client_logs(debug=debug))


async def _reprioritize(where: Target, wanted: str, priority: int | str, *, as_json: bool) -> None:
    async with open_client(where) as client:
        state = await _require_open(client, wanted, "reprioritized")
        if state == "running":
            raise CliError(f"{wanted} is running: only a waiting task can be reprioritized", Exit.REJECTED)
        await client.reprioritize(wanted, priority)
    if as_json:
        print_json({"id": wanted, "priority": priority})
    else:
        console().print(plain(f"{wanted}: priority {priority}"))


def parse_priority(text: str) -> int | str:
    """A priority as the contract has it. Raises CliError."""
    from agentflow.limits import PRIORITIES, PRIORITY_MAX  # noqa: PLC0415 - beside its only use

    if text in PRIORITIES:
        return text
    if text.isdecimal() and int(text) <= PRIORITY_MAX:
        return int(text)
    raise usage(f"priority: expected 0 to {PRIORITY_MAX} or one of {', '.join(PRIORITIES)}; found {text!r}")


async def _require_open(client: agentflow.Client, wanted: str, done: str) -> str:
    """The state of a task or workflow that has not ended. Raises CliError otherwise."""
    state = (await client.status([wanted])).statuses[0].state
    if state == "unknown":
        raise not_found(f"no task or workflow is called {wanted!r}; 'agentflow tasks' lists them")
    if state in {"completed", "failed", "skipped", "cancelled"}:
        raise CliError(f"{wanted} is {state} already: it cannot be {done}", Exit.REJECTED)
    return state
