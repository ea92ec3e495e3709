"""A cluster changed over from one contract level to the next while it works.

Two masters and three workers of level 1 are replaced, one process after the other, by ones of
level 2; two clients submit all the time. Meanwhile every master's fold is asked which state
tasks are in, whether it leads or not, and the services that clients ask are too. In the end
the log, read once from its beginning, must agree with each answer as of the position that
the answer names, and hold exactly one outcome for everything acknowledged.

    python -m tests.bench.rolling [--order masters|workers] [--seconds S]

The last line is one JSON object: `rolling_contradictions`, `rolling_lost`, `tasks`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
from collections import Counter, defaultdict
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec
import uvloop
from msgspec import Struct

import agentflow
from agentflow import frames, wire
from agentflow.client.watching import logged_events
from agentflow.domain.fold import fold
from agentflow.errors import AgentFlowError
from agentflow.limits import LEVEL, LEVEL_FIRST
from tests.app import add, add_in_thread
from tests.bench.rolling_master import Answer, answer, asked
from tests.cluster import Audit, Process
from tests.eventually import eventually
from tests.servers import NatsServer

Order = Literal["masters", "workers"]

MASTERS: Final = ("m1", "m2")
WORKERS: Final = ("w1", "w2", "w3")
_BULK: Final = 60
_IDS_ASKED: Final = 40
_READY_S: Final = 30.0
_END_S: Final = 60.0
_STEP_S_MAX: Final = 60.0
_PAUSE_S: Final = 0.02


class Found(Struct, frozen=True):
    """What came of it."""

    tasks: int
    """Acknowledged; each must have one outcome."""
    lost: list[str]
    """Those that have none, or several."""
    contradictions: list[str]
    """Answers with which the log does not agree, and outcomes of which clients were told differently."""
    answers: Counter[str]
    """How many answers each gave."""
    levels: list[tuple[str, int]]
    """Who was elected, with which level."""
    refused: int
    """Events that a fold put aside."""


class MasterProcess(Process):
    """A master that tells what it has folded."""

    def __init__(self, url: str, name: str, level: int) -> None:
        super().__init__(("master",), url, {})
        self.name = name
        self._given = (url, name, str(level))

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.rolling_master", *self._given, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(_READY_S):
            assert json.loads(await self._process.stdout.readline())["ready"]
        return self


class Load:
    """One client that submits until told to stop, and remembers what it was told."""

    def __init__(self, client: agentflow.Client) -> None:
        self.client = client
        self.handles: list[agentflow.Handle[Any]] = []
        self.task_ids: list[str] = []
        self.stop = False

    async def singles_and_flows(self) -> None:
        """Tasks one by one, and workflows."""
        number = 0
        while not self.stop:
            number += 1
            if number % 10:
                self._note(await self.client.submit(add, number, 1))
            else:
                flow = agentflow.Workflow()
                first = flow.add(add, number, 1)
                flow.add(add, flow.add(add_in_thread, first, 1), 1)
                handle = await self.client.submit_workflow(flow)
                self.handles.append(handle)
                self.task_ids += [f"{handle.id}/{each}" for each in ("add", "add_in_thread", "add-2")]
            await asyncio.sleep(_PAUSE_S)

    async def bulks(self) -> None:
        """Many tasks at once."""
        while not self.stop:
            calls = [(number, 1) for number in range(_BULK)]
            for handle in await self.client.submit_many(add_in_thread, calls):
                self._note(handle)
            await asyncio.sleep(_PAUSE_S * 10)

    def _note(self, handle: agentflow.Handle[Any]) -> None:
        self.handles.append(handle)
        self.task_ids.append(handle.id)

    @property
    def ended(self) -> int:
        """How many are known to have ended."""
        return sum(handle.done for handle in self.handles)


class Rolling:
    """The cluster, the load, the questions. An async context manager."""

    def __init__(self, server: NatsServer, *, chance: random.Random) -> None:
        self.server = server
        self.loads: list[Load] = []
        self.answers: list[Answer] = []
        self._nodes: dict[str, Process] = {}
        self._chance = chance
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for name in (*MASTERS, *WORKERS):
            await self._start(name, LEVEL_FIRST)
        for _ in range(2):
            client = await self._stack.enter_async_context(agentflow.Client(self.server.url))
            self.loads.append(Load(client))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _start(self, name: str, level: int) -> None:
        node: Process
        if name in MASTERS:
            node = MasterProcess(self.server.url, name, level)
        else:
            options = ("--name", name, "--level", str(level), "--app", "tests.app", "--slots", "4")
            node = Process(("worker", *options, "--drain-s", "2"), self.server.url, {})
        self._nodes[name] = await self._stack.enter_async_context(node)

    async def change(self, order: Order, seconds: float) -> None:
        """Replace all, `seconds` of work or more between two."""
        first, second = self.loads
        for work in (first.singles_and_flows(), second.bulks(), self._ask()):
            self._tasks.append(asyncio.create_task(work))
        names = MASTERS + WORKERS if order == "masters" else WORKERS + MASTERS
        await self._work(seconds)
        for name in names:
            self._nodes[name].send(signal.SIGTERM)
            assert await self._nodes[name].ended() == 0, name
            await self._start(name, LEVEL)
            await self._work(seconds)
        first.stop = second.stop = True
        await asyncio.gather(*self._tasks[:2])

    async def _work(self, seconds: float) -> None:
        """For so long, and until something of all that was submitted meanwhile has ended."""
        before = [len(load.handles) for load in self.loads]
        await asyncio.sleep(seconds)
        self._raise_failed()
        for load, count in zip(self.loads, before, strict=True):
            await eventually(lambda: len(load.handles) > count, within_s=_STEP_S_MAX)  # noqa: B023 - awaited
            await load.handles[count].outcome(_STEP_S_MAX)

    def _raise_failed(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    # Asking ----------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask every master's fold, and the services that whoever leads answers, time and again."""
        bus = self.loads[0].client.bus
        while True:
            known = [each for load in self.loads for each in load.task_ids[-2_000:]]
            ids = self._chance.sample(known, min(len(known), _IDS_ASKED))
            for name in MASTERS:
                with suppress(AgentFlowError):  # it may be away just now
                    self.answers.append(_decode(await bus.request(asked(name), frames.encode(ids), 0.5)))
            await self._ask_services(ids)
            await asyncio.sleep(_PAUSE_S * 5)

    async def _ask_services(self, ids: list[str]) -> None:
        client = self.loads[1].client
        with suppress(AgentFlowError, TimeoutError):
            async with asyncio.timeout(1.0):
                reply = await client.status(ids)
                states = {each.id: (each.state, each.seq, each.index) for each in reply.statuses}
                self.answers.append(Answer("status", reply.seq, 0, {}, states))
        with suppress(AgentFlowError):
            data = await client.bus.request(wire.service("default", "queue"), b"", 0.5)
            queue: dict[str, Any] = frames.decode_any(data)
            counts = {each: queue[each] for each in ("open", "ready", "running")}
            self.answers.append(Answer("queue", queue["seq"], 0, counts, {}))

    # Judging ---------------------------------------------------------------------------

    async def judge(self) -> Found:
        """Wait for all outcomes, then hold all that was said against the log."""
        async with asyncio.timeout(_END_S):
            told = [{handle.id: await handle.outcome() for handle in load.handles} for load in self.loads]
        by_seq: dict[int, list[Answer]] = defaultdict(list)
        for given in self.answers:
            by_seq[given.seq].append(given)
        found, wrong = await _audit(self.loads[0].client, by_seq)
        # Each client is asked for what the other submitted.
        for own, other in zip(told, reversed(self.loads), strict=True):
            outcomes = await other.client.outcomes(list(own))
            for handle_id, outcome in zip(own, outcomes, strict=True):
                mine = own[handle_id]
                if (mine.state, mine.result) != (outcome.state, outcome.result):
                    wrong.append(f"{handle_id}: one client was told {mine.state}, another {outcome.state}")
        acknowledged = [each for load in self.loads for each in load.task_ids]
        ends = found.outcomes()
        lost = [each for each in acknowledged if ends.get(each) != ["task.completed"]]
        lost += [each for own in told for each, outcome in own.items() if outcome.state != "completed"]
        elections: list[Any] = [logged.event for logged in found.of_kind("leader.elected")]
        return Found(
            tasks=len(acknowledged),
            lost=lost,
            contradictions=wrong,
            answers=Counter(given.who for given in self.answers),
            levels=[(event.master, event.level) for event in elections],
            refused=found.state.quarantined,
        )


_decode: Final = msgspec.json.Decoder(Answer).decode


async def _audit(client: agentflow.Client, by_seq: dict[int, list[Answer]]) -> tuple[Audit, list[str]]:
    """Fold the log once more, and compare with what was said as of each position."""
    found, wrong = Audit(client.namespace), contradictions(Audit(client.namespace), by_seq.pop(0, []))
    last_seq = (await client.log.identity()).last_seq
    async for messages in client.log.follow(0):
        for message in messages:
            found.messages += 1
            judged = frames.judge(message.subject, message.data, message.headers)
            verdicts = fold(found.state, message.seq, message.time_ns, judged)
            first = -1 if judged.whole is not None else 0
            found.verdicts |= {(message.seq, index): each for index, each in enumerate(verdicts, first)}
            found.events += logged_events(message)
            wrong += contradictions(found, by_seq.pop(message.seq, []))
        if messages[-1].seq >= last_seq:
            return found, wrong + [f"{seq}: no such position" for seq in by_seq]
    raise AssertionError("a log never ends")


def contradictions(found: Audit, given: list[Answer]) -> list[str]:
    """Where these answers differ from the fold of the log up to here."""
    wrong = []
    for each in given:
        right = answer(each.who, found.state, list(each.states))
        if each.states != right.states:
            differ = {task: (said, right.states[task]) for task, said in each.states.items()}
            wrong += [
                f"{each.who} at {each.seq}: {task} is {said}, not {is_so}"
                for task, (said, is_so) in differ.items()
                if said != is_so
            ]
        if each.counts and each.counts != right.counts:
            wrong.append(f"{each.who} at {each.seq}: {each.counts}, not {right.counts}")
        if each.level and each.level != right.level:
            wrong.append(f"{each.who} at {each.seq}: level {each.level}, not {right.level}")
    return wrong


async def roll(order: Order, seconds: float, *, seed: int = 1) -> Found:
    """One change-over on a server of its own."""
    async with NatsServer() as server, Rolling(server, chance=random.Random(seed)) as rolling:
        await rolling.change(order, seconds)
        return await rolling.judge()


def main() -> None:
    """Change a cluster over in both orders, or in one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--order", choices=("masters", "workers", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=5.0, help="work between two replacements")
    given = parser.parse_args()
    orders: list[Order] = ["masters", "workers"] if given.order == "both" else [given.order]
    total: Counter[str] = Counter()
    for order in orders:
        found = uvloop.run(roll(order, given.seconds))
        print(f"{order} first: {found.tasks} tasks, answers {dict(found.answers)}, elected {found.levels}")
        for line in (*found.contradictions[:20], *found.lost[:20]):
            print(f"  {line}")
        total += Counter(
            rolling_contradictions=len(found.contradictions), rolling_lost=len(found.lost), tasks=found.tasks
        )
    print(json.dumps({key: total[key] for key in ("rolling_contradictions", "rolling_lost", "tasks")}))
    sys.exit(bool(total["rolling_contradictions"] or total["rolling_lost"]))


if __name__ == "__main__":
    main()
