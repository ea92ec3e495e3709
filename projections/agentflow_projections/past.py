"""The past of a namespace: where its history is read from, and up to where.

A `Past` gives a state to begin with and the messages after it. The log is one, an incident
exported to a file another: whoever replays, explains or simulates does not know which.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final, Protocol, Self, cast

from msgspec import Struct

from agentflow.domain.snapshot import restore
from agentflow.domain.state import Namespace
from agentflow.errors import InvalidRequest, OperatingError
from agentflow.limits import LEVEL
from agentflow.log.port import Log, Message

Progress = Callable[[int, int], None]
"""Told now and then how far reading is: the last sequence read, and the one to be reached."""


class Until(Struct, frozen=True):
    """Up to where: a position or a log time, whichever comes first; neither: to the end."""

    seq: int | None = None
    ms: int | None = None

    def excludes(self, state: Namespace, message: Message) -> bool:
        """Whether the next message after a state lies behind it."""
        if self.seq is not None and message.seq > self.seq:
            return True
        return self.ms is not None and log_time_ms(state, message) > self.ms


TO_THE_END: Final = Until()


def log_time_ms(state: Namespace, message: Message) -> int:
    """The log time that folding the next message brings about."""
    server_ms = message.time_ns // 1_000_000
    return state.clock_ms + max(0, server_ms - state.server_ms) if state.seq else server_ms


class Past(Protocol):
    """A stretch of a namespace's history, and the state before it."""

    @property
    def namespace(self) -> str:
        """Whose history it is."""
        ...

    @property
    def last_seq(self) -> int:
        """Where it ends; nothing beyond is read, even if there is more by now."""
        ...

    def begin(self) -> Namespace:
        """A new copy of the state before the first message. Raises OperatingError if there is none."""
        ...

    def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        """The messages after a sequence, in order."""
        ...


def begin_by(past: Past, until: Until) -> Namespace:
    """The state a past begins with. Raises InvalidRequest if that lies behind what is wanted of it."""
    state = past.begin()
    too_late = until.seq is not None and until.seq < state.seq
    if too_late or (state.seq and until.ms is not None and until.ms < state.clock_ms):
        raise InvalidRequest(
            f"this history begins with the state at position {state.seq}: what is wanted lies before it"
        )
    return state


class LoggedPast:
    """The past as the log has it, from its beginning to where it ends now.

    Of a log that was trimmed only what follows `begun`, a snapshot of the state, can be had.
    """

    def __init__(self, log: Log, first_seq: int, last_seq: int, begun: bytes | None = None) -> None:
        self._log = log
        self._first_seq = first_seq
        self._last_seq = last_seq
        self._begun = begun

    @classmethod
    async def of(cls, log: Log, begun: bytes | None = None) -> Self:
        """The log as it is now. Raises LogGone, Disconnected."""
        identity = await log.identity()
        return cls(log, identity.first_seq, identity.last_seq, begun)

    @property
    def namespace(self) -> str:
        """Whose log it is."""
        return self._log.namespace

    @property
    def last_seq(self) -> int:
        """Where the log ended when it was asked."""
        return self._last_seq

    def begin(self) -> Namespace:
        """Nothing, if the log still has its beginning."""
        if self._begun is not None:
            return restore(self._begun, knows=LEVEL)
        if self._first_seq > 1 and self._last_seq:
            raise OperatingError(
                f"the log begins at {self._first_seq}: what came before was trimmed; an archive may have it"
            )
        return Namespace(self.namespace)

    def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        """What the log holds after a sequence."""
        return cast("AsyncGenerator[Sequence[Message], None]", self._log.follow(after))


async def walk(
    past: Past,
    state: Namespace,
    apply: Callable[[Message], object],
    *,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
) -> None:
    """Hand over the messages after a state, one by one; `apply` folds them into it."""
    last = past.last_seq if until.seq is None else min(until.seq, past.last_seq)
    if state.seq >= last:
        return
    async with aclosing(past.messages(state.seq)) as following:
        async for messages in following:
            for message in messages:
                if message.seq > last or until.excludes(state, message):
                    return
                apply(message)
            if progress is not None:
                progress(state.seq, last)
            if state.seq >= last:
                return
