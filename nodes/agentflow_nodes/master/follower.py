"""The follower: the log, folded as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from agentflow import wire
from agentflow.domain.digest import Digests
from agentflow.domain.fold import fold
from agentflow.domain.state import Ended, Namespace
from agentflow.frames import Judged, judge
from agentflow.limits import LEVEL
from agentflow.log.port import Frame, Log, Message
from agentflow.log.stored import is_stored_as

SLICE_S: Final = 0.02
"""Folding pauses this often to let the event loop do something else."""


class Recording(Protocol):
    """Who folds in the follower's place, and makes more of it."""

    @property
    def apply(self) -> Callable[[Message, Judged], object]:
        """Folds one message."""
        ...

    async def ready(self) -> None:
        """Wait while the state must not change."""


class Follower:
    """Keeps a namespace's state. `on_folded` is called after each stretch with what ended in it.

    It begins with the `state` given, or with nothing, and reads what the log holds after that.
    """

    def __init__(
        self,
        log: Log,
        on_folded: Callable[[Sequence[Ended]], None],
        *,
        level: int = LEVEL,
        state: Namespace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: Final = state or Namespace(log.namespace, knows=level)
        self.digests: Final = Digests(self.state)
        self.recording: Recording | None = None
        self._log = log
        self._on_folded = on_folded
        self._clock = clock
        self._folded_at = clock()
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []
        self._own: dict[str, tuple[Frame, Judged]] = {}

    @property
    def now_ms(self) -> int:
        """Log time now: that of the last message folded, and what has passed since."""
        return self.state.clock_ms + int((self._clock() - self._folded_at) * 1000)

    def expect(self, frame: Frame, judged: Judged) -> None:
        """A frame about to be written by ourselves: it need not be judged again when read."""
        assert frame.msg_id is not None, "a decision has an id"
        self._own[frame.msg_id] = (frame, judged)

    def forget(self) -> None:
        """What was expected may never come."""
        self._own.clear()

    async def reach(self, seq: int) -> None:
        """Wait until everything up to `seq` is folded."""
        if self.state.seq < seq:
            reached = asyncio.get_running_loop().create_future()
            self._awaited.append((seq, reached))
            await reached

    async def run(self) -> None:
        """Fold for ever. Raises LogGone."""
        async for messages in self._log.follow(self.state.seq):
            await self._fold(messages)

    async def ready(self) -> None:
        """Wait while the state must not change."""
        if self.recording is not None:
            await self.recording.ready()

    async def _fold(self, messages: Sequence[Message]) -> None:
        await self.ready()
        pause_at = self._clock() + SLICE_S
        for message in messages:
            judged = self._judge(message)
            if self.recording is not None:
                self.recording.apply(message, judged)
            else:
                fold(self.state, message.seq, message.time_ns, judged)
            self.digests.folded()
            if self._clock() >= pause_at:
                self._tell()
                await asyncio.sleep(0)
                await self.ready()
                pause_at = self._clock() + SLICE_S
        self._tell()

    def _judge(self, message: Message) -> Judged:
        if self._own and message.headers is not None:
            own = self._own.pop(message.headers.get(wire.MSG_ID, ""), None)
            if own is not None and is_stored_as(own[0], message):
                return own[1]
        return judge(message.subject, message.data, message.headers)

    def _tell(self) -> None:
        self._folded_at = self._clock()
        ended = self.state.ended
        if ended:
            self.state.ended = []
        self._on_folded(ended)
        if self._awaited:
            self._tell_awaiting()

    def _tell_awaiting(self) -> None:
        seq = self.state.seq
        for awaited, reached in self._awaited:
            if awaited <= seq and not reached.done():
                reached.set_result(None)
        self._awaited = [(awaited, reached) for awaited, reached in self._awaited if not reached.done()]
