"""The past of a namespace: where its history is read from, and up to where.

A `Past` gives a state to begin with and the messages after it. The log is one, an incident
exported to a file another: whoever replays, explains or simulates does not know which.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Final, Protocol, Self, cast

from msgspec import Struct

from agentflow import wire
from agentflow.client.watching import LoggedEvent
from agentflow.client.watching import events as logged_events
from agentflow.domain.snapshot import restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.errors import InvalidRequest, OperatingError
from agentflow.limits import LEVEL
from agentflow.log.port import Identity, Log, Message
from agentflow.objects.kept import read_many
from agentflow.objects.port import Objects
from agentflow_projections.trimmed import fetch_snapshot

Progress = Callable[[int, int], None]
"""Told now and then how far reading is: the last sequence read, and the one to be reached."""


Said = tuple[str, str]
"""A kind of events, and who says them; "*": anybody."""


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

    Of a log that was trimmed only what follows the snapshot that stands for the rest can be had,
    and of the messages before it those that open work is read from.
    """

    def __init__(
        self, log: Log, identity: Identity, objects: Objects | None = None, begun: Namespace | None = None
    ) -> None:
        self.log: Final = log
        self.objects: Final = objects
        self.first_seq: Final = identity.first_seq
        """The first message that can be read."""
        self.known_from: Final = begun.seq + 1 if begun is not None else identity.first_seq
        """From this position on nothing is missing; of what came before only what was open then is known."""
        self._last_seq = identity.last_seq
        self._begun = None if begun is None else snapshot(begun)

    @classmethod
    async def of(cls, log: Log, objects: Objects | None = None) -> Self:
        """The log as it is now; without its objects a trimmed one has no beginning.

        Raises LogTrimmed if the snapshot cannot be used, ObjectMissing, LogGone, Disconnected.
        """
        identity = await log.identity()
        if objects is None or identity.trim is None:
            return cls(log, identity, objects)
        begun, _ = await fetch_snapshot(log, objects)
        return cls(log, await log.identity(), objects, begun)

    @property
    def namespace(self) -> str:
        """Whose log it is."""
        return self.log.namespace

    @property
    def last_seq(self) -> int:
        """Where the log ended when it was asked."""
        return self._last_seq

    def begin(self) -> Namespace:
        """Nothing, if the log still has its beginning."""
        if self._begun is not None:
            return restore(self._begun, knows=LEVEL)
        if self.first_seq > 1 and self._last_seq:
            raise OperatingError(
                f"the log begins at {self.first_seq}: what came before was trimmed; an archive may have it"
            )
        return Namespace(self.namespace)

    def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        """What the log holds after a sequence."""
        return cast("AsyncGenerator[Sequence[Message], None]", self.log.follow(after))

    async def events(self, *wanted: Said) -> AsyncGenerator[LoggedEvent, None]:
        """All events of these kinds that can be read, in order, to where the log ended when it was asked."""
        after, until = self.first_seq - 1, self._last_seq
        # A log is asked for these alone; an archive has to be read whole in any case.
        archived = getattr(self.log, "archived_seq", 0) > 0
        subjects = () if archived else [wire.event(self.namespace, *each) for each in wanted]
        async with aclosing(
            cast(
                "AsyncGenerator[LoggedEvent, None]",
                logged_events(self.log, after=after, until=until, subjects=subjects),
            )
        ) as events:
            async for logged in events:
                if (logged.kind, "*") in wanted or (logged.kind, logged.actor) in wanted:
                    yield logged

    async def read(self, positions: Iterable[int]) -> dict[int, Message]:
        """The messages at these positions, as far as they are in the log or kept for open work."""
        return await read_many(self.log, self.objects, positions)


async def walk(
    past: Past,
    state: Namespace,
    apply: Callable[[Message], object],
    *,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
) -> None:
    """Hand over the messages after a state, one by one; `apply` folds them into it.

    Not through `pipeline.spoken`, which the projector reads through: its queue costs a microsecond an
    event, and since judging takes no more than that a second process saves nothing here.
    """
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
