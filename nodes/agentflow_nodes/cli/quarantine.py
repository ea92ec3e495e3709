"""`agentflow quarantine`: tasks given up because workers died of them.

Everything shown is read from the log. Handing one over again submits the same work under a
new id, with a title that says which task it comes from.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct, structs
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agentflow import ids
from agentflow.errors import ObjectMissing, Rejection
from agentflow.events import TaskAssigned, TaskQuarantined, TaskSubmitted, Work
from agentflow.limits import TEXT_LENGTH_MAX
from agentflow.objects.port import Objects
from agentflow_nodes.cli.errors import CliError, Exit, not_found, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, moment, plain, print_json, say, table
from agentflow_nodes.cli.past import Archive, load, open_both, open_logged
from agentflow_nodes.cli.session import CLIENT_NAME, Target, client_logs, run, target
from agentflow_nodes.cli.tasks import ended_before, shown_work
from agentflow_nodes.worker.materials import gather, submission
from agentflow_projections.history_begun import fill, work_of
from agentflow_projections.history_rows import TaskRow, WorkerState
from agentflow_projections.past import LoggedPast

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


def quarantine_command(  # noqa: PLR0913, PLR0917 - options
    action: Annotated[
        Action, typer.Argument(metavar="[ACTION]", help="list, show or requeue.")
    ] = Action.LIST,
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of tasks.", show_default=False)
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Requeue all that were not handed over again before.")
    ] = False,
    archive: Archive = None,
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
        work = _list(where, archive, as_json=as_json)
    elif action is Action.SHOW:
        work = _show(where, given[0], archive, as_json=as_json)
    else:
        work = _requeue(where, given, archive, as_json=as_json)
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


async def read(past: LoggedPast) -> dict[str, Quarantined]:
    """Every quarantined task the log tells of, by id, the latest last."""
    given_up, requeued = await _said(past)
    if not given_up:
        return {}
    keys = {ids.workflow_of(task_id) or task_id for task_id in given_up}
    history = await load(past, keep=keys.__contains__)
    await fill(past, (row for row in history.tasks.values() if row.id in given_up))
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


async def _said(past: LoggedPast) -> tuple[dict[str, tuple[TaskQuarantined, int]], dict[str, list[str]]]:
    """What was given up, and when; and what was handed over again, as what."""
    given_up: dict[str, tuple[TaskQuarantined, int]] = {}
    requeued: dict[str, list[str]] = {}
    wanted = (TaskQuarantined.kind, "*"), (TaskSubmitted.kind, CLIENT_NAME)
    async with aclosing(past.events(*wanted)) as events:
        async for logged in events:
            match logged.event:
                case TaskQuarantined() as event:
                    given_up[event.id] = (event, logged.time_ms)
                case TaskSubmitted(id=new, title=title) if origin := _FROM.search(title):
                    requeued.setdefault(origin[1], []).append(new)
                case _:
                    pass
    return given_up, requeued


async def _wanted(past: LoggedPast, given: Sequence[str]) -> list[Quarantined]:
    """These tasks. Raises CliError unless all of them are quarantined."""
    known = await read(past)
    missing = [task_id for task_id in given if task_id not in known]
    if missing:
        history = await load(past, keep={ids.workflow_of(each) or each for each in missing}.__contains__)
        for each in missing:
            row = history.tasks.get(each)
            if row is not None:
                raise CliError(
                    f"{each} is {row.state}, not quarantined: nothing was handed over", Exit.REJECTED
                )
            unknown = f"no task is called {each!r}; 'agentflow quarantine' lists those given up"
            raise not_found(ended_before(history, each) or unknown)
    return [known[task_id] for task_id in dict.fromkeys(given)]


async def _submitted(past: LoggedPast, found: Quarantined) -> Work:
    """What was submitted: as it lies in the log, or as the state has it that stands for what was trimmed.

    Raises ObjectMissing if neither has it.
    """
    row = found.row
    try:
        return await submission(past.log, found.id, row.seq, row.index, past.objects)
    except ObjectMissing:
        task = past.begin().tasks.get(found.id)
        if task is None or (task.payload is not None and task.payload.fetch):
            raise
        return work_of(task)


# Showing -----------------------------------------------------------------------------


async def _list(where: Target, archive: str | None, *, as_json: bool) -> None:
    async with open_logged(where, archive, quiet=as_json) as past:
        found = list((await read(past)).values())
    if as_json:
        for each in found:
            print_json({**document(each), "known_from": past.known_from})
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
            str(each.row.tries),
            plain(", ".join(dict.fromkeys(each.lost))),
            plain(shown_work(each.row), DIM),
            plain(", ".join(each.requeued_as)),
        )
    console().print(made)


async def _show(where: Target, wanted: str, archive: str | None, *, as_json: bool) -> None:
    async with open_logged(where, archive, quiet=as_json) as past:
        (found,) = await _wanted(past, [wanted])
        work = await _submitted(past, found)
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
        ("submitted", f"{moment(found.row.submitted_ms)} by {found.row.client}".lstrip()),
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
            moment(attempt.begun_ms),
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
        "submitted_ms": row.submitted_ms or None,
        "requeued_as": found.requeued_as,
        "attempts": [
            {
                "number": each.number,
                "worker": each.worker,
                "incarnation": each.incarnation,
                "outcome": each.outcome,
                "assigned_ms": each.assigned_ms or None,
                "started_ms": each.started_ms or None,
                "ended_ms": each.ended_ms or None,
            }
            for each in row.attempts
        ],
    }


# Handing over again ------------------------------------------------------------------


async def _requeue(where: Target, given: Sequence[str], archive: str | None, *, as_json: bool) -> None:
    async with open_both(where, archive, quiet=as_json) as (client, past):
        if given:
            found = await _wanted(past, given)
        else:
            found = [each for each in (await read(past)).values() if not each.requeued_as]
        # All are put together before the first is submitted: what cannot be stops the rest.
        again = [(each.id, await _again(past, client.objects, each)) for each in found]
        for old, work in again:
            new = (await client.submit_task(work)).id
            if as_json:
                print_json({"id": old, "requeued_as": new})
            else:
                console().print(plain(old), "→", plain(new))
    if not found and not as_json:
        say("No task is quarantined that was not handed over again before.", DIM)


async def _again(past: LoggedPast, objects: Objects, found: Quarantined) -> TaskSubmitted:
    """The same work as a task of its own. Raises CliError if it cannot be put together any more."""
    try:
        again = _as_task(await _submitted(past, found), found.id)
        if not found.row.workflow:
            return again
        given = await gather(past.log, objects, await _assignment(past, found.row))
    except (ObjectMissing, Rejection) as error:
        more = "; --archive DIR has what was trimmed" if past.known_from > 1 else ""
        raise CliError(f"{found.id} cannot be handed over again: {error}{more}", Exit.OPERATING) from error
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


async def _assignment(past: LoggedPast, row: TaskRow) -> TaskAssigned:
    """The last assignment of a task: it holds the results the task was given. Raises ObjectMissing."""
    workers = {attempt.worker for attempt in row.attempts}
    last = None
    async with aclosing(past.events(*((TaskAssigned.kind, worker) for worker in workers))) as events:
        async for logged in events:
            if isinstance(logged.event, TaskAssigned) and logged.event.id == row.id:
                last = logged.event
    if last is None:
        raise ObjectMissing(f"no assignment of {row.id} is in the log")
    return last
