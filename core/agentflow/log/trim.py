"""Removing the beginning of a stream, once it is archived.

First it is written down, in the stream's own metadata, up to where: from then on nobody takes
what lies before for granted, and who finds the log shorter than he knew it learns why. Only
then is anything removed. Interrupted in between, the same call again does the rest.

Two kinds of messages stay whatever their age. All decisions of a leader are fenced by the
last election: with it gone they would be refused, and those of nobody accepted. And the
generations of the bucket of locks: tokens rise above all of them.

Somebody else's purge is told from this: it leaves the log beginning after the place that
was written down.
"""

from __future__ import annotations

from typing import Any, Final

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, InvalidRequest
from agentflow.log.port import Message, Trim
from agentflow.log.stream import (
    ApiFailed,
    StreamInfo,
    ask_again,
    get_message,
    stream_info,
    with_trim,
)

_API_TIMEOUT_S: Final = 30.0
"""Removing many messages, subject by subject, takes its time."""
_INFO_TIMEOUT_S: Final = 5.0
_STEP_BYTES: Final = 32 * 1024 * 1024
"""About so much is removed at a time: the server takes what it looks through into its memory."""


async def trim(bus: Bus, namespace: str, to: Trim) -> int:
    """Write down where the log begins from now on, and remove what lies before; how many messages were.

    Raises InvalidRequest if it was trimmed further, or has no snapshot for what is removed;
    LogGone, Disconnected.
    """
    name = wire.stream(namespace)
    info = await stream_info(bus, name, _INFO_TIMEOUT_S)
    check_trim(info.identity.trim, to)
    if info.identity.trim != to:
        await _ask(bus, f"STREAM.UPDATE.{name}", with_trim(info.config, to))
    found = info.identity.trim
    begin = found.seq if found is not None and found != to else 0
    removed = 0
    for seq in _steps(info, begin, to.seq):
        removed += await _remove(bus, namespace, seq)
    return removed


def _steps(info: StreamInfo, begin: int, seq: int) -> list[int]:
    """The sequences up to which to remove, one after the other; what lies before `begin` is gone."""
    steps = 1 + info.state.bytes // _STEP_BYTES
    length = max(1, -(-(seq - begin) // steps))
    return [*range(begin + length, seq, length), seq]


def check_trim(found: Trim | None, to: Trim) -> None:
    """Raise InvalidRequest unless this may follow that."""
    if to.snapshot_seq < to.seq:
        raise InvalidRequest(
            f"trimming up to {to.seq} needs a snapshot of it, found one of {to.snapshot_seq}"
        )
    if found is not None and (to.seq < found.seq or to.snapshot_seq < found.snapshot_seq):
        raise InvalidRequest(
            f"the log was trimmed up to {found.seq}, with a snapshot of {found.snapshot_seq};"
            f" it cannot be trimmed up to {to.seq} with one of {to.snapshot_seq}"
        )


async def _remove(bus: Bus, namespace: str, seq: int) -> int:
    """Remove everything up to a sequence but what stays."""
    name = wire.stream(namespace)
    elected, opened = wire.elected(namespace), wire.locks_opened(namespace)
    election = await get_message(bus, name, {"last_by_subj": elected}, _INFO_TIMEOUT_S)
    generation = await get_message(bus, name, {"seq": 1, "next_by_subj": opened}, _INFO_TIMEOUT_S)
    kept = min(_before(election, seq), _before(generation, seq))
    # What lies before all that stays goes at once; the rest subject by subject.
    removed = await _purge(bus, name, {"seq": kept}) if kept > 1 else 0
    if kept > seq:
        return removed
    for subject in await _subjects(bus, name):
        if subject == elected:
            removed += await _purge(bus, name, {"seq": _before(election, seq), "filter": subject})
        elif subject != opened:
            removed += await _purge(bus, name, {"seq": seq + 1, "filter": subject})
    return removed


def _before(message: Message | None, seq: int) -> int:
    """The sequence before which all may go: that of the message, if it lies in what is removed."""
    return seq + 1 if message is None else min(message.seq, seq + 1)


async def _subjects(bus: Bus, name: str) -> list[str]:
    """All subjects a stream holds messages on."""
    found: list[str] = []
    while True:
        query = {"subjects_filter": ">", "offset": len(found)}
        try:
            page = await ask_again(bus, f"STREAM.INFO.{name}", query, StreamInfo, _API_TIMEOUT_S)
        except ApiFailed as failed:
            raise Disconnected(str(failed)) from failed
        named = page.state.subjects or {}
        found += named
        if not named or len(found) >= page.total:
            return found


async def _purge(bus: Bus, name: str, query: dict[str, Any]) -> int:
    answer = await _ask(bus, f"STREAM.PURGE.{name}", query)
    purged: int = answer.get("purged", 0)
    return purged


async def _ask(bus: Bus, request: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Each of these requests may be repeated."""
    try:
        return await ask_again(bus, request, payload, dict[str, Any], _API_TIMEOUT_S)
    except ApiFailed as failed:
        raise Disconnected(str(failed)) from failed
