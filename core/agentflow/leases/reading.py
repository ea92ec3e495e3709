"""Reading all leases under a pattern, in an answer that is surely new enough.

The quick way is one request to whichever replica hears it first, for the last message of each
key (`multi_last`). It says up to which sequence it looked, and counts only if that is no
older than a barrier: the last sequence of the bucket's leader, asked for before, or, with
one replica only, what was acknowledged to us. It is taken where all replicas let go of a
silent key at the same place in the stream (see `bucket`). What that way cannot answer (nothing found:
such an answer names no sequence; more keys than it takes; a replica that stays behind) the
leader is asked itself, for the list of keys and each of them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus, Subscription
from agentflow.connection import STATUS
from agentflow.errors import Disconnected, LogGone
from agentflow.log.port import Message
from agentflow.log.stream import NO_STREAM, ApiFailed, ask_again, get_message

_TIMEOUT_S: Final = 2.0
_ATTEMPTS_MAX: Final = 3
_PARALLEL_MAX: Final = 100
_PAGES_MAX: Final = 100

_END: Final = "204"
_UP_TO: Final = "Nats-UpTo-Sequence"
_SUBJECT: Final = "Nats-Subject"
_TIME: Final = "Nats-Time-Stamp"


class Last(Struct, frozen=True):
    """The last message of each subject under a pattern; removals may be left out."""

    revision: int
    """Nothing after it is missing that was there before."""
    messages: Sequence[Message]


class _State(Struct, frozen=True):
    last_seq: int
    subjects: dict[str, int] = {}


class _Info(Struct, frozen=True):
    state: _State
    total: int = 0


async def read_last(
    bus: Bus, stream: str, subject: str, acked: int, *, replicated: bool, uniform: bool
) -> Last:
    """The last message of each subject under a pattern, no older than `acked`. Raises LogGone, Disconnected.

    `uniform`: whether all replicas let go of the same keys at the same place in the stream.
    """
    if not uniform:
        return await _ask_leader(bus, stream, subject)
    barrier = acked
    if replicated:
        barrier = max(barrier, (await _info(bus, stream, {})).state.last_seq)
    for _ in range(_ATTEMPTS_MAX):
        found = await _ask_any(bus, stream, subject)
        if found is None:
            break
        if found.revision >= barrier:
            return found
    return await _ask_leader(bus, stream, subject)


async def _ask_any(bus: Bus, stream: str, subject: str) -> Last | None:
    """What one replica knows; None if it cannot tell."""
    answer = _Answer()
    inbox = bus.new_inbox()
    subscription: Subscription | None = None
    unwatch = bus.watch(answer.on_connection)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await bus.wait_connected()
            subscription = await bus.subscribe(inbox, answer.on_message)
            request = msgspec.json.encode({"multi_last": [subject]})
            bus.publish(f"$JS.API.DIRECT.GET.{stream}", request, reply=inbox)
            return await answer.whole
    except TimeoutError as error:
        raise Disconnected(f"no answer from {stream} within {_TIMEOUT_S} s") from error
    finally:
        unwatch()
        if subscription is not None:
            subscription.end()


class _Answer:
    """Messages arriving one by one, until one says that it was the last."""

    def __init__(self) -> None:
        self.whole: Final[asyncio.Future[Last | None]] = asyncio.get_running_loop().create_future()
        self._messages: list[Message] = []

    def on_message(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        del subject, reply
        headers = headers or {}
        status = headers.get(STATUS, "")
        if not status:
            if wire.KV_OPERATION not in headers:  # a busy line leaves many removals behind
                time_ns = _time_ns(headers[_TIME])
                self._messages.append(
                    Message(int(headers[wire.SEQUENCE]), time_ns, headers[_SUBJECT], data, headers)
                )
        elif not self.whole.done():
            # Any other status ends it without having told everything.
            whole = Last(int(headers[_UP_TO]), self._messages) if status == _END else None
            self.whole.set_result(whole)

    def on_connection(self, connected: bool) -> None:  # noqa: FBT001 - the bus's callback
        if not connected and not self.whole.done():
            self.whole.set_exception(Disconnected("the connection was lost"))


async def _ask_leader(bus: Bus, stream: str, subject: str) -> Last:
    info = await _info(bus, stream, {"subjects_filter": subject})
    subjects = list(info.state.subjects)
    for _ in range(_PAGES_MAX):
        if len(subjects) >= info.total:
            break
        page = await _info(bus, stream, {"subjects_filter": subject, "offset": len(subjects)})
        subjects += page.state.subjects
    messages: list[Message] = []
    for start in range(0, len(subjects), _PARALLEL_MAX):
        messages += await _ask_each(bus, stream, subjects[start : start + _PARALLEL_MAX])
    return Last(info.state.last_seq, messages)


async def _ask_each(bus: Bus, stream: str, subjects: Sequence[str]) -> list[Message]:
    get = functools.partial(get_message, bus, stream, timeout_s=_TIMEOUT_S)
    found = await asyncio.gather(*(get({"last_by_subj": subject}) for subject in subjects))
    return [message for message in found if message is not None]


async def _info(bus: Bus, stream: str, payload: dict[str, str | int]) -> _Info:
    try:
        return await ask_again(bus, f"STREAM.INFO.{stream}", payload, _Info, _TIMEOUT_S)
    except ApiFailed as failed:
        if failed.error.err_code == NO_STREAM:
            raise LogGone(f"there is no stream {stream}") from failed
        raise Disconnected(str(failed)) from failed


def _time_ns(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time, exact to the microsecond: ten times as fast as exact ones."""
    return int(datetime.fromisoformat(text).timestamp() * 1e6) * 1_000
