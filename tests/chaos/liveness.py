"""After the last fault is healed: does everything come to its end, and does every master agree?

All of this is asked of the cluster itself. Each finding becomes a row for the audit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from agentflow import wire
from agentflow.errors import AgentFlowError
from tests.chaos.cluster import Cluster
from tests.chaos.journal import Journal
from tests.chaos.nodes import Node
from tests.chaos.options import NAMESPACE

_LOOK_EVERY_S: Final = 0.1
_ASKED: Final = 400
_ANSWERS_S: Final = 0.5
"""How long answers are collected of whoever believes to lead."""
_SUCCESSION_S: Final = 30.0
_BACKLOG_TASKS_PER_S: Final = 1_000
"""What is still to do when the last fault is healed may take longer: a second for so many tasks."""
_SHOWN: Final = 300

_decode: Final = msgspec.json.decode


class Liveness:
    """The questions, and what was found."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._watch = cluster.watch
        self._journal = Journal(cluster.folder / "liveness.jsonl")
        self._heard: dict[str, dict[str, int]] = {}
        self.settled_s = 0.0
        """How long after the last fault all work had ended."""

    async def check(self, healed: float) -> None:
        """Ask everything. `healed` is when the last fault was."""
        within_s = self._cluster.options.liveness_s + await self._backlog() / _BACKLOG_TASKS_PER_S
        await self._watch.client.bus.subscribe(wire.heartbeat(NAMESPACE, "*"), self._on_heartbeat)
        await self._found("clients ended", within_s, self._clients_ended)
        left_s = healed + within_s - time.monotonic()
        await self._found("all work ended", max(left_s, _SUCCESSION_S), self._all_ended)
        self.settled_s = time.monotonic() - healed
        await self._found("workers idle", within_s, self._workers_idle)
        await self._found("leader has folded all", within_s, self._caught_up)
        await self._found("exactly one leader", within_s, self._one_leader)
        await self._succession()
        await self._found("watch has read all", within_s, self._watch_caught_up)
        self._journal.close()

    async def _backlog(self) -> int:
        """Tasks still to do: as the leader says, or all if nobody leads yet."""
        try:
            return int((await self._queue())["open"])
        except AgentFlowError:
            return self._cluster.options.tasks

    async def _found(self, what: str, within_s: float, look: Callable[[], Awaitable[str]]) -> None:
        """Look until it is so, which an empty text says; write down whether it was in time."""
        until = time.monotonic() + within_s
        while True:
            try:
                wrong = await look()
            except (AgentFlowError, TimeoutError) as error:
                wrong = repr(error)
            if not wrong or time.monotonic() > until:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        self._journal.write(what=what, ok=not wrong, detail=wrong[:_SHOWN])

    async def _clients_ended(self) -> str:
        going = [node.name for node in self._cluster.clients if not node.done]
        return f"still at it: {going}" if going else ""

    async def _all_ended(self) -> str:
        queue = await self._queue()
        return "" if queue["open"] == 0 else f"{queue}"

    async def _queue(self) -> dict[str, Any]:
        data = await self._watch.client.bus.request(wire.service(NAMESPACE, "queue"), b"", 2.0)
        found: dict[str, Any] = _decode(data)
        return found

    async def _workers_idle(self) -> str:
        names = {node.name for node in self._cluster.workers}
        busy = {name: beat for name, beat in self._heard.items() if beat["running"] or beat["queued"]}
        silent = names - self._heard.keys()
        return f"busy: {busy}, silent: {silent}" if busy or silent else ""

    def _on_heartbeat(self, subject: str, data: bytes, _reply: str, _headers: object) -> None:
        self._heard[subject.rpartition(".")[2]] = _decode(data)

    async def _caught_up(self) -> str:
        queue = await self._queue()
        last_seq = (await self._watch.look()).last_seq
        return "" if queue["seq"] == last_seq else f"folded {queue['seq']} of {last_seq}"

    async def _one_leader(self) -> str:
        answers: list[str] = []
        bus = self._watch.client.bus
        inbox = bus.new_inbox()
        subscription = await bus.subscribe(
            inbox, lambda _subject, data, _reply, _headers: answers.append(_decode(data)["leader"])
        )
        bus.publish(wire.service(NAMESPACE, "queue"), b"", reply=inbox)
        await asyncio.sleep(_ANSWERS_S)
        await subscription.unsubscribe()
        return "" if len(answers) == 1 else f"{len(answers)} answered: {answers}"

    async def _watch_caught_up(self) -> str:
        last_seq = (await self._watch.look()).last_seq
        gone = self._watch.gone
        return gone or ("" if self._watch.last_seq >= last_seq else f"{self._watch.last_seq} of {last_seq}")

    async def _succession(self) -> None:
        """Let each master lead once, with the state it has kept through all the faults, and ask it.

        Those asked are paused, until one that was not asked leads.
        """
        waiting = {node.name: node for node in self._cluster.masters}
        wanted = self._watch.sample(_ASKED)
        until = time.monotonic() + _SUCCESSION_S * len(waiting)
        paused: list[Node] = []
        while waiting and time.monotonic() < until:
            leader = await self._ask(wanted)
            node = waiting.pop(leader, None)
            if node is not None and waiting:
                node.pause()
                paused.append(node)
            await asyncio.sleep(_LOOK_EVERY_S)
        for node in paused:
            node.go_on()
        self._journal.write(what="every master leads in turn", ok=not waiting, detail=f"not {list(waiting)}")

    async def _ask(self, wanted: list[str]) -> str:
        try:
            return await self._watch.ask(wanted)
        except AgentFlowError:
            return ""
