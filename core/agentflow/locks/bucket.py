"""Opening the bucket of locks so that tokens rise for ever.

A token is a revision of the bucket, and revisions begin anew with a bucket that was lost. So
each bucket is a generation: before it is created the log says `lock.opened{generation}`, by
compare-and-set on one exact subject, and its revisions begin at generation * 2**32. Only who
wrote a generation creates its bucket, or deletes the one in its way; the others wait for it,
and after a while write the next. A bucket older than the log says (one that came back from
the dead) is not used.

Who held a lock in a bucket that was lost may not know it yet. So whoever makes one again looks
in the log for the longest time to live of those who held one before, and leaves it with the
bucket: until that has passed since its creation, nobody is granted anything. (Who has
extended his beyond what the log says of it is protected by his token alone.)
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import AppendRefused, AppendUnknown, Disconnected, LogGone, OperatingError
from agentflow.events import LockAcquired, LockOpened
from agentflow.frames import encode, judge, level_headers
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.leases.port import Leases
from agentflow.log.port import Done, Fence, Frame, Log, Message, Reason, Refused
from agentflow.log.stream import NO_STREAM, ApiFailed, ask
from agentflow.logs import get_logger

GENERATION_BITS: Final = 32
_GENERATION_MAX: Final = 2**21 - 1  # tokens stay below 2**53: exact in every client's language
_ATTEMPTS_MAX: Final = 10
# How long whoever wrote a generation may take to create its bucket.
_PATIENCE_S: Final = 5.0
_LOOK_EVERY_S: Final = 0.05
_API_TIMEOUT_S: Final = 10.0
# In the bucket's metadata: how long after its creation nobody is granted anything, in seconds.
_QUIET: Final = "af-quiet-s"

_log = get_logger(__name__)


class Opened(Struct, frozen=True):
    """An open bucket of locks."""

    leases: Leases
    generation: int
    granting_from: float
    """On the monotonic clock: before, nobody holds a lock of it."""

    def has(self, token: int) -> bool:
        """Whether a token was given by this bucket."""
        return token >> GENERATION_BITS == self.generation


async def open_locks(bus: Bus, log: Log, *, clock: Callable[[], float] = time.monotonic) -> Opened:
    """The namespace's bucket of locks, created if there is none, on as many servers as the log.

    Raises OperatingError.
    """
    opening = _Opening(bus, log, (await log.identity()).replicas)
    for _ in range(_ATTEMPTS_MAX):
        leases = await opening.attempt()
        if leases is not None:
            return _opened(leases, clock)
    raise Disconnected(f"the bucket of locks was not opened in {_ATTEMPTS_MAX} attempts")


async def find_locks(bus: Bus, log: Log, *, clock: Callable[[], float] = time.monotonic) -> Opened | None:
    """The namespace's bucket of locks, or None if there is none that is used: nothing is written.

    Raises OperatingError.
    """
    leases = await _Opening(bus, log, (await log.identity()).replicas).look()
    return None if leases is None else _opened(leases, clock)


def _opened(leases: JetStreamLeases, clock: Callable[[], float]) -> Opened:
    quiet_s = int(leases.metadata.get(_QUIET, "0")) - leases.age_s
    return Opened(leases, generation_of(leases), clock() + max(quiet_s, 0.0))


class _Opening:
    def __init__(self, bus: Bus, log: Log, replicas: int) -> None:
        self._bus = bus
        self._log = log
        self._replicas = replicas
        self._bucket = wire.lock_bucket(log.namespace)
        self._subject = wire.locks_opened(log.namespace)

    async def attempt(self) -> JetStreamLeases | None:
        """Open what is there, or bring forth the next generation; None if somebody else was quicker."""
        last = await self._log.last(self._subject)
        said = await self._said(last)
        found = await self._find()
        if _is_used(found, said):
            return found
        if said and (waited := await self._wait(said)) is not None:
            return waited
        highest = max(
            0 if last is None else await self._highest(last.seq),
            0 if found is None else generation_of(found),
        )
        after = 0 if last is None else last.seq
        seq = await self._say(highest + 1, after)
        if seq is None:
            return None
        return await self._create(highest + 1, await self._longest_ttl_s(after, seq) if highest else 0)

    async def look(self) -> JetStreamLeases | None:
        """What is there, if it is used; nothing is written."""
        said = await self._said(await self._log.last(self._subject))
        found = await self._find()
        return found if _is_used(found, said) else None

    async def _said(self, last: Message | None) -> int:
        return 0 if last is None else _generation(last) or await self._highest(last.seq)

    async def _find(self) -> JetStreamLeases | None:
        leases = JetStreamLeases(self._bus, self._bucket, replicas=self._replicas, create=False)
        try:
            return await leases.__aenter__()
        except LogGone:
            return None

    async def _wait(self, said: int) -> JetStreamLeases | None:
        """The bucket of a generation that somebody wrote, if he creates it in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _PATIENCE_S
        while loop.time() < until:
            found = await self._find()
            if found is not None and generation_of(found) >= said:
                return found
            await asyncio.sleep(random.uniform(0, 2 * _LOOK_EVERY_S))
        return None

    async def _highest(self, until: int) -> int:
        """The highest generation in the log: each may have been said by anybody, in any order."""
        highest = 0
        async for messages in self._log.follow(0, subjects=(self._subject,)):
            highest = max(highest, *map(_generation, messages))
            if messages[-1].seq >= until:
                break
        return highest

    async def _longest_ttl_s(self, after: int, until: int) -> int:
        """The longest time to live of those who acquired a lock before message `until`."""
        acquired = wire.event(self._log.namespace, LockAcquired.kind, "*")
        longest = 0
        async for messages in self._log.follow(after, subjects=(acquired, self._subject)):
            for message in messages:
                said = judge(message.subject, message.data, message.headers).items
                longest = max([longest, *(each.ttl_s for each in said if isinstance(each, LockAcquired))])
            if messages[-1].seq >= until:
                break
        return longest

    async def _say(self, generation: int, after: int) -> int | None:
        """Write a generation, if nobody wrote there since `after`; its sequence in the log."""
        if generation > _GENERATION_MAX:
            raise OperatingError(f"generation {generation} of the bucket of locks: tokens end at 2**53")
        event = LockOpened(generation=generation)
        msg_id = f"{wire.LOCKS_ACTOR}.{secrets.token_urlsafe(9)}.1"
        frame = Frame(self._subject, encode([event]), msg_id, level_headers([event]))
        appended = await self._log.append(frame, fence=Fence(self._subject, after), timeout_s=_API_TIMEOUT_S)
        if isinstance(appended, Done):
            return appended.seq
        if not isinstance(appended, Refused):
            raise AppendUnknown(appended.detail)
        if appended.reason is Reason.FENCED:
            return None
        raise AppendRefused(appended.code, appended.detail)

    async def _create(self, generation: int, quiet_s: int) -> JetStreamLeases | None:
        """Create the bucket of the generation that is ours; an older one is in its way."""
        stream = wire.bucket_stream(self._bucket)
        _log.info("creating the bucket of locks", stream=stream, generation=generation)
        if await self._find() is not None:
            await self._delete(stream)
        first_seq = generation << GENERATION_BITS
        created = JetStreamLeases(
            self._bus,
            self._bucket,
            replicas=self._replicas,
            first_seq=first_seq,
            metadata={_QUIET: str(quiet_s)},
        )
        await created.__aenter__()
        last = await self._log.last(self._subject)
        is_ours = (
            generation_of(created) == generation and last is not None and _generation(last) == generation
        )
        return created if is_ours else None

    async def _delete(self, stream: str) -> None:
        try:
            await ask(self._bus, f"STREAM.DELETE.{stream}", None, dict[str, bool | str], _API_TIMEOUT_S)
        except ApiFailed as failed:
            if failed.error.err_code != NO_STREAM:
                raise Disconnected(str(failed)) from failed


def generation_of(leases: JetStreamLeases) -> int:
    """Of a bucket that was found; 0 if it was not made for locks."""
    return leases.first_seq >> GENERATION_BITS


def _is_used(found: JetStreamLeases | None, said: int) -> bool:
    """Whether it is as new as the log says; newer if the log was cut off since its creation."""
    return found is not None and generation_of(found) >= max(said, 1)


def _generation(message: Message) -> int:
    """What a message says; 0 if it is nothing valid."""
    judged = judge(message.subject, message.data, message.headers)
    said = [item.generation for item in judged.items if isinstance(item, LockOpened)]
    return max((each for each in said if each <= _GENERATION_MAX), default=0)
