"""A lock that is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from agentflow.errors import LockLost, LockNotHeld, OperatingError
from agentflow.events import Event, LockReleased
from agentflow.events import LockLost as Lost
from agentflow.leases.port import Lease, Leases
from agentflow.locks.keeper import Keeper
from agentflow.locks.ticket import Ticket
from agentflow.logs import get_logger

Write = Callable[[list[Event]], Awaitable[int]]
"""Writes events of one kind to the log, in order; see `agentflow.writer.Writer.write`."""

_log = get_logger(__name__)


class Held:
    """A lock that is held, renewed by itself until it is released or lost.

    Hand `token` to whatever is changed under the lock, and let it refuse tokens below the
    highest it has seen: that is what keeps a holder harmless who was paused and does not
    know yet that he lost it.
    """

    def __init__(self, ticket: Ticket, leases: Leases, keeper: Keeper, write: Write) -> None:
        self.name: Final = ticket.name
        self.holder: Final = ticket.holder
        self.token: Final = keeper.lease.epoch
        """Fencing token: later holders of this lock have a higher one, for ever. Below 2**53."""
        self.lost: Final = asyncio.Event()
        """Set when it is lost, and never after it was released."""
        self._leases = leases
        self._keeper = keeper
        self._write = write
        self._ending: asyncio.Task[None] | None = None
        self._lost_before = False
        self._on_lost: list[Callable[[], None]] = []
        self._on_end: Callable[[Held], object] | None = None
        keeper.on_lost(self._lose)

    @property
    def deadline(self) -> float:
        """On the monotonic clock: until then it is held for certain. Moves with each renewal."""
        return self._keeper.lease.deadline

    @property
    def ttl_s(self) -> int:
        """Seconds without a renewal after which others may take it."""
        return self._keeper.lease.ttl_s

    def is_held(self) -> bool:
        """Whether it is held at this very moment; also right for a process that was paused."""
        return self._ending is None and self._keeper.is_kept()

    async def renew(self) -> None:
        """Renew it now. Raises LockLost, LockNotHeld, Disconnected (it counts until its old deadline)."""
        await self._renew(None)

    async def extend(self, ttl_s: int) -> None:
        """Renew it now and from now on for `ttl_s` whole seconds each time. Raises as `renew`."""
        await self._renew(ttl_s)

    async def release(self) -> None:
        """Give it back: first in the log, then for others to take. Doing it twice is harmless.

        Raises LockLost, at once, if it was lost before: then somebody else may have worked
        under it. Whoever is cancelled meanwhile has released it all the same.
        """
        if self._ending is None:
            self._lost_before = not self._keeper.is_kept()
            self._ending = asyncio.create_task(self._end(), name=f"releasing {self.name}")
        if self._lost_before:
            raise self.loss()
        await asyncio.shield(self._ending)

    async def ended(self) -> None:
        """Release it, and wait until that is over also if it was lost. Raises nothing of its own."""
        with contextlib.suppress(LockLost):
            await self.release()
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self) -> None:
        """Say that it is over, then remove the ticket.

        It is renewed until the log has that word, so that nobody else's acquisition comes before
        it there; without the word it is left to expire, and whoever takes it away says so.
        """
        said = False
        try:
            said = await self._say_the_end()
        finally:
            lease = await self._keeper.stop()
        if said:
            await self._remove(lease)
        if self._on_end is not None:
            self._on_end(self)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call back, from the event loop, if it is lost."""
        self._on_lost.append(callback)

    def on_end(self, callback: Callable[[Held], object]) -> None:
        """Call back when it has been released."""
        self._on_end = callback

    def loss(self) -> LockLost:
        """The error that tells of the loss."""
        return LockLost(self.name, self.token, self._keeper.reason)

    async def _renew(self, ttl_s: int | None) -> None:
        if self._ending is not None and not self._lost_before:
            raise LockNotHeld(f"lock {self.name!r} (token {self.token}) was released")
        if self._lost_before or not await self._keeper.renew(ttl_s):
            raise self.loss()

    def _lose(self) -> None:
        if self._ending is not None:
            return
        self.lost.set()
        callbacks, self._on_lost = self._on_lost, []
        for callback in callbacks:
            callback()

    async def _say_the_end(self) -> bool:
        """Whether the log has it; a release is not waited for longer than the ticket is kept."""
        if self._lost_before:
            reason = self._keeper.reason
            return await self._say(Lost(name=self.name, token=self.token, holder=self.holder, reason=reason))
        released = LockReleased(name=self.name, token=self.token, holder=self.holder)
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None if self._keeper.is_kept() else 0) as limit:
                self._keeper.on_lost(lambda: limit.reschedule(now()))
                return await self._say(released)
        except TimeoutError:
            _log.warning("the end of a lock was not in the log in time", lock=self.name)
            return False

    async def _say(self, event: Event) -> bool:
        """Whether the log has it."""
        try:
            await self._write([event])
        except OperatingError as error:
            _log.warning("the end of a lock is not in the log", lock=self.name, error=repr(error))
            return False
        return True

    async def _remove(self, lease: Lease) -> None:
        try:
            await self._leases.release(lease)
        except OperatingError as error:
            _log.info("a ticket was not removed; it expires", lock=self.name, error=str(error))
