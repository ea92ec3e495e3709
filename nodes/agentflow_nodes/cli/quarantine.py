"""`agentflow quarantine`: tasks given up because workers died of them.

Everything shown is read from the log. Handing one over again submits the same work under a
new id, with a title that says which task it comes from.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct, structs
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import agentflow
from agentflow import ids, wire
from agentflow.client.watching import events
from agentflow.errors import ObjectMissing, Rejection
from agentflow.events import TaskAssigned, TaskQuarantined, TaskSubmitted, Work
from agentflow.limits import TEXT_LENGTH_MAX
from agentflow.log.port import Log
from agentflow_nodes.cli.errors import CliError, Exit, not_found, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, moment, plain, print_json, say, table
from agentflow_nodes.cli.session import (
    CLIENT_NAME,
    Target,
    client_logs,
    load,
    open_client,
    open_log,
    run,
    target,
)
from agentflow_nodes.cli.tasks import shown_work
from agentflow_nodes.worker.materials import gather, submission
from agentflow_projections.history import TaskRow, WorkerState

_FROM: Final = re.compile(r"\(requeued from ([^()]+)\)$")
"""What a title ends with that says which task the work comes from."""
_SHOWN_MAX: Final = 4_000


class Action(enum.StrEnum):
    """What to do about quarantined tasks."""

    LIST = "list"
    SHOW = "show"
    REQUEUE = "requeue"


class Quarantined(Struct, kw_only=True):
    """A task that was given up."""

    id: str
    reason: str
    detail: str
    at_ms: int
    row: TaskRow
    requeued_as: list[str] = []

    @property
    def lost(self) -> list[str]:
        """The workers that were lost with it, one for each attempt."""
        return [each.worker for each in self.row.attempts if each.outcome == WorkerState.LOST]


def quarantine_command(
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="list, show or requeue.")
    ] = Action.LIST,
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of tasks.", show_default=False)
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Requeue all that were not handed over again before.")
    ] = False,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show tasks given up for killing workers; hand them over again.

    A task that costs several workers their lives is given up, so that it does not cost more.
    'show' tells what it was and where it ran; 'requeue' submits the same work under a new id,
    once the reason is found. Of a task of a workflow the results it was given go along; the
    workflow itself stays as it ended.

    For example:

        agentflow quarantine
        agentflow quarantine show 0197a3c4-...
        agentflow quarantine requeue 0197a3c4-... release-7/build
    """
    given = wanted or []
    _check_usage(action, given, every=every)
    where = target(nats, namespace)
    if action is Action.LIST:
        work = _list(where, as_json=as_json)
    elif action is Action.SHOW:
        work = _show(where, given[0], as_json=as_json)
    else:
        work = _requeue(where, given, as_json=as_json)
    run(work, logs=client_logs(debug=debug))


def _check_usage(action: Action, given: Sequence[str], *, every: bool) -> None:
    if every and action is not Action.REQUEUE:
        raise usage("--all goes with 'requeue'")
    match action:
        case Action.LIST if given:
            raise usage(f"list takes no ids, found {given[0]!r}; did you mean 'show {given[0]}'?")
        case Action.SHOW if len(given) != 1:
            raise usage(f"show takes one id, found {len(given)}")
        case Action.REQUEUE if bool(given) is every:
            raise usage("requeue takes the ids of quarantined tasks, or --all")
        case _:
            pass


# Reading -----------------------------------------------------------------------------


async def read(log: Log) -> dict[str, Quarantined]:
    """Every quarantined task the log tells of, by id, the latest last."""
    given_up, requeued = await _said(log)
    if not given_up:
        return {}
    keys = {ids.workflow_of(task_id) or task_id for task_id in given_up}
    history = await load(log, keep=keys.__contains__)
    found = {}
    for task_id, (event, at_ms) in given_up.items():
        row = history.tasks.get(task_id)
        if row is not None and row.error.startswith("quarantined"):
            found[task_id] = Quarantined(
                id=task_id,
                reason=event.reason,
                detail=event.detail,
                at_ms=at_ms,
                row=row,
                requeued_as=requeued.get(task_id, []),
            )
    return found


async def _said(log: Log) -> tuple[dict[str, tuple[TaskQuarantined, int]], dict[str, list[str]]]:
    """What was given up, and when; and what was handed over again, as what."""
    given_up: dict[str, tuple[TaskQuarantined, int]] = {}
    requeued: dict[str, list[str]] = {}
    subjects = [
        wire.event(log.namespace, TaskQuarantined.kind, "*"),
        wire.event(log.namespace, TaskSubmitted.kind, CLIENT_NAME),
    ]
    identity = await log.identity()
    async for logged in events(log, after=identity.first_seq - 1, until=identity.last_seq, subjects=subjects):
        match logged.event:
            case TaskQuarantined() as event:
                given_up[event.id] = (event, logged.time_ms)
            case TaskSubmitted(id=new, title=title) if origin := _FROM.search(title):
                requeued.setdefault(origin[1], []).append(new)
            case _:
                pass
    return given_up, requeued


async def _wanted(log: Log, given: Sequence[str]) -> list[Quarantined]:
    """These tasks. Raises CliError unless all of them are quarantined."""
    known = await read(log)
    missing = [task_id for task_id in given if task_id not in known]
    if missing:
        history = await load(log, keep={ids.workflow_of(each) or each for each in missing}.__contains__)
        for each in missing:
            row = history.tasks.get(each)
            if row is None:
                raise not_found(f"no task is called {each!r}; 'agentflow quarantine' lists those given up")
            raise CliError(f"{each} is {row.state}, not quarantined: nothing was handed over", Exit.REJECTED)
    return [known[task_id] for task_id in dict.fromkeys(given)]


# Showing -----------------------------------------------------------------------------


async def _list(where: Target, *, as_json: bool) -> None:
    async with open_log(where) as log:
        found = list((await read(log)).values())
    if as_json:
        for each in found:
            print_json(document(each))
        return
    if not found:
        say("No task is quarantined.", DIM)
        return
    made = table("task", "when", "why", "tries", "workers lost", "runs", "requeued as", right=("tries",))
    for each in found:
        made.add_row(
            plain(each.id),
            moment(each.at_ms),
            plain(each.detail or each.reason),
            str(len(each.row.attempts)),
            plain(", ".join(dict.fromkeys(each.lost))),
            plain(shown_work(each.row), DIM),
            plain(", ".join(each.requeued_as)),
        )
    console().print(made)


async def _show(where: Target, wanted: str, *, as_json: bool) -> None:
    async with open_log(where) as log:
        (found,) = await _wanted(log, [wanted])
        work = await submission(log, found.id, found.row.seq, found.row.index)
    if as_json:
        print_json({**document(found), "submission": msgspec.to_builtins(work)})
        return
    console().print(_described(found, work))


def _described(found: Quarantined, work: Work) -> Group:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style=DIM)
    facts.add_column(overflow="fold")
    for name, value in (
        ("why", f"{found.reason}: {found.detail}"),
        ("when", moment(found.at_ms)),
        ("submitted", f"{moment(found.row.submitted_ms)} by {found.row.client}"),
        ("requeued as", ", ".join(found.requeued_as)),
    ):
        if value:
            facts.add_row(name, plain(value))
    body = msgspec.json.format(msgspec.json.encode(work), indent=2).decode()
    more = len(body) - _SHOWN_MAX
    body = body if more <= 0 else f"{body[:_SHOWN_MAX]}\n… {more} characters more; --json shows all"
    return Group(
        Text.assemble(Text("quarantined", style="red"), "  ", plain(found.id, "bold")),
        Padding(facts, (0, 0, 0, 2), expand=False),
        Text(),
        Padding(_attempts(found.row), (0, 0, 0, 2), expand=False),
        Text("\n  submission", style=DIM),
        Padding(plain(body, lines=True), (0, 0, 0, 4), expand=False),
    )


def _attempts(row: TaskRow) -> Table:
    made = table("attempt", "outcome", "worker", "incarnation", "began", "ended", right=("attempt",))
    for attempt in row.attempts:
        made.add_row(
            str(attempt.number),
            attempt.outcome,
            plain(attempt.worker),
            str(attempt.incarnation),
            moment(attempt.started_ms or attempt.assigned_ms),
            moment(attempt.ended_ms),
        )
    return made


def document(found: Quarantined) -> dict[str, Any]:
    """A quarantined task as JSON."""
    row = found.row
    return {
        "id": found.id,
        "at_ms": found.at_ms,
        "reason": found.reason,
        "detail": found.detail,
        "workers_lost": found.lost,
        "runs": {"kind": row.runs_kind, "what": row.runs},
        "title": row.title,
        "client": row.client,
        "submitted_ms": row.submitted_ms,
        "requeued_as": found.requeued_as,
        "attempts": [
            {
                "number": each.number,
                "worker": each.worker,
                "incarnation": each.incarnation,
                "outcome": each.outcome,
                "assigned_ms": each.assigned_ms,
                "started_ms": each.started_ms or None,
                "ended_ms": each.ended_ms or None,
            }
            for each in row.attempts
        ],
    }


# Handing over again ------------------------------------------------------------------


async def _requeue(where: Target, given: Sequence[str], *, as_json: bool) -> None:
    async with open_client(where) as client:
        if given:
            found = await _wanted(client.log, given)
        else:
            found = [each for each in (await read(client.log)).values() if not each.requeued_as]
        # All are put together before the first is submitted: what cannot be stops the rest.
        again = [(each.id, await _again(client, each)) for each in found]
        for old, work in again:
            new = (await client.submit_task(work)).id
            if as_json:
                print_json({"id": old, "requeued_as": new})
            else:
                console().print(plain(old), "→", plain(new))
    if not found and not as_json:
        say("No task is quarantined that was not handed over again before.", DIM)


async def _again(client: agentflow.Client, found: Quarantined) -> TaskSubmitted:
    """The same work as a task of its own. Raises CliError if it cannot be put together any more."""
    row = found.row
    try:
        work = await submission(client.log, found.id, row.seq, row.index, client.objects)
        again = _as_task(work, found.id)
        if not row.workflow:
            return again
        given = await gather(client.log, client.objects, await _assignment(client.log, row))
    except (ObjectMissing, Rejection) as error:
        raise CliError(f"{found.id} cannot be handed over again: {error}", Exit.OPERATING) from error
    return structs.replace(
        again,
        args=list(given.args),
        kwargs=dict(given.kwargs),
        argv=list(given.argv),
        env=dict(given.env),
        object=None,
    )


def _as_task(work: Work, origin: str) -> TaskSubmitted:
    shared: dict[str, Any] = {name: getattr(work, name) for name in Work.__struct_fields__}
    mark = f"(requeued from {origin})"
    room = TEXT_LENGTH_MAX - len(mark) - 1
    shared["title"] = f"{_FROM.sub('', work.title).rstrip()[:room]} {mark}".lstrip()
    return TaskSubmitted(**shared)


async def _assignment(log: Log, row: TaskRow) -> TaskAssigned:
    """The last assignment of a task: it holds the results the task was given. Raises ObjectMissing."""
    workers = {attempt.worker for attempt in row.attempts}
    subjects = [wire.event(log.namespace, TaskAssigned.kind, worker) for worker in workers]
    last = None
    until = (await log.identity()).last_seq
    async for logged in events(log, after=row.seq, until=until, subjects=subjects):
        if isinstance(logged.event, TaskAssigned) and logged.event.id == row.id:
            last = logged.event
    if last is None:
        raise ObjectMissing(f"no assignment of {row.id} is in the log")
    return last
