"""Simulated clients: they submit, repeat, cancel and reprioritise, and keep a journal.

An intent is noted before it is sent. What was acknowledged is `ok`; what was certainly not
stored is `refused`; everything else is `unknown`, which never counts as lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from agentflow.errors import AppendRefused, AppendUnknown
from agentflow.events import (
    Event,
    Needs,
    Retry,
    TaskCancelRequested,
    TaskReprioritized,
    TaskSubmitted,
    WorkflowCancelRequested,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.writer import Writer
from tests.sim.bodies import FUNCTIONS, Body
from tests.sim.cluster import Cluster
from tests.sim.network import Link, SimLog

PATIENCE_S: Final = 5.0
_KNOWN_MAX: Final = 400
"""Ids of its own that a client remembers, for doing something with them."""
_FLOW_TASKS_MAX: Final = 30
_REPEATS_MAX: Final = 8
_BURSTS: Final = 12
"""The largest bursts hand over this part of the quota."""
_PAUSE_S: Final = 1.2
"""Mean time between two bursts."""


class Intent(Struct):
    """One submission of a task or workflow."""

    id: str
    tasks: Sequence[str]
    """The ids of the tasks it creates."""
    fate: str = "intended"
    """ok, refused, unknown; "intended" if the client died over it."""
    seq: int = 0
    """Of the message that holds it, if ok."""
    refused_seq: int = 0
    """Where the log ended when it was refused, nothing having been unknown before."""


class SimClient:
    """One process of a client, which submits `quota` tasks and ends."""

    def __init__(self, cluster: Cluster, link: Link, name: str, quota: int) -> None:
        self._cluster = cluster
        self.name: Final = name
        self._chance = cluster.chance(f"client {name} {quota}")
        self._writer = Writer(SimLog(link), name, patience_s=PATIENCE_S, nonce=cluster.nonce())
        self._left = quota
        self._most = max(4, quota // _BURSTS)
        self._known: list[str] = []
        self._flows: list[str] = []
        self.intents: Final[list[Intent]] = []

    async def run(self) -> None:
        """Submit in bursts of all sizes."""
        async with self._writer:
            while self._left > 0:
                await self._act()
                await asyncio.sleep(self._chance.expovariate(1 / _PAUSE_S))

    async def _act(self) -> None:
        moves = {self._submit: 12, self._submit_flow: 4, self._cancel: 2, self._reprioritize: 1}
        (move,) = self._chance.choices(list(moves), list(moves.values()))
        await move()

    # Submitting.

    async def _submit(self) -> None:
        size = self._chance.choice((1, 1, 3, self._most // 4, self._most, self._most))
        terms = self._terms()
        tasks = [
            TaskSubmitted(id=self._cluster.new_id(), args=[self._body()], **terms)
            for _ in range(min(size, self._left))
        ]
        self._left -= len(tasks)
        await self._say([(task, Intent(task.id, (task.id,))) for task in tasks])
        self._remember([task.id for task in tasks])

    async def _submit_flow(self) -> None:
        size = min(self._chance.randint(2, _FLOW_TASKS_MAX), self._left)
        flow_id = self._cluster.new_id()
        tasks: list[WorkflowTask] = []
        for number in range(size):
            before = [task.task_id for task in tasks]
            needed = self._chance.sample(before, min(len(before), self._chance.choice((0, 1, 1, 2, 3))))
            tasks.append(self._flow_task(f"s{number}", needed))
        self._left -= size
        flow = WorkflowSubmitted(id=flow_id, tasks=tasks)
        await self._say([(flow, Intent(flow_id, [f"{flow_id}/{task.task_id}" for task in tasks]))])
        self._flows.append(flow_id)
        self._remember([f"{flow_id}/{task.task_id}" for task in tasks[:3]])

    def _flow_task(self, name: str, needed: list[str]) -> WorkflowTask:
        asks = needed and self._chance.random() < 0.5
        kwargs = {"given": {"$result": self._chance.choice(needed)}} if asks else {}
        return WorkflowTask(
            task_id=name, dependencies=needed, args=[self._body(flow=True)], kwargs=kwargs, **self._terms()
        )

    def _body(self, *, flow: bool = False) -> Body:
        chance = self._chance.random()
        if chance < 0.72:
            return Body(run_us=self._chance.choice((0, 0, 200, 2_000, 5_000)))
        if chance < 0.84:
            return Body(run_us=int(self._chance.expovariate(1 / 0.2) * 1e6))
        if chance < 0.88:
            return Body(run_us=self._chance.randint(1_000_000, 9_000_000))
        if chance < 0.998 or flow:
            return Body(
                run_us=self._chance.choice((0, 1_000, 150_000)),
                failures=self._chance.choice((1, 1, 2, 9)),
                fatal=self._chance.random() < 0.1,
            )
        return Body(kills=True)

    def _terms(self) -> dict[str, Any]:
        chance = self._chance
        needs = (None,) * 8 + (Needs(cpu=0.7), Needs(memory_mb=300), Needs(gpus=1), Needs(group="blue"))
        retries = (None, None, Retry(max_attempts=3, backoff_s=0.2), Retry(max_attempts=4, backoff_s=1.0))
        return {
            "function": FUNCTIONS[chance.random() < 0.15],
            "priority": chance.choice((0, 250, 500, 500, "high", 1000)),
            "needs": chance.choice(needs),
            "retry": chance.choice(retries),
            "timeout_s": chance.choice((0.0, 0.0, 0.0, 0.5)),
            "queue_timeout_s": chance.choice((0.0,) * 9 + (3.0,)),
        }

    def _remember(self, ids: Sequence[str]) -> None:
        self._known += ids
        del self._known[:-_KNOWN_MAX]

    async def _say(self, said: Sequence[tuple[Event, Intent]]) -> None:
        """Write, and repeat what is not known to be written: the fold knows it again."""
        events = [event for event, _ in said]
        self.intents.extend(intent for _, intent in said)
        for _ in range(_REPEATS_MAX):
            fate, seq = await self._write(events)
            for _, intent in said:
                self._note(intent, fate, seq)
            if fate == "ok":
                break
            await asyncio.sleep(self._chance.uniform(0.1, 2))
        if self._chance.random() < 0.05:
            self._cluster.counts["submitted_again"] += len(events)
            await self._write(events)

    def _note(self, intent: Intent, fate: str, seq: int) -> None:
        """What was unknown once stays so until it is ok: a refusal speaks of the last attempt only."""
        if fate != "ok" and intent.fate == "unknown":
            return
        intent.fate, intent.seq = fate, seq
        if fate == "refused":
            intent.refused_seq = self._cluster.network.stream.last_seq

    async def _write(self, events: Sequence[Event]) -> tuple[str, int]:
        try:
            seq = await self._writer.write(events)
        except AppendRefused:
            fate, seq = "refused", 0
        except AppendUnknown:
            fate, seq = "unknown", 0
        else:
            fate = "ok"
        self._cluster.counts[f"writes_{fate}"] += 1
        self._cluster.trace("client", self.name, events[0].kind, len(events), fate, seq)
        return fate, seq

    # Asking.

    async def _cancel(self) -> None:
        if self._flows and self._chance.random() < 0.2:
            await self._write([WorkflowCancelRequested(id=self._chance.choice(self._flows))])
        elif self._known:
            latest = self._known[-60:]
            wanted = self._chance.sample(latest, min(len(latest), self._chance.choice((1, 2, 20))))
            await self._write([TaskCancelRequested(id=each) for each in wanted])

    async def _reprioritize(self) -> None:
        if self._known:
            wanted = self._chance.sample(self._known, min(len(self._known), 5))
            await self._write([TaskReprioritized(id=each, priority="urgent") for each in wanted])
        if self._chance.random() < 0.3 and self._known:
            # The same id with another body is a conflict.
            other = TaskSubmitted(id=self._chance.choice(self._known[:1]), function="other")
            await self._say([(other, Intent(other.id, ()))])
