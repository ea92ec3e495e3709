"""Acknowledged publishing: what every write to a JetStream stream goes through."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from msgspec import Struct

from agentflow.bus import Bus
from agentflow.connection import Headers
from agentflow.inbox import Reply

NOT_PERMITTED: Final = 403
NO_RESPONDERS: Final = 503


class PubAck(Struct, frozen=True, gc=False):
    """The stream stored the message (or, with `duplicate`, held its message id already)."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    batch: str = ""
    count: int = 0
    """Messages in the batch that this commits."""


class ApiError(Struct, frozen=True, gc=False):
    """The stream refused. Also our own: 403 not permitted, 503 no stream takes that subject."""

    code: int = 0
    err_code: int = 0
    description: str = ""


Ack = PubAck | ApiError | None
"""None: unknown; nothing was heard in time, or the connection was lost meanwhile."""


class _Answer(PubAck, frozen=True, gc=False):
    error: ApiError | None = None


_decode: Final = msgspec.json.Decoder(_Answer).decode


class Publisher:
    """Publishes to streams and waits for the acknowledgement."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def publish(
        self, subject: str, data: bytes, headers: Headers | None = None, *, timeout_s: float
    ) -> Ack:
        """Send once and wait. Raises Disconnected only if nothing was sent."""
        await self._bus.wait_writable()
        return read_ack(await self.send(subject, data, headers, timeout_s=timeout_s))

    def send(
        self, subject: str, data: bytes, headers: Headers | None = None, *, timeout_s: float
    ) -> asyncio.Future[Reply | None]:
        """Send once, now; `read_ack` understands the future's result. Raises Disconnected."""
        return self._bus.ask(subject, data, headers, timeout_s=timeout_s)


def read_ack(reply: Reply | None) -> Ack:
    """What a stream's answer says. An empty one accepts a message into an open batch."""
    if reply is None:
        return None
    if reply.status:
        return ApiError(int(reply.status), 0, reply.description or "no stream takes this subject")
    if not reply.data:
        return PubAck()
    try:
        answer = _decode(reply.data)
    except msgspec.DecodeError:
        return None  # somebody else's message: it says nothing about ours
    return answer if answer.error is None else answer.error
