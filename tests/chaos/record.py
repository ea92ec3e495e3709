"""The log as a file: read from its beginning, kept as it was read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import msgspec

import agentflow
from agentflow import frames
from agentflow.errors import AgentFlowError, ObjectMissing
from agentflow.events import ObjectRef
from agentflow.log.port import Message
from tests.chaos.journal import Journal

LOG: Final = "log.bin"
_LENGTH_BYTES: Final = 4
_MENTIONS_OBJECT: Final = b'"object":'
_OBJECTS_MAX: Final = 2_000

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Message).decode


async def record(client: agentflow.Client, folder: Path) -> int:
    """Read the log up to its present end into a file, and what it refers to; how many messages."""
    last_seq = (await client.log.identity()).last_seq
    messages = 0
    objects = _Objects(client, Journal(folder / "objects.jsonl"))
    with (folder / LOG).open("wb") as file:
        reading: Any = client.log.follow(0)
        async with aclosing(reading) as batches:
            async for batch in batches:
                for message in batch:
                    data = _encode(message)
                    file.write(len(data).to_bytes(_LENGTH_BYTES))
                    file.write(data)
                    if _MENTIONS_OBJECT in message.data:
                        await objects.check(message)
                messages += len(batch)
                if batch[-1].seq >= last_seq:
                    return messages
    raise AssertionError("a log never ends")


def recorded(folder: Path) -> Iterator[Message]:
    """The messages of a recorded log."""
    with (folder / LOG).open("rb") as file:
        while length := file.read(_LENGTH_BYTES):
            yield _decode(file.read(int.from_bytes(length)))


class _Objects:
    """Fetches what the log refers to: its bytes must be those that the reference names."""

    def __init__(self, client: agentflow.Client, journal: Journal) -> None:
        self._client = client
        self._journal = journal
        self._seen: set[str] = set()

    async def check(self, message: Message) -> None:
        judged = frames.judge(message.subject, message.data, message.headers)
        for item in judged.items:
            ref = getattr(item, "object", None)
            if isinstance(ref, ObjectRef) and ref.name not in self._seen and len(self._seen) < _OBJECTS_MAX:
                self._seen.add(ref.name)
                self._journal.write(seq=message.seq, name=ref.name, wrong=await self._wrong(ref))

    async def _wrong(self, ref: ObjectRef) -> str:
        try:
            await self._client.objects.get(ref)
        except (ObjectMissing, AgentFlowError) as error:
            return str(error)
        return ""
