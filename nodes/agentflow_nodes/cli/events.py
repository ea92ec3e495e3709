"""`agentflow events`: the log, event by event."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.text import Text

from agentflow import ids, wire
from agentflow.client.watching import LoggedEvent, logged_events
from agentflow.events import KINDS, ROLES, EventRejected, Role
from agentflow.log.port import Identity, Log
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, moment, plain, print_json, say
from agentflow_nodes.cli.past import Archive, with_archive
from agentflow_nodes.cli.session import Target, client_logs, open_stores, run, target

_LIMIT: Final = 100
_SUMMARY_MAX: Final = 500
_STYLES: Final = {Role.CLIENT: "cyan", Role.LEADER: "magenta", Role.WORKER: "green"}
_ENDS: Final = {"task.failed": "red", "event.rejected": "red", "worker.lost": "red", "task.timed_out": "red"}

Filter = Callable[[LoggedEvent], bool]
Stretch = tuple[int | None, int]
"""After which position (None: the latest), and how many at most (0: all)."""


def events_command(  # noqa: PLR0913, PLR0917 - options
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens from now.")] = False,
    task: Annotated[
        str, typer.Option("--task", metavar="ID", help="Only what is about this task or workflow.")
    ] = "",
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", help="Only these, for example task.failed or task.*; repeatable.", show_default=False
        ),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option("--after", metavar="SEQ", min=0, help="Begin after this position.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=0, help="At most so many; 0: all.", show_default="the latest 100; following: all"
        ),
    ] = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the events of the log, or follow them.

    Without --after the latest are shown, with it the first ones after that position. With
    --follow everything from now on, or from --after on.

    For example:

        agentflow events --follow
        agentflow events --task release-7 --limit 0
        agentflow events --after 0 --kind 'task.*' --json | jq .event.id
    """
    where = target(nats, namespace)
    kinds = _kinds(kind or [])
    wanted = _filter(kinds, task)
    if follow:
        main = _follow(where, archive, kinds, wanted, (after, limit or 0), as_json=as_json)
    else:
        main = _show(where, archive, wanted, (after, _LIMIT if limit is None else limit), as_json=as_json)
    run(main, logs=client_logs(debug=debug))


def _kinds(given: list[str]) -> frozenset[str]:
    """The kinds named, patterns spelled out. Raises CliError."""
    found: set[str] = set()
    for each in given:
        entity, star = each.removesuffix("*"), each.endswith(".*")
        matching = {known for known in KINDS if known == each or (star and known.startswith(entity))}
        if not matching:
            raise usage(
                f"--kind: expected one of {', '.join(KINDS)}, or an entity like 'task.*'; found {each!r}"
            )
        found |= matching
    return frozenset(found)


def _filter(kinds: frozenset[str], task: str) -> Filter:
    return lambda logged: (not kinds or logged.kind in kinds) and (not task or is_about(logged, task))


def is_about(logged: LoggedEvent, wanted: str) -> bool:
    """Whether an event concerns a task or workflow; of a workflow's tasks also its submission."""
    if wanted == ids.derived(logged.seq, logged.index) and ROLES.get(logged.kind) is Role.CLIENT:
        return True
    event = logged.event
    if isinstance(event, EventRejected) and wanted == ids.derived(event.seq, event.index):
        return True
    about: str = getattr(event, "id", "") or getattr(event, "workflow", "")
    if not about and logged.bad is not None:
        about = logged.bad.id
    return about != "" and (
        about == wanted or ids.workflow_of(about) == wanted or about == ids.workflow_of(wanted)
    )


async def _show(
    where: Target, archive: str | None, wanted: Filter, stretch: Stretch, *, as_json: bool
) -> None:
    after, limit = stretch
    async with open_stores(where) as (live, _):
        log = await with_archive(live, archive)
        identity = await log.identity()
        _tell_beginning(identity, after, quiet=as_json)
        latest: deque[LoggedEvent] = deque(maxlen=limit or None)
        count = 0
        async for logged in _read(log, after or 0, identity):
            if not wanted(logged):
                continue
            if after is None and limit:
                latest.append(logged)
                continue
            _print(logged, identity, as_json=as_json)
            count += 1
            if limit and count >= limit:
                break
    for logged in latest:
        _print(logged, identity, as_json=as_json)


def _tell_beginning(identity: Identity, after: int | None, *, quiet: bool) -> None:
    """Tell people that what they ask for was trimmed."""
    if not quiet and identity.trimmed_seq > (after or 0):
        say(f"The log begins at position {identity.first_seq}: --archive DIR has what came before.", DIM)


async def _read(log: Log, after: int, identity: Identity) -> AsyncIterator[LoggedEvent]:
    after, until = max(after, identity.first_seq - 1), identity.last_seq
    if after >= until:
        return
    async for messages in log.follow(after):
        for message in messages:
            if message.seq > until:
                return
            for logged in logged_events(message):
                yield logged
        if messages[-1].seq >= until:
            return


async def _follow(
    where: Target,
    archive: str | None,
    kinds: frozenset[str],
    wanted: Filter,
    stretch: Stretch,
    *,
    as_json: bool,
) -> None:
    after, limit = stretch
    subjects = [wire.event(where.namespace, kind, "*") for kind in sorted(kinds)]
    count = 0
    async with open_stores(where) as (live, _):
        log = await with_archive(live, archive)
        identity = await log.identity()
        if after is not None:
            _tell_beginning(identity, after, quiet=as_json)
        begin = identity.last_seq if after is None else max(after, identity.first_seq - 1)
        async for messages in log.follow(begin, subjects=subjects):
            for logged in (each for message in messages for each in logged_events(message) if wanted(each)):
                _print(logged, identity, as_json=as_json)
                count += 1
                if limit and count >= limit:
                    return


def _print(logged: LoggedEvent, identity: Identity, *, as_json: bool) -> None:
    if as_json:
        print_json({**event_document(logged), "known_from": identity.first_seq})
    else:
        console().print(_line(logged), no_wrap=True, overflow="ellipsis")


def _line(logged: LoggedEvent) -> Text:
    role = ROLES.get(logged.kind)
    style = _ENDS.get(logged.kind) or (_STYLES[role] if role is not None else "red")
    line = Text(f"{moment(logged.time_ms)}  ", style=DIM)
    line.append(f"{logged.seq}.{logged.index:<5}", style=DIM)
    line.append_text(plain(f"{logged.kind:<20} ", style))
    line.append_text(plain(f"{logged.actor:<14} "))
    if logged.bad is not None:
        return line.append_text(plain(f"quarantined: {logged.bad.reason}: {logged.bad.detail}", "red"))
    return line.append_text(plain(_summary(logged), DIM))


def _summary(logged: LoggedEvent) -> str:
    """What an event says, on one line, its id first; what it leaves to its default is left out."""
    fields = _fields(logged)
    fields.pop("notify", None)
    first = str(fields.pop("id", "") or fields.pop("worker", ""))
    told = [f"{name}={_shown(value)}" for name, value in fields.items() if value not in _NOTHING]
    text = "  ".join([first, *told] if first else told)
    return text if len(text) <= _SUMMARY_MAX else text[: _SUMMARY_MAX - 1] + "…"


_NOTHING: Final[tuple[Any, ...]] = ("", 0.0, None, [], {})


def _fields(logged: LoggedEvent) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(logged.event))
    return decoded


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def event_document(logged: LoggedEvent) -> dict[str, Any]:
    """A logged event as JSON."""
    return {
        "seq": logged.seq,
        "index": logged.index,
        "time_ms": logged.time_ms,
        "kind": logged.kind,
        "actor": logged.actor,
        "event": None if logged.event is None else _fields(logged),
        "bad": None if logged.bad is None else msgspec.to_builtins(logged.bad),
        "decision": None if logged.decision is None else msgspec.to_builtins(logged.decision),
    }
