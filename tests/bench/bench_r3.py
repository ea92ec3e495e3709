"""`just bench-r3`: a log on three fsynced servers of this machine, and what the death of one costs.

    python -m tests.bench.bench_r3 [NAME ...] [--quick]

NAME is one of `rate`, `latency`, `leader_kill`, `lease_kill`; all without. The three servers, the
nodes and the client share the machine's cores and its disk: real ones have their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil
import uvloop
from rich.console import Console

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import OperatingError
from agentflow_nodes.embedded import EmbeddedCluster, EmbeddedServer
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests.bench.app import noop
from tests.bench.conditions import conditions
from tests.bench.figures import Figures, paced, percentile
from tests.bench.noop import measure
from tests.bench.results import Targets, figures_table, measure_named, print_last_line, show
from tests.bench.stack import ROOT, cpu_s_of
from tests.cluster import audit
from tests.eventually import eventually

TARGETS: Final[Targets] = {
    "r3_tasks_per_s": ("no-op tasks/s, one worker of 8 slots", 20_000, True),
    "r3_latency_p50_ms": ("submit to result at 100/s, p50, ms", 6, False),
    "r3_latency_p99_ms": ("submit to result at 100/s, p99, ms", None, False),
    "r3_leader_kill_p50_s": ("stream leader killed: from there to a new task's result, p50, s", None, False),
    "r3_leader_kill_s": ("the same, p90, s", 10, False),
    "r3_leader_kills": ("kills", None, True),
    "r3_lost": ("acknowledged tasks without exactly one outcome", 0, False),
    "lease_bucket_kill_lost_workers": ("lease bucket's leader killed: workers lost of 20 a try", 0, False),
    "lease_bucket_kill_tries": ("tries", None, True),
    "lease_bucket_kill_elections": ("elections of a master in all tries", None, False),
}
LOG: Final = wire.stream("default")
LEASES: Final = f"KV_{wire.LEASE_BUCKET}"
WORKERS: Final = 20
WATCHED_S: Final = 14.0
"""Longer than an election of the bucket and the life of a worker's heartbeat together."""


class R3:
    """Three servers, a master and workers in processes of their own. An async context manager."""

    def __init__(self, *, workers: int = 1) -> None:
        self._workers = workers
        self._stack = AsyncExitStack()
        self._nodes: dict[str, asyncio.subprocess.Process] = {}
        self.servers: EmbeddedCluster

    async def __aenter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="af-r3-"))
        self.servers = await self._stack.enter_async_context(EmbeddedCluster(Path(folder)))
        self._bus = await self._stack.enter_async_context(Bus(self.servers.urls, name="bench"))
        await self._start("master", "m1")
        for number in range(1, self._workers + 1):
            await self._start("worker", f"w{number}", "--slots", "8", "--app", "tests.bench.app")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._nodes)):
            node = self._nodes.pop(name)
            if node.returncode is None:
                node.terminate()
                await node.wait()
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """Its servers."""
        return self.servers.url

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by process."""
        return {name: cpu_s_of(pid) for name, pid in self._pids()}

    async def leader(self, stream: str) -> EmbeddedServer:
        """The server that leads a stream, once it has one and all replicas are up to date."""

        async def find() -> EmbeddedServer | None:
            group = await self._group(stream)
            current = [replica["current"] for replica in group.get("replicas", ())]
            if current != [True, True]:
                return None
            return next((each for each in self.servers.servers if each.name == group.get("leader")), None)

        return await eventually(find, within_s=120)

    async def part(self, stream: str, other: str) -> EmbeddedServer:
        """The leader of a stream, after making sure that it does not lead the other too."""
        while (leader := await self.leader(stream)) is await self.leader(other):
            with contextlib.suppress(OperatingError):
                await self._bus.js_api(f"STREAM.LEADER.STEPDOWN.{stream}", b"", 2.0)
        return leader

    async def _group(self, stream: str) -> dict[str, Any]:
        try:
            answer = json.loads(await self._bus.js_api(f"STREAM.INFO.{stream}", b"", 1.0))
        except OperatingError:
            return {}
        group: dict[str, Any] = answer.get("cluster", {})
        return group

    async def _start(self, role: str, name: str, *more: str) -> None:
        node = await asyncio.create_subprocess_exec(
            sys.executable,
            *(
                "-m",
                "agentflow_nodes",
                role,
                "--nats",
                self.url,
                "--name",
                name,
                "--replicas",
                "3",
                *more,
                "--json",
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._nodes[name] = node
        assert node.stdout is not None
        line = await asyncio.wait_for(node.stdout.readline(), 60)
        assert json.loads(line)["ready"], f"{name} did not become ready"

    def _pids(self) -> Iterator[tuple[str, int]]:
        yield "client", os.getpid()
        for number, server in enumerate(self.servers.servers, 1):
            yield f"nats-server-{number}", server.pid
        for name, node in self._nodes.items():
            yield name, node.pid


async def rate(quick: bool) -> Figures:
    """No-op tasks, as `noop_tasks_per_s` measures them on one server."""
    tasks, runs = (20_000, 1) if quick else (100_000, 3)
    async with R3() as site:
        await measure(site, min(tasks, 20_000))
        found = [await measure(site, tasks) for _ in range(runs)]
    cpu = {key: value for key, value in found[-1].items() if key.startswith("cpu_us")}
    Console(stderr=True).print({key: round(value, 1) for key, value in cpu.items()}, style="dim")
    return {"r3_tasks_per_s": statistics.median(run["tasks_per_s"] for run in found)}


async def latency(quick: bool) -> Figures:
    """One task at a time, 100 a second, from submit to result."""
    async with R3() as site, agentflow.Client(site.url, name="bench", replicas=3) as client:

        async def single(number: int) -> None:
            assert await (await client.submit(noop, number)).result() == number

        await paced(single, 1.0, 100)
        times = await paced(single, 2.0 if quick else 10.0, 100)
    return {
        "r3_latency_p50_ms": percentile(times, 0.50) * 1000,
        "r3_latency_p99_ms": percentile(times, 0.99) * 1000,
    }


async def leader_kill(quick: bool) -> Figures:
    """The stream's leader is killed again and again; a task handed over right then, and its result.

    Between the kills a stream of tasks is handed over: none of them may be lost.
    """
    kills, times = (3 if quick else 20), []
    async with R3() as site, agentflow.Client(site.url, name="bench", replicas=3) as client:
        handles: list[agentflow.Handle[int]] = []
        feeding = asyncio.create_task(_feed(client, handles))
        for number in range(kills):
            await _kill(await site.leader(LOG))
            killed = time.perf_counter()
            assert await (await client.submit(noop, number)).result(60) == number
            times.append(time.perf_counter() - killed)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        lost = await _lost(client, handles)
    return {
        "r3_leader_kill_p50_s": percentile(times, 0.50),
        "r3_leader_kill_s": percentile(times, 0.90),
        "r3_leader_kills": kills,
        "r3_lost": lost,
    }


async def _kill(server: EmbeddedServer) -> None:
    """Kill a server; its keeper starts it again."""
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not psutil.pid_exists(pid))


async def _feed(client: agentflow.Client, handles: list[agentflow.Handle[int]]) -> None:
    """Hand over tasks for as long as it is let."""
    while True:
        handles += await client.submit_many(noop, ((number,) for number in range(100)))
        await asyncio.sleep(0.05)


async def _lost(client: agentflow.Client, handles: list[agentflow.Handle[int]]) -> int:
    """How many acknowledged tasks do not end, or end more than once."""
    ends = await asyncio.gather(*(handle.outcome(60) for handle in handles), return_exceptions=True)
    outcomes = (await audit(client)).outcomes()
    told = {handle.id for handle, end in zip(handles, ends, strict=True) if not isinstance(end, Exception)}
    return sum(handle.id not in told or len(outcomes.get(handle.id, ())) != 1 for handle in handles)


async def lease_kill(quick: bool) -> Figures:
    """The server that leads the lease bucket, and not the log, is killed while 20 workers idle."""
    tries, lost, elections = (1 if quick else 6), 0, 0
    async with R3(workers=0) as site, AsyncExitStack() as workers:
        client = await workers.enter_async_context(agentflow.Client(site.url, name="bench", replicas=3))
        for number in range(WORKERS):
            config = WorkerConfig(url=site.url, name=f"w{number}", slots=1, replicas=3, drain_s=0.0)
            await workers.enter_async_context(Worker(config))
        for _ in range(tries):
            victim = await site.part(LEASES, LOG)
            before = await audit(client)
            await _kill(victim)
            await asyncio.sleep(WATCHED_S)
            after = await audit(client)
            lost += len(after.of_kind("worker.lost")) - len(before.of_kind("worker.lost"))
            elections += len(after.of_kind("leader.elected")) - len(before.of_kind("leader.elected"))
    return {
        "lease_bucket_kill_lost_workers": lost,
        "lease_bucket_kill_tries": tries,
        "lease_bucket_kill_elections": elections,
    }


FIGURES: Final[dict[str, Callable[[bool], Awaitable[Figures]]]] = {
    "rate": rate,
    "latency": latency,
    "leader_kill": leader_kill,
    "lease_kill": lease_kill,
}


def main() -> None:
    """Measure, print the conditions, the table, and as the last line the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it work?")
    given = parser.parse_args()
    before = conditions()
    chosen = {name: partial(figure, given.quick) for name, figure in FIGURES.items()}
    found = uvloop.run(measure_named(chosen, given.names, Console(stderr=True)))
    show(before, figures_table("AgentFlow on three servers", TARGETS, found))
    print_last_line(found, before)


if __name__ == "__main__":
    main()
