"""Asking the query service over NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from agentflow import wire
from agentflow.bus import Bus, Reply
from agentflow.errors import Disconnected, InvalidRequest, OperatingError
from agentflow_projections.sandbox import DeadlineExceeded, Overloaded
from agentflow_projections.service import Request

_SILENCE_S: Final = 5.0
"""A service that says nothing for so much longer than it may is taken for gone."""
_NO_RESPONDERS: Final = "503"
_ERRORS: Final[dict[str, type[Exception]]] = {
    "invalid": InvalidRequest,
    "overloaded": Overloaded,
    "deadline": DeadlineExceeded,
}

Part = dict[str, Any] | bytes
"""A part of an answer: an object, or a piece of an Arrow IPC stream."""


async def ask_service(bus: Bus, namespace: str, request: Request) -> AsyncGenerator[Part, None]:
    """The answer, part by part; the last one has "end".

    Raises Disconnected if nobody answers, InvalidRequest, Overloaded, DeadlineExceeded,
    OperatingError.
    """
    arrived: asyncio.Queue[Reply] = asyncio.Queue()
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(
        inbox, lambda _subject, data, _reply, headers: arrived.put_nowait(Reply(data, headers))
    )
    try:
        subject = wire.service(namespace, wire.QUERY_SERVICE)
        bus.publish(subject, msgspec.json.encode(request), reply=inbox)
        number, ended = 0, False
        while not ended:
            part = _part(await _next(arrived, request.timeout_s + _SILENCE_S), number)
            ended = isinstance(part, dict) and "end" in part
            yield part
            number += 1
    finally:
        subscription.end()


async def _next(arrived: asyncio.Queue[Reply], timeout_s: float) -> Reply:
    try:
        return await asyncio.wait_for(arrived.get(), timeout_s)
    except TimeoutError as error:
        raise Disconnected(f"the query service said nothing for {timeout_s:g} s") from error


def _part(reply: Reply, number: int) -> Part:
    if reply.status == _NO_RESPONDERS:
        raise Disconnected("no query service answers")
    headers = reply.headers or {}
    if headers.get(wire.QUERY_PART) != str(number):
        raise OperatingError(f"a part of the answer was lost: expected {number}, found {headers}")
    if headers.get(wire.QUERY_FORM) == "arrow":
        return reply.data
    part: dict[str, Any] = msgspec.json.decode(reply.data)
    error = part.get("error")
    if error is not None:
        raise _ERRORS.get(error["kind"], OperatingError)(error["message"])
    return part
