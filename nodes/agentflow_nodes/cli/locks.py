"""`agentflow lock` and `agentflow locks`: run a command under a lock, and see who holds what."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
import psutil
import typer
from msgspec import Struct

import agentflow
from agentflow.errors import LockLost, LockTimeout
from agentflow.events import LockAcquired, LockReleased
from agentflow.events import LockLost as Lost
from agentflow_nodes.cli.errors import CliError, Exit, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats, parse_labels
from agentflow_nodes.cli.output import DIM, console, duration, moment, plain, print_json, say, table
from agentflow_nodes.cli.past import Archive, open_logged
from agentflow_nodes.cli.session import Target, client_logs, open_client, run, target
from agentflow_nodes.orphans import end_with
from agentflow_projections.past import LoggedPast

_GRACE_S: Final = 5.0
"""How long a command may take to end after SIGTERM, before it is killed."""
_ON_LOST: Final = ("kill", "warn")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126


def lock_command(  # noqa: PLR0913, PLR0917 - options
    name: Annotated[str, typer.Argument(metavar="NAME", help="Any text.", show_default=False)],
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND", help="What to run under the lock.", show_default=False),
    ],
    wait_s: Annotated[
        float | None,
        typer.Option(
            "--wait-s", min=0, help="Wait in line for at most so long; 0: not at all. Default: for ever."
        ),
    ] = None,
    ttl_s: Annotated[
        int, typer.Option("--ttl-s", min=1, help="So long after our death others may have it, seconds.")
    ] = 10,
    shared: Annotated[bool, typer.Option("--shared", help="Beside other shared holders.")] = False,
    permits: Annotated[
        int, typer.Option("--permits", min=0, help="A semaphore with room for so many holders.")
    ] = 0,
    on_lost: Annotated[
        str, typer.Option("--on-lost", help="What to do with the command if the lock is lost: kill or warn.")
    ] = "kill",
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Shown by 'agentflow locks'.")
    ] = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a command while holding a lock.

    The command finds the lock's fencing token in AGENTFLOW_LOCK_TOKEN: later holders have a
    higher one. It ends with the command's status; with 7 if the lock was not free in time or
    was lost.

    For example:

        agentflow lock nightly-report -- ./report.sh
        agentflow lock db-migrate --wait-s 30 -- alembic upgrade head
        agentflow lock licence --permits 3 -- ./simulate
    """
    if on_lost not in _ON_LOST:
        raise usage(f"--on-lost: expected {' or '.join(_ON_LOST)}, found {on_lost!r}")
    if shared and permits:
        raise usage("--shared and --permits: expected one of them")
    mode: Literal["exclusive", "shared", "semaphore"] = (
        "shared" if shared else "semaphore" if permits else "exclusive"
    )
    options: dict[str, Any] = {
        "wait_s": wait_s,
        "ttl_s": ttl_s,
        "mode": mode,
        "permits": permits or 1,
        "metadata": parse_labels(metadata or []),
    }
    status = run(
        _lock(target(nats, namespace), name, command, on_lost, options, as_json=as_json),
        logs=client_logs(debug=debug),
    )
    raise typer.Exit(status)


async def _lock(
    where: Target, name: str, command: list[str], on_lost: str, options: dict[str, Any], *, as_json: bool
) -> int:
    async with open_client(where) as client:
        lock = client.lock(name, on_lost="warn", **options)
        try:
            held = await lock.acquire(options["wait_s"])
        except LockTimeout as error:
            raise CliError(str(error), Exit.LOCK) from error
        try:
            environment = {
                **os.environ,
                "AGENTFLOW_LOCK": name,
                "AGENTFLOW_LOCK_TOKEN": str(held.token),
            }
            status, lost = await _run(command, environment, held.lost, kill=on_lost == "kill")
        finally:
            try:
                await lock.release()
            except LockLost as error:
                why = str(error)
            else:
                why = ""
    if as_json:
        print_json({"lock": name, "token": held.token, "status": status, "lost": bool(why)})
    if why or lost:
        verb = "was killed" if on_lost == "kill" else "ran on"
        raise CliError(f"{why or 'the lock was lost'}; the command {verb} (status {status})", Exit.LOCK)
    return status


async def _run(
    command: list[str], environment: dict[str, str], lost: asyncio.Event, *, kill: bool
) -> tuple[int, bool]:
    """Run a command to its end; its status as a shell tells it, and whether the lock was lost meanwhile."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            # If we are killed, nobody renews its lock.
            preexec_fn=partial(end_with, os.getpid()) if kill else None,
        )
    except OSError as error:
        say(f"error: {command[0]}: {error.strerror}", "red")
        return (_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE), False
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _pass_on, process, number)
    ended = asyncio.ensure_future(process.wait())
    losing = asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait([ended, losing], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            say("the lock was lost: " + ("the command is ended" if kill else "the command goes on"), "red")
            if kill:
                await _end(process)
        status = await ended
    finally:
        losing.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return (status if status >= 0 else 128 - status), lost.is_set()


def _pass_on(process: Process, number: int) -> None:
    """At a terminal Ctrl-C reaches the command by itself; what was sent to us alone does not."""
    if process.returncode is None and not (number == signal.SIGINT and sys.stdin.isatty()):
        process.send_signal(number)


async def _end(process: Process) -> None:
    """End a command with all its descendants."""
    try:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return
    _signal(family, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _GRACE_S)
    _signal(family, signal.SIGKILL)


def _signal(family: list[psutil.Process], number: int) -> None:
    for each in family:
        try:
            each.send_signal(number)  # psutil checks that the process id was not given to another
        except psutil.NoSuchProcess:
            continue


# Looking ----------------------------------------------------------------------------------


def locks_command(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Names, as a shell pattern.")] = "*",
    history: Annotated[
        bool, typer.Option("--history", help="Who held what, when, with which token, from the log.")
    ] = False,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the locks: who holds them, who waits, who held them.

    For example:

        agentflow locks
        agentflow locks 'db-*' --json
        agentflow locks nightly-report --history
    """
    where = target(nats, namespace)
    if history:
        shown = _history(where, pattern, archive, as_json=as_json)
    else:
        shown = _locks(where, pattern, as_json=as_json)
    run(shown, logs=client_logs(debug=debug))


async def _locks(where: Target, pattern: str, *, as_json: bool) -> None:
    async with open_client(where) as client:
        infos = await client.locks(pattern)
    if as_json:
        for info in infos:
            print_json(_document(info))
        return
    if not infos:
        say("Nobody holds a lock or waits for one: see 'agentflow lock --help'.", DIM)
        return
    made = table(
        "lock", "mode", "holder", "token", "since", "ends unless renewed", "metadata", right=["token"]
    )
    for info in infos:
        kind = f"{info.mode} {len(info.holders)}/{info.permits}" if info.mode == "semaphore" else info.mode
        for place, each in enumerate([*info.holders, *info.waiters]):
            made.add_row(
                plain(info.name if not place else ""),
                kind if not place else "",
                plain(each.holder if each in info.holders else f"waits: {each.holder}"),
                str(each.token),
                moment(int(each.since.timestamp() * 1000)),
                moment(int(each.expires.timestamp() * 1000)),
                plain(", ".join(f"{key}={value}" for key, value in each.metadata.items())),
            )
    console().print(made)


def _document(info: agentflow.LockInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "mode": info.mode,
        "permits": info.permits,
        "holders": [_person(each) for each in info.holders],
        "waiters": [_person(each) for each in info.waiters],
    }


def _person(each: agentflow.LockHolder) -> dict[str, Any]:
    return {
        "holder": each.holder,
        "token": each.token,
        "mode": each.mode,
        "since": each.since.isoformat(),
        "expires": each.expires.isoformat(),
        "metadata": each.metadata,
    }


class _Told(Struct, frozen=True):
    """Something that happened to a lock."""

    seq: int | None
    """None: it was trimmed from the log, and is told by the state that stands for it."""
    time_ms: int
    lock: str
    what: str
    token: int
    holder: str
    held_ms: int | None
    """Once it ends."""
    detail: str


async def _history(where: Target, pattern: str, archive: str | None, *, as_json: bool) -> None:
    made = table("when", "lock", "what", "token", "holder", "held", "detail", right=["token", "held"])
    async with open_logged(where, archive, quiet=as_json) as past, aclosing(_told(past)) as told:
        async for each in told:
            if not fnmatch.fnmatchcase(each.lock, pattern):
                continue
            if as_json:
                print_json({**msgspec.to_builtins(each), "known_from": past.known_from})
                continue
            made.add_row(
                moment(each.time_ms),
                plain(each.lock),
                each.what,
                str(each.token),
                plain(each.holder),
                "" if each.held_ms is None else duration(each.held_ms),
                plain(each.detail, DIM),
            )
    if as_json:
        return
    if made.row_count:
        console().print(made)
    else:
        say("The log knows of no such lock.", DIM)


async def _told(past: LoggedPast) -> AsyncGenerator[_Told]:
    """What the log says of locks, read by kind; first, of what was trimmed, what was held then."""
    since: dict[tuple[str, int], int] = {}
    first = (await past.read([past.first_seq])).get(past.first_seq)
    for name, holdings in past.begin().locks.items():
        for each in holdings.values():
            since[name, each.token] = each.since_ms
            if first is None or each.since_ms < first.time_ns // 1_000_000:
                detail = _metadata(each.mode, each.metadata)
                yield _Told(None, each.since_ms, name, "acquired", each.token, each.holder, None, detail)
    async with aclosing(past.events(*_SAID)) as events:
        async for logged in events:
            event = logged.event
            if isinstance(event, LockAcquired | LockReleased | Lost):
                yield _Told(
                    seq=logged.seq,
                    time_ms=logged.time_ms,
                    lock=event.name,
                    what=event.kind.partition(".")[2],
                    token=event.token,
                    holder=event.holder,
                    held_ms=_held_ms(since, event, logged.time_ms),
                    detail=_detail(event),
                )


_SAID: Final = tuple((kind, "*") for kind in (LockAcquired.kind, LockReleased.kind, Lost.kind))


def _held_ms(
    since: dict[tuple[str, int], int], event: LockAcquired | LockReleased | Lost, now_ms: int
) -> int | None:
    """How long it was held, once it ends."""
    key = (event.name, event.token)
    if isinstance(event, LockAcquired):
        since[key] = now_ms
        return None
    began = since.pop(key, None)
    return None if began is None else now_ms - began


def _detail(event: LockAcquired | LockReleased | Lost) -> str:
    if isinstance(event, Lost):
        return event.reason
    if isinstance(event, LockAcquired):
        return _metadata(event.mode, event.metadata)
    return ""


def _metadata(mode: str, metadata: Mapping[str, str]) -> str:
    said = [mode] if mode != "exclusive" else []
    return ", ".join([*said, *(f"{key}={value}" for key, value in metadata.items())])
