"""What is seen of the log while faults strike: read live, straight from the servers.

The watch chains a hash over all it reads, remembers who was elected last, and asks the leader
again and again what it knows of some tasks. The audit reads the log anew and must come to the
same hashes and to the same answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from array import array
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import agentflow
from agentflow import frames, wire
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LogGone
from agentflow.events import LeaderElected, TaskSubmitted, WorkflowSubmitted
from agentflow.ids import in_workflow
from agentflow.log.port import Message
from tests.chaos.journal import Journal

_ASK_EVERY_S: Final = 0.5
_LOOK_EVERY_S: Final = 1.0
_ASKED_MAX: Final = 40
_RECENT: Final = 400
_CHAIN_BYTES: Final = 8


class Chain:
    """A hash over everything that makes messages what they are, each including all before it."""

    def __init__(self) -> None:
        self._last = b""

    def add(self, message: Message) -> int:
        """The chain's value at this message."""
        hashed = hashlib.sha256(self._last)
        headers = sorted((message.headers or {}).items())
        for part in (message.seq, message.time_ns, message.subject, headers, len(message.data)):
            hashed.update(repr(part).encode() + b"\n")
        hashed.update(message.data)
        self._last = hashed.digest()
        return int.from_bytes(self._last[:_CHAIN_BYTES])


class Watch:
    """Reads, asks and looks until it is left. An async context manager."""

    def __init__(self, client: agentflow.Client, folder: Path, chance: random.Random) -> None:
        self.client: Final = client
        self.hashes: Final = array("Q")
        """The chain's value at each sequence from 1 on."""
        self.leader = ""
        """Who was elected last."""
        self.elections = 0
        self.events = 0
        self.ended = 0
        """Attempts reported, roughly the tasks done."""
        self.gone = ""
        """Why the log is not the one it was."""
        self._chance = chance
        self._chain = Chain()
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._answers = Journal(folder / "answers.jsonl")
        self._identities = Journal(folder / "identities.jsonl")
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(act()) for act in (self._read, self._ask_on, self._look_on)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks(*self._tasks)
        self._answers.close()
        self._identities.close()

    @property
    def last_seq(self) -> int:
        """How far it has read."""
        return len(self.hashes)

    async def _read(self) -> None:
        try:
            async for messages in self.client.log.follow(0):
                for message in messages:
                    self._take(message)
        except LogGone as error:
            self.gone = str(error)

    def _take(self, message: Message) -> None:
        self.hashes.append(self._chain.add(message))
        route = wire.parse_event(message.subject)
        kind = route.kind if route is not None else ""
        if kind == LeaderElected.kind:
            self._elected(message)
        elif kind in {"task.completed", "task.failed"}:
            self.ended += message.data.count(b'"attempt":')
        elif kind in {TaskSubmitted.kind, WorkflowSubmitted.kind} and self._chance.random() < 0.2:
            self._note(message)

    def _elected(self, message: Message) -> None:
        for item in frames.judge(message.subject, message.data, message.headers).items:
            if isinstance(item, LeaderElected):
                self.leader = item.master
                self.elections += 1

    def _note(self, message: Message) -> None:
        """Remember some of what is submitted, to ask for it later."""
        items = frames.judge(message.subject, message.data, message.headers).items
        item = self._chance.choice(items) if items else None
        if isinstance(item, TaskSubmitted) and item.id:
            self._recent.append(item.id)
        elif isinstance(item, WorkflowSubmitted) and item.id and item.tasks:
            self._recent += [item.id, in_workflow(item.id, self._chance.choice(item.tasks).task_id)]

    async def ask(self, wanted: list[str]) -> str:
        """Ask the leader what it knows, and write the answer down; who it was. Raises Disconnected."""
        reply = await self.client.status(wanted)
        statuses = [[each.id, each.state, each.seq, each.index] for each in reply.statuses]
        self._answers.write(master=reply.leader, seq=reply.seq, statuses=statuses)
        return reply.leader

    def sample(self, count: int) -> list[str]:
        """Some ids of what was submitted lately."""
        return self._chance.sample(list(self._recent), min(count, len(self._recent)))

    async def _ask_on(self) -> None:
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            if self._recent:
                with contextlib.suppress(AgentFlowError):
                    await self.ask(self.sample(_ASKED_MAX))

    async def _look_on(self) -> None:
        while True:
            with contextlib.suppress(AgentFlowError):
                await self.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> Any:
        """Write down which log this is now, and how long. Raises Disconnected, LogGone."""
        identity = await self.client.log.identity()
        self._identities.write(
            name=identity.name,
            created_ns=identity.created_ns,
            first_seq=identity.first_seq,
            last_seq=identity.last_seq,
        )
        return identity
