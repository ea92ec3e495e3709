"""The writer: one actor's way into the log.

One frame is in flight at a time, so that what an actor says is stored in the order said.
What is said meanwhile goes into the next frame: batches form by themselves, without a timer.

A frame whose fate is unknown is repeated byte for byte until it is known.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from msgspec import Struct

from agentflow import wire
from agentflow.ending import end_tasks
from agentflow.errors import AppendRefused, AppendUnknown, InvalidRequest, LogGone, OperatingError
from agentflow.events import Event
from agentflow.frames import FIXED_LEVELS, TooLarge, compose, encode, level_headers, level_of
from agentflow.limits import LEVEL_FIRST
from agentflow.log.port import Appended, Done, Frame, Log, Reason, Refused
from agentflow.logs import get_logger

FRAME_EVENTS_GOOD: Final = 1_000
"""Events that go into one frame at the most: larger ones would keep readers waiting."""
_PAUSE_S_FIRST: Final = 0.05
_PAUSE_S_MAX: Final = 2.0
_RETRIED: Final = frozenset({Reason.BUSY})
_RETRIED_FOR_EVER: Final = frozenset({Reason.BUSY, Reason.FULL, Reason.GONE, Reason.OTHER})

# A worker's outcomes are independent of each other, but not of their own starts.
_FIRST: Final = "task.started"

_log = get_logger(__name__)


class _Said(Struct):
    """Something to write: events of one kind, or those of one atomic batch, a frame each."""

    kind: str
    events: Sequence[Event]
    told: asyncio.Future[int] | None = None
    batch: Sequence[Event] = ()
    number: int = 0
    """Orders what was said."""
    level: int = LEVEL_FIRST
    """The contract level its frame must be written in."""


class Writer:
    """Writes an actor's events. An async context manager; leaving it gives up what was not written.

    `patience_s` bounds how long a write may stay unknown before `write` raises; None: for
    ever, for workers, whose outcomes nobody else knows. `grouped` lets events of one kind
    overtake others where their order does not matter: a worker's. What was said first still
    decides what comes next, so that no kind waits for ever; but starts come before outcomes.
    `nonce` sets this writer's message ids apart from all others'; only who repeats a run gives one.
    """

    def __init__(
        self,
        log: Log,
        actor: str,
        *,
        grouped: bool = False,
        patience_s: float | None = None,
        nonce: str = "",
    ) -> None:
        self._log = log
        self._actor = actor
        self._grouped = grouped
        self._patience_s = patience_s
        self._nonce = nonce or secrets.token_urlsafe(9)
        self._numbers = itertools.count(1)
        self._said = itertools.count(1)
        # By kind; all in one if they are not grouped.
        self._queues: dict[str, deque[_Said]] = {}
        self._taken: list[_Said] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"writer {self._actor}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        await end_tasks(task)
        left = self._taken + [said for queue in self._queues.values() for said in queue]
        self._queues.clear()
        _tell_error([said for said in left if said.told is not None], AppendUnknown("the writer was closed"))

    def say(self, event: Event) -> None:
        """Write an event sometime soon; failing is logged."""
        self._enter(_Said(event.kind, (event,)))

    async def write(self, events: Sequence[Event]) -> int:
        """Write events of one kind; the sequence of the message with the last of them.

        Raises InvalidRequest if one is too large or no JSON (then none is written), AppendRefused,
        AppendUnknown.
        """
        return await self._enter_and_wait(_Said(events[0].kind, events))

    async def write_batch(self, batch: Sequence[Event]) -> int:
        """Write events of any kinds, each in a frame of its own, next to each other or not at all."""
        return await self._enter_and_wait(_Said("", (), batch=batch))

    async def settled(self) -> None:
        """Wait until everything said so far is written."""
        await self._idle.wait()

    async def _enter_and_wait(self, said: _Said) -> int:
        if self._task is None or self._task.done():
            raise AppendUnknown("the writer is closed: nothing was sent")
        said.told = asyncio.get_running_loop().create_future()
        self._enter(said)
        return await said.told

    def _enter(self, said: _Said) -> None:
        said.number = next(self._said)
        if said.events:
            said.level = FIXED_LEVELS.get(said.kind) or level_of(said.events)
        kind = said.kind if self._grouped else ""
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = deque()
        queue.append(said)
        self._idle.clear()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            while not any(self._queues.values()):
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
                if self._grouped:
                    # What is ready to run now may have something to say too: one frame for all of it.
                    await asyncio.sleep(0)
            self._taken = self._take()
            try:
                await self._settle(self._taken)
            except Exception as error:
                _tell_error(self._taken, AppendUnknown(f"the writer failed: {error!r}"))
                raise
            self._taken = []

    def _take(self) -> list[_Said]:
        """The next run of the same kind."""
        queue = self._queues.get(_FIRST)
        if not queue:
            queue = min(filter(None, self._queues.values()), key=lambda queue: queue[0].number)
        first = queue.popleft()
        taken = [first]
        count = len(first.events)
        while queue and not first.batch and _go_together(first, queue[0]):
            count += len(queue[0].events)
            if count > FRAME_EVENTS_GOOD:
                break
            taken.append(queue.popleft())
        return taken

    async def _settle(self, taken: list[_Said]) -> None:
        """Write, and tell those who wait."""
        try:
            seq = await self._store(taken)
        except InvalidRequest as error:
            if len(taken) == 1:
                _tell_error(taken, error)
                return
            # One of them cannot be written; the others are not to suffer for it.
            for said in taken:
                await self._settle([said])
        except OperatingError as error:
            _tell_error(taken, error)
        else:
            _tell(taken, seq)

    async def _store(self, taken: list[_Said]) -> int:
        first = taken[0]
        if first.batch:
            return await self._store_batch(first.batch)
        events = [event for said in taken for event in said.events] if len(taken) > 1 else first.events
        seq = 0
        headers = level_headers(events)
        for data in _composed(events):
            seq = await self._store_frame(self._frame(first.kind, data, headers))
        return seq

    def _frame(self, kind: str, data: bytes, headers: dict[str, str] | None) -> Frame:
        return Frame(wire.event(self._log.namespace, kind, self._actor), data, self._new_msg_id(), headers)

    def _new_msg_id(self) -> str:
        return f"{self._actor}.{self._nonce}.{next(self._numbers)}"

    async def _store_frame(self, frame: Frame) -> int:
        pauses = _Pauses(self._patience_s)
        while True:
            done = self._judge(await self._log.append(frame), pauses)
            if done is not None:
                return done
            await pauses.pause()

    async def _store_batch(self, batch: Sequence[Event]) -> int:
        frames = [self._frame(event.kind, encode([event]), level_headers([event])) for event in batch]
        pauses = _Pauses(self._patience_s)
        while True:
            done = self._judge(await self._log.append_batch(frames), pauses)
            if done is not None:
                return done
            await pauses.pause()

    def _judge(self, appended: Appended, pauses: _Pauses) -> int | None:
        """The sequence, or None if it has to be tried again."""
        if isinstance(appended, Done):
            return appended.seq
        if isinstance(appended, Refused):
            retried = _RETRIED if self._patience_s is not None else _RETRIED_FOR_EVER
            if appended.reason not in retried or pauses.spent:
                if appended.reason is Reason.GONE:
                    raise LogGone(appended.detail)
                if pauses.in_doubt:
                    # Only the last attempt was certainly not stored.
                    raise AppendUnknown(f"an earlier attempt may be stored: {appended.detail}")
                raise AppendRefused(appended.code, f"{appended.reason}: {appended.detail}")
        else:
            pauses.in_doubt = True
            if pauses.spent:
                raise AppendUnknown(f"not acknowledged within {self._patience_s} s: {appended.detail}")
        _log.debug("write repeated", actor=self._actor, why=appended.detail)
        return None


def _go_together(first: _Said, other: _Said) -> bool:
    """Whether they may share a frame: below its level, a frame is refused as a whole."""
    return other.kind == first.kind and not other.batch and other.level == first.level


def _composed(events: Sequence[Event]) -> list[bytes]:
    """The frames for events of one kind: all of them, or InvalidRequest before any is written."""
    try:
        return [
            frame.data
            for start in range(0, len(events), FRAME_EVENTS_GOOD)
            for frame in compose(events[start : start + FRAME_EVENTS_GOOD])
        ]
    except TooLarge as error:
        raise InvalidRequest(str(error)) from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error


class _Pauses:
    """Growing pauses, until patience runs out."""

    def __init__(self, patience_s: float | None) -> None:
        self._until = None if patience_s is None else asyncio.get_running_loop().time() + patience_s
        self._pause_s = _PAUSE_S_FIRST
        self.in_doubt = False
        """Whether an attempt may have been stored."""

    @property
    def spent(self) -> bool:
        return self._until is not None and asyncio.get_running_loop().time() >= self._until

    async def pause(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, _PAUSE_S_MAX)


def _tell(taken: Sequence[_Said], seq: int) -> None:
    for said in taken:
        if said.told is not None and not said.told.done():
            said.told.set_result(seq)


def _tell_error(taken: Sequence[_Said], error: Exception) -> None:
    for said in taken:
        if said.told is None:
            _log.error("an event could not be written", kind=said.kind, error=str(error))
        elif not said.told.done():
            said.told.set_exception(error)
