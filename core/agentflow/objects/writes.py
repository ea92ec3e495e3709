"""Writes that are repeated until they are acknowledged, and the pauses between attempts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

from agentflow.bus import Bus, Reply
from agentflow.errors import AppendRefused, AppendUnknown, Disconnected, OperatingError
from agentflow.log.publisher import NO_RESPONDERS, ApiError, PubAck, Publisher, read_ack

REPEAT_S_MAX: Final = 60.0
"""Repeating ends by then, while the server surely remembers the message ids."""
# A lost connection is told at once; this is for answers lost on a living one.
_ATTEMPT_TIMEOUT_S: Final = 20.0
_PAUSE_S_FIRST: Final = 0.01
_PAUSE_S_MAX: Final = 0.5

_TRANSIENT: Final = frozenset(
    {
        NO_RESPONDERS,  # no stream, or one without a leader at the moment
        429,  # too many requests
        10008,  # JetStream is temporarily unavailable
        10009,  # the server asked is not the leader
        10158,  # the message id is in process
        10164,  # another write to the subject is in flight
    }
)


class Writes:
    """Stores messages for good. Calls `on_no_stream` whenever a write finds nobody to store it."""

    def __init__(self, bus: Bus, on_no_stream: Callable[[], None]) -> None:
        self._bus = bus
        self._publisher = Publisher(bus)
        self._on_no_stream = on_no_stream

    async def settle(self, writes: Sequence[Write]) -> None:
        """Send in order, and again what is unknown, byte for byte, until all are stored.

        Raises AppendRefused, AppendUnknown.
        """
        deadline = now() + REPEAT_S_MAX
        pauses = Pauses()
        while unsettled := [write for write in writes if not write.seq]:
            try:
                await self._bus.wait_connected(max(deadline - now(), 0.0))
                await self._send(unsettled)
            except Disconnected as error:
                for write in unsettled:
                    write.in_doubt |= write.answer is not None
                    write.detail = str(error)
            if all(write.seq for write in unsettled):
                return
            if now() > deadline:
                raise _given_up(unsettled)
            await pauses.wait()

    async def _send(self, writes: Sequence[Write]) -> None:
        await self._bus.wait_writable()
        for write in writes:
            write.answer = self._publisher.send(
                write.subject, write.data, write.headers, timeout_s=_ATTEMPT_TIMEOUT_S
            )
        # Unlike awaiting them this leaves the answers alone when we are cancelled.
        await asyncio.wait([write.answer for write in writes if write.answer is not None])
        for write in writes:
            write.judge()
            if write.code == NO_RESPONDERS:
                self._on_no_stream()


class Write:
    """A message to store, and what is known of its fate."""

    def __init__(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        self.subject: Final = subject
        self.data: Final = data
        self.headers: Final = headers
        self.answer: asyncio.Future[Reply | None] | None = None
        """To the last attempt."""
        self.seq = 0
        """Where it is stored; 0: not known yet."""
        self.in_doubt = False
        """Whether an attempt was sent whose fate is unknown."""
        self.code = 0
        self.detail = "no attempt was made"

    def judge(self) -> None:
        """Take note of the answer. Raises AppendRefused if it is final."""
        assert self.answer is not None, "nothing was sent"
        match read_ack(self.answer.result()):
            case PubAck(seq=seq):
                self.seq = seq
                self.code = 0
            case ApiError(code=code, err_code=err_code, description=description):
                self.code = err_code or code
                self.detail = description
                if self.code not in _TRANSIENT:
                    raise AppendRefused(self.code, f"{self.subject}: {description}")
            case None:
                self.in_doubt = True
                self.code = 0
                self.detail = "no acknowledgement came"


class Pauses:
    """Growing, jittered pauses between attempts."""

    def __init__(self) -> None:
        self._limit_s = _PAUSE_S_FIRST

    async def wait(self) -> None:
        """Wait a while, longer each time."""
        await asyncio.sleep(random.uniform(0, self._limit_s))
        self._limit_s = min(self._limit_s * 2, _PAUSE_S_MAX)


def _given_up(unsettled: Sequence[Write]) -> OperatingError:
    """The error when time has run out."""
    worst = next((write for write in unsettled if write.in_doubt), unsettled[0])
    text = f"{len(unsettled)} messages, first on {worst.subject}: {worst.detail}"
    if worst.in_doubt:
        return AppendUnknown(f"not acknowledged within {REPEAT_S_MAX} s: {text}")
    return AppendRefused(worst.code, text) if worst.code else Disconnected(f"not sent: {text}")


def now() -> float:
    """The event loop's clock."""
    return asyncio.get_running_loop().time()
