"""`just bench-failover`: how long the work stands still when a process is killed.

Times are taken from the log: the server's own times of the last assignment before and the
first one after. The last line is one JSON object.

    python -m tests.bench.bench_failover [NAME ...] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Self

import uvloop
from msgspec import Struct, field
from rich.console import Console
from rich.progress import Progress, TaskID

import agentflow
from agentflow.errors import AgentFlowError
from agentflow.events import LeaderElected, TaskAssigned
from agentflow.frames import judge
from tests.bench.app import noop, sleep
from tests.bench.conditions import conditions
from tests.bench.figures import percentile
from tests.bench.results import Targets, figures_table, print_last_line, show
from tests.bench.stack import Stack

TARGETS: Final[Targets] = {
    "leader_kill_p50_s": (
        "leader killed (-9): last assignment of the old to first of the new, p50, s",
        None,
        False,
    ),
    "leader_kill_p99_s": ("the same, p99, s", 4.0, False),
    "leader_term_p50_s": ("leader ended (SIGTERM), p50, s", None, False),
    "leader_term_p99_s": ("the same, p99, s", 0.5, False),
    "worker_kill_p50_s": ("worker killed (-9): its tasks running elsewhere, p50, s", None, False),
    "worker_kill_p99_s": ("the same, p99, s", 6.0, False),
    "r1_restart_p50_s": ("nats-server killed (-9) and started again: first assignment, p50, s", None, False),
    "r1_restart_s": ("the same, the longest, s", 2.0, False),
}
_BATCH: Final = 10
_PAUSE_S: Final = 0.02
_WAIT_S: Final = 60.0
_HELD: Final = 12


class Seen(Struct):
    """What the log said, as it came."""

    assigned: list[tuple[float, int]] = field(default_factory=list)
    """Server time, seconds, and epoch of every message that assigned something."""
    holders: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By task: the worker it was assigned to last, and when."""
    leader: str = ""
    epoch: int = 0
    told: asyncio.Event = field(default_factory=asyncio.Event)


class Watched:
    """A cluster under load, and what its log says. An async context manager."""

    def __init__(self, stack: Stack, *, loaded: bool = True) -> None:
        self.stack = stack
        self.seen = Seen()
        self.submitted = 0
        self._loaded = loaded
        self._exits = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._exits.enter_async_context(self.stack)
        self.client = await self._exits.enter_async_context(agentflow.Client(self.stack.url))
        reader = await self._exits.enter_async_context(agentflow.Client(self.stack.url))
        self._tasks.append(asyncio.create_task(self._read(reader)))
        if self._loaded:
            self._tasks.append(asyncio.create_task(self._load()))
        await self.until(lambda: self.seen.epoch > 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._exits.aclose()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until the log has said something."""
        async with asyncio.timeout(_WAIT_S):
            while not true():
                self.seen.told.clear()
                await self.seen.told.wait()

    async def _read(self, reader: agentflow.Client) -> None:
        seen = self.seen
        async for messages in reader.log.follow(0):
            for message in messages:
                judged = judge(message.subject, message.data, message.headers)
                for item in judged.items:
                    if isinstance(item, LeaderElected):
                        seen.leader, seen.epoch = item.master, item.epoch
                    elif isinstance(item, TaskAssigned):
                        seen.holders[item.id] = (judged.actor, message.time_ns / 1e9)
                if judged.kind == TaskAssigned.kind and judged.decision is not None:
                    seen.assigned.append((message.time_ns / 1e9, judged.decision.epoch))
            seen.told.set()

    async def _load(self) -> None:
        """Some hundreds of tasks a second, from one client, whatever happens."""
        while True:
            with contextlib.suppress(AgentFlowError):
                await self.client.submit_many(noop, [(number,) for number in range(_BATCH)])
                self.submitted += _BATCH
            await asyncio.sleep(_PAUSE_S)


def assigned_since(seen: Seen, epoch: int) -> bool:
    """Whether a leader of this epoch or a later one has assigned something."""
    return any(of >= epoch for _, of in seen.assigned)


def assigned_after(seen: Seen, at: float) -> bool:
    """Whether something was assigned after a time."""
    return any(when > at for when, _ in seen.assigned)


def moved(seen: Seen, tasks: Sequence[str], worker: str) -> bool:
    """Whether all of these tasks are assigned to somebody else."""
    return all(seen.holders[task][0] != worker for task in tasks)


def gap_s(seen: Seen, epoch: int) -> float:
    """From the last assignment up to `epoch` to the first after it."""
    before = max(at for at, of in seen.assigned if of <= epoch)
    after = min(at for at, of in seen.assigned if of > epoch)
    return after - before


async def leader_ends(count: int, end: str, tick: Callable[[], None]) -> list[float]:
    """End the leader time and again; how long nobody assigned anything."""
    gaps = []
    names = itertools.count(3)
    async with Watched(Stack(masters=2)) as watched:
        for _ in range(count):
            await asyncio.sleep(random.uniform(0.5, 1.5))
            seen = watched.seen
            epoch, leader = seen.epoch, seen.leader
            seen.assigned = [entry for entry in seen.assigned if entry[1] >= epoch]
            await watched.until(partial(assigned_since, seen, epoch))
            await (watched.stack.kill(leader) if end == "kill" else watched.stack.stop(leader))
            await watched.until(partial(assigned_since, seen, epoch + 1))
            gaps.append(gap_s(seen, epoch))
            await watched.stack.start("master", f"m{next(names)}")
            tick()
    return gaps


async def worker_dies(count: int, tick: Callable[[], None]) -> list[float]:
    """Kill a worker time and again; how long until the last of its tasks was assigned elsewhere."""
    more = json.dumps({"policy": {"losses_max": 1_000}})
    names = itertools.count(7)
    gaps = []
    async with Watched(Stack(workers=6, slots=8, more=more), loaded=False) as watched:
        seen = watched.seen
        await watched.client.submit_many(sleep, [(3_600.0,) for _ in range(_HELD)])
        await watched.until(lambda: len(seen.holders) == _HELD)
        for _ in range(count):
            await asyncio.sleep(random.uniform(0.3, 1.3))  # so that its tasks have begun, and said so
            victim = random.choice(sorted({worker for worker, _ in seen.holders.values()}))
            held = [task for task, (worker, _) in seen.holders.items() if worker == victim]
            killed_at = time.time()
            await watched.stack.kill(victim)
            await watched.until(partial(moved, seen, held, victim))
            gaps.append(max(seen.holders[task][1] for task in held) - killed_at)
            await watched.stack.start("worker", f"w{next(names)}", 8)
            tick()
    return gaps


async def server_restarts(count: int, tick: Callable[[], None]) -> list[float]:
    """Kill the only server and start it at once; how long until something was assigned again."""
    gaps = []
    async with Watched(Stack()) as watched:
        for _ in range(count):
            # A server that dies again within five seconds is come back to more slowly each time.
            await asyncio.sleep(random.uniform(5.5, 7.5))
            seen = watched.seen
            killed_at = time.time()
            seen.assigned.clear()
            await watched.stack.server.restart()
            await watched.until(partial(assigned_after, seen, killed_at))
            gaps.append(min(when for when, _ in seen.assigned if when > killed_at) - killed_at)
            tick()
    return gaps


async def measure(names: list[str], *, quick: bool, progress: Progress) -> dict[str, float]:
    """Measure what is named, or all; two clusters side by side where the most kills are."""
    found: dict[str, float] = {}

    async def several(
        name: str, count: int, run: Callable[[int, Callable[[], None]], Awaitable[list[float]]]
    ) -> list[float]:
        bar: TaskID = progress.add_task(name, total=count)
        return await run(count, lambda: progress.advance(bar))

    if "leader" in names:
        count = 4 if quick else 50
        halves = [
            several("leader killed", count // 2, lambda n, tick: leader_ends(n, "kill", tick))
            for _ in range(2)
        ]
        gaps = list(itertools.chain(*await asyncio.gather(*halves)))
        found |= {"leader_kill_p50_s": statistics.median(gaps), "leader_kill_p99_s": percentile(gaps, 0.99)}
        found["leader_kills"] = len(gaps)
    if "term" in names:
        gaps = await several("leader ended", 3 if quick else 20, lambda n, tick: leader_ends(n, "term", tick))
        found |= {"leader_term_p50_s": statistics.median(gaps), "leader_term_p99_s": percentile(gaps, 0.99)}
    if "worker" in names:
        gaps = await several("worker killed", 3 if quick else 20, worker_dies)
        found |= {"worker_kill_p50_s": statistics.median(gaps), "worker_kill_p99_s": percentile(gaps, 0.99)}
    if "server" in names:
        gaps = await several("nats-server killed", 3 if quick else 20, server_restarts)
        found |= {"r1_restart_p50_s": statistics.median(gaps), "r1_restart_s": max(gaps)}
    return found


def main() -> None:
    """Measure, print the conditions, the table, and as the last line the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["leader", "term", "worker", "server"])
    parser.add_argument("--quick", action="store_true", help="a few kills: does it work?")
    given = parser.parse_args()
    before = conditions()
    with Progress(console=Console(stderr=True)) as progress:
        found = uvloop.run(measure(given.names, quick=given.quick, progress=progress))
    show(before, figures_table("Failover", TARGETS, found))
    print_last_line(found, before, lease_ttl_s=3, worker_ttl_s=5)


if __name__ == "__main__":
    main()
