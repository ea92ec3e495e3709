"""One contender on his way through the line."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from agentflow import wire
from agentflow.errors import Disconnected, LockTimeout, LogGone
from agentflow.events import LockAcquired, LockReleased
from agentflow.events import LockLost as Lost
from agentflow.leases.port import Entry, Lease
from agentflow.locks.bucket import Opened
from agentflow.locks.held import Held, Write
from agentflow.locks.keeper import Keeper
from agentflow.locks.lines import Lines, Waiting, Watch
from agentflow.locks.ticket import Line, Place, Ticket
from agentflow.logs import get_logger

_PAUSE_S_MAX: Final = 0.2

_log = get_logger(__name__)


class TicketLost(Exception):
    """The contender lost his place in line: he was silent for too long, or the bucket is gone."""


class Contender:
    """A ticket, from its creation until it is handed over as a held lock, or given up.

    `deadline` is on `clock`; None waits for ever. At least one look is taken at the line,
    whatever the deadline.
    """

    def __init__(
        self,
        bucket: Opened,
        ticket: Ticket,
        ttl_s: int,
        write: Write,
        *,
        lines: Lines,
        clock: Callable[[], float],
        deadline: float | None,
    ) -> None:
        self._bucket = bucket
        self._leases = bucket.leases
        self._ticket = ticket
        self._ttl_s = ttl_s
        self._write = write
        self._lines = lines
        self._clock = clock
        self._deadline = deadline
        self._pattern = wire.lock_keys(ticket.name)
        self._key = wire.lock_key(ticket.name, secrets.token_hex(8))
        self._nonce = secrets.token_hex(8)
        self._keeper: Keeper | None = None
        self._line = Line()
        self._moved = asyncio.Event()
        self._waiting = Waiting(self._key, self._line, self._moved.set)
        self._granting = False

    async def acquire(self) -> Held:
        """Come, wait, and hold the lock.

        Raises LockTimeout, TicketLost, InvalidRequest (the others in line use it differently),
        LogGone, OperatingError. Whoever leaves otherwise than with a lock calls `give_up`.
        """
        lease = await self._come()
        if not self._bucket.has(lease.epoch):
            raise LogGone(
                f"token {lease.epoch} is of another bucket than generation {self._bucket.generation}"
            )
        self._keeper = Keeper(self._leases, lease, self._clock)
        self._keeper.on_lost(self._moved.set)
        await self._reach_the_front(self._keeper)
        return await self._take(self._keeper)

    async def give_up(self) -> None:
        """Leave the line: remove the ticket, whether or not we heard of its creation.

        If the lock may be ours for the log, only once that is over there too; see `Held`.
        """
        lease = Lease(self._key, b"", self._ttl_s, self._nonce, epoch=0, revision=0, deadline=0.0)
        try:
            if self._granting and self._keeper is not None:
                token = self._keeper.lease.epoch
                # Whether `lock.acquired` is in the log or not, this comes after it.
                await self._write(
                    [LockReleased(name=self._ticket.name, token=token, holder=self._ticket.holder)]
                )
        finally:
            if self._keeper is not None:
                lease = await self._keeper.stop()
        await self._leases.release(lease)

    async def _come(self) -> Lease:
        """Create the ticket, under one nonce for however long that takes."""
        value = self._ticket.encoded()
        while True:
            try:
                lease = await self._leases.acquire(self._key, value, self._ttl_s, nonce=self._nonce)
            except Disconnected as error:
                await self._pause(error)
                continue
            if lease is None:
                raise TicketLost("somebody else wrote under the key of our ticket")
            return lease

    async def _reach_the_front(self, keeper: Keeper) -> None:
        watch = self._join_others(keeper.lease) or await self._read_and_join()
        if watch is None:
            return
        try:
            await self._wait(keeper, watch)
        finally:
            await self._lines.leave(self._pattern, watch, self._key)

    def _join_others(self, lease: Lease) -> Watch | None:
        """Wait with others of this process, and read the line no sooner than nobody seems to be before us."""
        watch = self._lines.watched(self._pattern)
        known = None if watch is None or self._is_late() else watch.known()
        first = next(iter(known.places()), None) if known is not None else None
        if watch is None or first is None or not first.ticket.agrees_with(self._ticket):
            return None
        ours = Entry(lease.key, lease.value, lease.ttl_s, lease.epoch, lease.revision, self._clock())
        self._line.apply(ours)
        watch.join_others(self._waiting)
        return watch

    async def _read_and_join(self) -> Watch | None:
        """Read the line, and join its watch unless nobody is before us."""
        while True:
            since = await self._look()
            self._line.require_agreement(self._key)
            if self._is_first():
                return None
            if self._is_late():
                raise self._timeout()
            watch = self._lines.join(self._pattern, self._waiting, since)
            if watch is not None:
                return watch

    async def _look(self) -> int:
        """Read the line, which must hold our own ticket; the revision it was read at."""
        while True:
            try:
                snapshot = await self._leases.entries(self._pattern)
            except Disconnected as error:
                await self._pause(error)
                continue
            if all(entry.key != self._key for entry in snapshot.entries):
                raise TicketLost("our ticket is no longer there")
            self._waiting.learn(snapshot)
            return snapshot.revision

    async def _wait(self, keeper: Keeper, watch: Watch) -> None:
        """Until nobody is before us any more. Each round is caused by a change or a timer."""
        while True:
            self._moved.clear()
            if not keeper.is_kept():
                raise TicketLost(keeper.reason)
            watch.check()
            if self._waiting.is_gone or self._line.place(self._key) is None:
                raise TicketLost("it was taken away")
            if self._is_first():
                if self._waiting.has_read:
                    return
                await self._read(watch)
                continue
            before = self._line.before(self._key)
            now = self._clock()
            if self._is_late():
                raise self._timeout()
            if any(place.entry.is_silent(now) for place in before):
                await self._clear(watch)
                continue
            await self._sleep(min(map(_silent_at, before), default=self._bucket.granting_from))

    async def _read(self, watch: Watch) -> None:
        try:
            await watch.read(self._waiting)
        except Disconnected as error:
            await self._pause(error)

    def _is_late(self) -> bool:
        return self._deadline is not None and self._deadline <= self._clock()

    def _is_first(self) -> bool:
        """Whether nobody has to go before us, in this bucket or one that was lost."""
        return not self._line.before(self._key) and self._clock() >= self._bucket.granting_from

    async def _sleep(self, until: float) -> None:
        if self._deadline is not None:
            until = min(until, self._deadline)
        try:
            async with asyncio.timeout(max(until - self._clock(), 0.0)):
                await self._moved.wait()
        except TimeoutError:
            pass  # what is due now is looked for next

    async def _clear(self, watch: Watch) -> None:
        """Take the tickets of the silent away, after a fresh look at who they are."""
        try:
            await self._look()
            watch.catch_up(self._waiting)
            if not self._in_line:
                return
            now = self._clock()
            for place in self._line.before(self._key):
                if place.entry.is_silent(now):
                    await self._evict(place)
        except Disconnected as error:
            await self._pause(error)

    async def _evict(self, place: Place) -> None:
        """Take a ticket away, and say so if its owner may have held the lock."""
        if self._line.place(place.entry.key) is None:
            return  # removed while we took another away
        may_hold = not self._line.before(place.entry.key)
        if not await self._leases.evict(place.entry):
            entry = await self._leases.read(place.entry.key)
            if entry is not None:
                self._line.apply(entry)
            return
        _log.warning("a silent ticket was taken away", lock=self._ticket.name, holder=place.ticket.holder)
        if may_hold:
            reason = f"silent for {place.entry.ttl_s} s"
            await self._write(
                [Lost(name=self._ticket.name, token=place.token, holder=place.ticket.holder, reason=reason)]
            )
        self._line.remove(place.entry.key)

    async def _take(self, keeper: Keeper) -> Held:
        """Say that the lock is ours; it is if we are still in time after that."""
        if not keeper.is_kept():
            raise TicketLost(keeper.reason)
        ticket = self._ticket
        self._granting = True
        event = LockAcquired(
            name=ticket.name,
            token=keeper.lease.epoch,
            holder=ticket.holder,
            mode=ticket.mode,
            permits=ticket.permits,
            ttl_s=self._ttl_s,
            metadata=ticket.metadata,
        )
        await self._write([event])
        if not keeper.is_kept():
            raise TicketLost(keeper.reason)
        keeper.write(replace(ticket, held_ms=int(time.time() * 1_000)).encoded())
        return Held(ticket, self._leases, keeper, self._write)

    async def _pause(self, error: Disconnected) -> None:
        """Before trying again; raises the error if it is too late for that."""
        if self._is_late():
            raise error
        await asyncio.sleep(random.uniform(0, _PAUSE_S_MAX))

    def _timeout(self) -> LockTimeout:
        name = self._ticket.name
        before = [place.ticket.holder for place in self._line.before(self._key)] if self._in_line else []
        ahead = (
            f"before us: {', '.join(before[:5])}"
            if before
            else "its bucket was lost, and who held it has not surely given up yet"
        )
        return LockTimeout(f"lock {name!r} was not free in time; {ahead}")

    @property
    def _in_line(self) -> bool:
        return self._line.place(self._key) is not None


def _silent_at(place: Place) -> float:
    return place.entry.seen + place.entry.ttl_s
