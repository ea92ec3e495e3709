"""The past as a scene wrote it, for whoever reads history."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

from agentflow.domain.snapshot import hash_of, snapshot
from agentflow.domain.state import Namespace
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Frame, Message, Trim
from agentflow.objects import MemoryObjectStore
from agentflow.objects.kept import keep_messages
from agentflow_projections.chain import START, chained
from tests.unit.given import NAMESPACE, Logged, fold_all


class Told:
    """A past out of messages, handed over `batch` at a time."""

    def __init__(self, messages: Sequence[Logged], *, batch: int = 7) -> None:
        self.namespace: Final = NAMESPACE
        self._messages = messages_of(messages)
        self._batch = batch

    @property
    def last_seq(self) -> int:
        return self._messages[-1].seq if self._messages else 0

    def begin(self) -> Namespace:
        return Namespace(NAMESPACE)

    async def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        for start in range(after, len(self._messages), self._batch):
            yield self._messages[start : start + self._batch]


def messages_of(found: Sequence[Logged]) -> list[Message]:
    return [Message(each.seq, each.time_ns, each.subject, each.data, each.headers) for each in found]


@asynccontextmanager
async def trimmed_log(
    messages: Sequence[Logged], seq: int, *, snapshot_seq: int | None = None, kept: Collection[int] = ()
) -> AsyncGenerator[tuple[MemoryLog, MemoryObjectStore]]:
    """A log trimmed up to a sequence, and the objects with what stands for that: a snapshot, and messages kept."""
    server, objects, told = MemoryServer(), MemoryObjectStore(), messages_of(messages)
    stream = server.create(NAMESPACE)
    for each in told:
        stream.store(Frame(each.subject, each.data, None, each.headers), None, each.time_ns)
    chain, state = START, fold_all(messages[: snapshot_seq or seq])
    for each in told[: snapshot_seq or seq]:
        chain = chained(chain, each)
    data = snapshot(state)
    async with MemoryLog(server, NAMESPACE) as log:
        await log.trim(
            Trim(
                seq,
                state.seq,
                await objects.put(data),
                digest=hash_of(data),
                chain=chain.hex(),
                level=state.level,
                kept=await keep_messages(objects, (told[each - 1] for each in sorted(kept))),
            )
        )
        yield log, objects
