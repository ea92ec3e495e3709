"""Watching: the log, event by event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

from msgspec import Struct

from agentflow import frames
from agentflow.checks import Bad
from agentflow.events import Event
from agentflow.frames import Decision
from agentflow.log.port import Log, Message


class LoggedEvent(Struct, frozen=True, gc=False):
    """One event as it stands in the log."""

    seq: int
    index: int
    time_ms: int
    kind: str
    actor: str
    event: Event | None
    bad: Bad | None = None
    """Why it is no event, if it is none."""
    decision: Decision | None = None


async def events(
    log: Log, *, after: int, until: int | None = None, subjects: Sequence[str] = ()
) -> AsyncIterator[LoggedEvent]:
    """The events after a sequence, in order; up to `until` if given, else for ever."""
    if until is not None and subjects:
        # Nothing on these subjects may lie at `until` itself: then the last that does ends it.
        ends = [await log.last(subject) for subject in subjects]
        until = min(until, max((message.seq for message in ends if message is not None), default=0))
    if until is not None and after >= until:
        return
    # Closed at once, or the consumer would live on at the server.
    async with aclosing(
        cast("AsyncGenerator[list[Message], None]", log.follow(after, subjects=subjects))
    ) as batches:
        async for messages in batches:
            for message in messages:
                for logged in logged_events(message):
                    yield logged
                if until is not None and message.seq >= until:
                    return


def logged_events(message: Message) -> list[LoggedEvent]:
    """What a message of the log says, event by event."""
    judged = frames.judge(message.subject, message.data, message.headers)
    time_ms = message.time_ns // 1_000_000
    if judged.whole is not None:
        return [LoggedEvent(message.seq, -1, time_ms, judged.kind, judged.actor, None, judged.whole)]
    return [
        LoggedEvent(message.seq, index, time_ms, judged.kind, judged.actor, None, item)
        if isinstance(item, Bad)
        else LoggedEvent(message.seq, index, time_ms, judged.kind, judged.actor, item, None, judged.decision)
        for index, item in enumerate(judged.items)
    ]
