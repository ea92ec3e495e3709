"""The locks of a namespace, as one client uses them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct

from agentflow import wire
from agentflow.ending import end_tasks
from agentflow.errors import Disconnected, InvalidRequest, LockTimeout, LogGone, OperatingError
from agentflow.locks.bucket import Opened
from agentflow.locks.contender import Contender, TicketLost
from agentflow.locks.held import Held, Write
from agentflow.locks.lines import Lines
from agentflow.locks.ticket import Line, Mode, Place, Ticket, in_lines
from agentflow.logs import get_logger

_ATTEMPTS_MAX: Final = 100
_CLOSE_S: Final = 3.0
_PAUSE_S_MAX: Final = 0.2

_log = get_logger(__name__)


class LockHolder(Struct, frozen=True):
    """Somebody who holds a lock, or waits for it."""

    holder: str
    token: int
    """His place in line; once he holds it, his fencing token."""
    mode: str
    since: datetime
    """When he came; once he holds it and has renewed it, when he got it. By his own clock."""
    expires: datetime
    """When his ticket ends, unless he renews it before. By the server's clock."""
    metadata: dict[str, str]


class LockInfo(Struct, frozen=True):
    """A lock that somebody holds or waits for, as the bucket shows it now."""

    name: str
    mode: str
    """exclusive, shared or semaphore: of its first holder."""
    permits: int
    holders: list[LockHolder]
    """In the order of their tokens; one is about to get it if it was just freed."""
    waiters: list[LockHolder]
    """In the order in which they will get it."""


class Locks:
    """Acquires locks, and looks who holds them.

    `open_bucket` opens the bucket, creating it if there is none: at first use, and when it is
    gone. `find_bucket` does so for who only looks, and gives None if there is none.
    """

    def __init__(
        self,
        open_bucket: Callable[[], Awaitable[Opened]],
        write: Write,
        *,
        find_bucket: Callable[[], Awaitable[Opened | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_bucket = open_bucket
        self._find_bucket = find_bucket
        self._write = write
        self._clock = clock
        self._bucket: Opened | None = None
        self._lines: tuple[Opened, Lines] | None = None
        self._opening = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self._held: set[Held] = set()

    async def close(self) -> None:
        """Release what is held, and wait, not for long, for those who are leaving the line."""
        for held in list(self._held):
            self._leave(held.ended)
        if self._leaving:
            _, left = await asyncio.wait(set(self._leaving), timeout=_CLOSE_S)
            await end_tasks(*left)

    async def acquire(self, ticket: Ticket, ttl_s: int, wait_s: float | None) -> Held:
        """Wait in line for at most `wait_s` (None: for ever), and hold the lock.

        Raises LockTimeout, InvalidRequest (others use it in another mode or with other
        permits), AppendRefused and AppendUnknown (the log does not take our word).
        """
        deadline = None if wait_s is None else self._clock() + wait_s
        for _ in range(_ATTEMPTS_MAX):
            bucket = await self._reached(deadline)
            contender = Contender(
                bucket,
                ticket,
                ttl_s,
                self._write,
                lines=self._lines_of(bucket),
                clock=self._clock,
                deadline=deadline,
            )
            try:
                held = await contender.acquire()
            except TicketLost as lost:
                _log.info("waiting anew", lock=ticket.name, why=str(lost))
                self._leave(contender.give_up)
            except LogGone as gone:
                _log.warning("the bucket of locks is gone", lock=ticket.name, why=str(gone))
                self._leave(contender.give_up)
                self._forget(bucket)
            except (LockTimeout, InvalidRequest):
                await asyncio.shield(self._leave(contender.give_up))
                raise
            except BaseException:
                self._leave(contender.give_up)
                raise
            else:
                self._held.add(held)
                held.on_end(self._held.discard)
                return held
        raise Disconnected(f"lock {ticket.name!r}: no ticket of {_ATTEMPTS_MAX} lived long enough")

    async def infos(self, name: str = "") -> list[LockInfo]:
        """All locks somebody holds or waits for, or one, by name. Raises OperatingError."""
        for _ in range(_ATTEMPTS_MAX):
            bucket = await self._found()
            if bucket is None:
                return []
            try:
                snapshot = await bucket.leases.entries(wire.lock_keys(name))
            except LogGone:
                self._forget(bucket)
            else:
                lines = in_lines(snapshot.entries)
                return [_info(each, line) for each, line in sorted(lines.items())]
        raise Disconnected("the bucket of locks does not stay")

    async def _reached(self, deadline: float | None) -> Opened:
        """The bucket, however long it takes to reach it. Raises Disconnected after the deadline."""
        while True:
            try:
                return await self._opened()
            except Disconnected:
                if deadline is not None and deadline <= self._clock():
                    raise
                await asyncio.sleep(random.uniform(0, _PAUSE_S_MAX))

    async def _opened(self) -> Opened:
        async with self._opening:
            if self._bucket is None:
                self._bucket = await self._open_bucket()
            return self._bucket

    async def _found(self) -> Opened | None:
        async with self._opening:
            if self._bucket is None:
                self._bucket = await self._find_bucket()
            return self._bucket

    def _lines_of(self, bucket: Opened) -> Lines:
        if self._lines is None or self._lines[0] is not bucket:
            self._lines = (bucket, Lines(bucket.leases))
        return self._lines[1]

    def _forget(self, bucket: Opened) -> None:
        if self._bucket is bucket:
            self._bucket = None

    def _leave(self, leave: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Let somebody leave the line; whoever was cancelled does not wait for it."""
        task = asyncio.create_task(_left(leave), name="leaving a line")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task


async def _left(leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await leave()
    except OperatingError as error:
        _log.info("a ticket was not removed; it expires", error=str(error))


def _info(name: str, line: Line) -> LockInfo:
    places = line.places()
    holders = [place for place in places if not line.before(place.entry.key)]
    waiters = [place for place in places if line.before(place.entry.key)]
    first = holders[0].ticket
    permits = first.permits if first.mode is Mode.SEMAPHORE else 1
    return LockInfo(
        name, first.mode, permits, [_shown(each) for each in holders], [_shown(each) for each in waiters]
    )


def _shown(place: Place) -> LockHolder:
    ticket, entry = place.ticket, place.entry
    return LockHolder(
        holder=ticket.holder,
        token=place.token,
        mode=ticket.mode,
        since=_time(ticket.held_ms or ticket.since_ms),
        expires=_time(entry.written_ms + entry.ttl_s * 1_000),
        metadata=ticket.metadata,
    )


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1_000, UTC)
