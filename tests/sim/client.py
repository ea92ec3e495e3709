"""Simulated clients: they submit, repeat, cancel and reprioritise, and keep a journal.

An intent is noted before it is sent. What was acknowledged is `ok`; what was certainly not
stored is `refused`; everything else is `unknown`, which never counts as lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from agentflow.errors import AppendRefused, AppendUnknown, OperatingError
from agentflow.events import (
    Event,
    Needs,
    Retry,
    TaskCancelRequested,
    TaskReprioritized,
    TaskSubmitted,
    WorkerDrainRequested,
    WorkflowCancelRequested,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.locks.ticket import Ticket
from agentflow.writer import Writer
from tests.sim.bodies import BRIEF, FUNCTIONS, Body
from tests.sim.cluster import Cluster
from tests.sim.locks import Hold
from tests.sim.network import Link, SimLog
from tests.sim.task_locks import locks_over

PATIENCE_S: Final = 5.0
_KNOWN_MAX: Final = 400
"""Ids of its own that a client remembers, for doing something with them."""
_FLOW_TASKS_MAX: Final = 30
_REPEATS_MAX: Final = 8
_BURSTS: Final = 6
"""The largest bursts hand over this part of the quota."""
_PAUSE_S: Final = 1.75
"""Mean time between two moves."""
_BRIEF_SHARE: Final = 0.6
"""Of the bursts outside workflows: of short tasks only, as workers may be handed many of ahead."""
_SOUND_SHARE: Final = 0.97
"""Of short tasks: those that do not fail."""
_LOCKED_MAX: Final = 3
"""Tasks in a burst that is done under a lock."""
_LOCKED_SHARE: Final = 0.4
"""Of bursts no larger than that."""
_HOLD_TTL_S: Final = 3
_HOLD_WAIT_S: Final = 2.0
_LOCKS: Final = ("store", "ledger")
_OTHER_PRIORITY: Final = 1
"""No task has it, but those submitted under the id of another."""
_TICK_US: Final = 50_000
"""What takes a while takes a number of these: what began together often ends together."""


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
        self._locks = locks_over(cluster, link, self._writer)
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
        moves = {
            self._submit: 6,
            self._submit_flow: 4,
            self._cancel: 2,
            self._reprioritize: 1,
            self._drain: 0.3,
            self._hold: 1,
        }
        (move,) = self._chance.choices(list(moves), list(moves.values()))
        await move()

    # Submitting.

    async def _submit(self) -> None:
        size = self._chance.choice((1, 1, 3, self._most // 4, self._most, self._most))
        terms, make = self._terms(), self._mixed_body
        locked = size <= _LOCKED_MAX and self._chance.random() < _LOCKED_SHARE
        if locked:
            terms["lock"], make, size = self._lock(), self._locked_body, _LOCKED_MAX
        elif self._chance.random() < _BRIEF_SHARE:
            terms["function"], make = BRIEF, self._brief_body(self._brief_us())
        tasks = [
            TaskSubmitted(id=self._cluster.new_id(), args=[make()], **terms)
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
        if self._chance.random() < _LOCKED_SHARE / 2:
            tasks[-1] = replace(tasks[-1], lock=self._lock())
        flow = WorkflowSubmitted(id=flow_id, tasks=tasks)
        await self._say([(flow, Intent(flow_id, [f"{flow_id}/{task.task_id}" for task in tasks]))])
        self._flows.append(flow_id)
        self._remember([f"{flow_id}/{task.task_id}" for task in tasks[:3]])

    def _flow_task(self, name: str, needed: list[str]) -> WorkflowTask:
        asks = needed and self._chance.random() < 0.5
        kwargs = {"given": {"$result": self._chance.choice(needed)}} if asks else {}
        return WorkflowTask(
            task_id=name,
            dependencies=needed,
            args=[self._flow_body()],
            kwargs=kwargs,
            **self._terms(),
        )

    def _lock(self) -> str:
        return self._chance.choice(_LOCKS)

    # What they do.

    def _brief_us(self) -> int:
        return self._chance.choice((0, 0, 200, 2_000, 5_000))

    def _brief_body(self, brief_us: int) -> Callable[[], Body]:
        """All of a burst alike and short, so that frames hold many; but some fail."""
        return lambda: Body(brief_us) if self._chance.random() < _SOUND_SHARE else self._failing_body()

    def _mixed_body(self) -> Body:
        chance = self._chance.random()
        if chance < 0.6:
            return Body(self._brief_us())
        if chance < 0.8:
            return self._slow_body()
        if chance < 0.87:
            return Body(1_000_000 * self._chance.randint(1, 9))
        if chance < 0.995:
            return self._failing_body()
        return Body(kills=True)

    def _flow_body(self) -> Body:
        chance = self._chance.random()
        if chance < 0.78:
            return Body(self._brief_us())
        if chance < 0.88:
            return self._slow_body()
        if chance < 0.92:
            return Body(1_000_000 * self._chance.randint(1, 9))
        return self._failing_body()

    def _locked_body(self) -> Body:
        """Some so long that their worker may be given up meanwhile."""
        if self._chance.random() < 0.3:
            return Body(1_000_000 * self._chance.randint(3, 9))
        return self._slow_body()

    def _slow_body(self) -> Body:
        return Body(_TICK_US * int(1 + self._chance.expovariate(1 / 3.5)))

    def _failing_body(self) -> Body:
        return Body(
            run_us=self._chance.choice((0, 1_000, 150_000)),
            failures=self._chance.choice((1, 1, 2, 9)),
            fatal=self._chance.random() < 0.1,
        )

    def _terms(self) -> dict[str, Any]:
        chance = self._chance
        needs = (None,) * 8 + (Needs(cpu=0.7), Needs(memory_mb=300), Needs(gpus=1), Needs(group="blue"))
        retries = (
            None,
            None,
            Retry(max_attempts=3, backoff_s=0.2, jitter=0.0),
            Retry(max_attempts=4, backoff_s=1.0),
        )
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

    async def _hold(self) -> None:
        """Do something under a lock that tasks name too."""
        loop = self._cluster.loop
        ticket = Ticket(name=self._lock(), holder=self.name, client=self.name, since_ms=0)
        try:
            held = await self._locks.acquire(ticket, _HOLD_TTL_S, _HOLD_WAIT_S)
        except OperatingError as error:
            self._cluster.counts["holds_not_had"] += 1
            self._cluster.trace("not held", self.name, ticket.name, type(error).__name__)
            return
        hold = Hold(ticket.name, held, loop.time())
        self._cluster.holds.append(hold)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0.1, 3.0)):
                await held.lost.wait()
        hold.ended_s = loop.time()
        await held.ended()

    async def _drain(self) -> None:
        worker = f"w{self._chance.randint(1, 6)}"
        await self._write([WorkerDrainRequested(worker=worker, reason="it was drawn")])

    async def _reprioritize(self) -> None:
        if self._known:
            wanted = self._chance.sample(self._known, min(len(self._known), 5))
            await self._write([TaskReprioritized(id=each, priority="urgent") for each in wanted])
        if self._chance.random() < 0.3 and self._known:
            # The same id with another body is a conflict.
            known = self._chance.choice(self._known[:1])
            other = TaskSubmitted(id=known, function=FUNCTIONS[0], args=[Body()], priority=_OTHER_PRIORITY)
            await self._say([(other, Intent(other.id, ()))])
