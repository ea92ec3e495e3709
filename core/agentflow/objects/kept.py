"""Messages that open work still needs though the log was trimmed: kept in the object store."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from agentflow.errors import ObjectMissing
from agentflow.log.port import KeptMessages, Log, Message, Trim
from agentflow.objects.port import Objects

KEPT_BYTES_MAX: Final = 8 * 1024 * 1024
"""So much data is kept in one object, about: who needs one message reads all of it."""

_READS_AT_ONCE: Final = 64

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(list[Message])


async def keep_messages(objects: Objects, messages: Iterable[Message]) -> tuple[KeptMessages, ...]:
    """Put messages, which come in order, into the object store. Raises as `Objects.put` does."""
    kept: list[KeptMessages] = []
    part: list[Message] = []
    size = 0
    for message in messages:
        part.append(message)
        size += len(message.data)
        if size >= KEPT_BYTES_MAX:
            kept.append(await _keep(objects, part))
            part, size = [], 0
    if part:
        kept.append(await _keep(objects, part))
    return tuple(kept)


async def _keep(objects: Objects, messages: Sequence[Message]) -> KeptMessages:
    ref = await objects.put(_encoder.encode(messages))
    return KeptMessages(messages[0].seq, messages[-1].seq, ref)


async def read_message(log: Log, objects: Objects, seq: int) -> Message | None:
    """The message at a position: in the log, or kept when that was trimmed. None if it is nowhere.

    Raises Disconnected, LogGone.
    """
    return (await read_many(log, objects, [seq])).get(seq)


async def read_many(log: Log, objects: Objects | None, positions: Iterable[int]) -> dict[int, Message]:
    """The same of several positions, each object read once. Raises Disconnected, LogGone."""
    wanted, found = sorted(set(positions)), dict[int, Message]()
    for start in range(0, len(wanted), _READS_AT_ONCE):
        some = await asyncio.gather(*map(log.read, wanted[start : start + _READS_AT_ONCE]))
        found |= {message.seq: message for message in some if message is not None}
    before: Trim | None = None
    while objects is not None and (missing := [seq for seq in wanted if seq not in found]):
        trim = (await log.identity()).trim
        if trim is None or trim == before:
            break
        found |= await read_kept(objects, trim, missing)
        before = trim  # another may have taken its place while we read
    return found


async def read_kept(objects: Objects, trim: Trim, positions: Collection[int]) -> dict[int, Message]:
    """The messages at these positions that were kept at a trim, each object read once. Raises Disconnected."""
    found: dict[int, Message] = {}
    for each in trim.kept:
        wanted = {seq for seq in positions if each.first_seq <= seq <= each.last_seq}
        if wanted:
            with suppress(ObjectMissing, msgspec.DecodeError):
                messages = _decoder.decode(await objects.get(each.messages))
                found |= {message.seq: message for message in messages if message.seq in wanted}
    return found
