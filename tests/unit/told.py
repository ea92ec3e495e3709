"""The past as a scene wrote it, for whoever reads history."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Final

from agentflow.domain.state import Namespace
from agentflow.log.port import Message
from tests.unit.given import NAMESPACE, Logged


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
