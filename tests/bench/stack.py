"""A whole cluster on this machine, each node a process of its own, and what it costs."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from tests.servers import NatsServer

ROOT: Final = Path(__file__).parents[2]


class Stack:
    """nats-server (fsync on every write), a master and workers. An async context manager."""

    def __init__(self, *, workers: int = 1, slots: int = 8, masters: int = 1, more: str = "{}") -> None:
        self.server = NatsServer()
        self._masters = masters
        self._more = more
        self._workers = workers
        self._slots = slots
        self.nodes: dict[str, asyncio.subprocess.Process] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.server)
        for number in range(1, self._masters + 1):
            await self.start("master", f"m{number}", more=self._more)
        for number in range(1, self._workers + 1):
            await self.start("worker", f"w{number}", self._slots)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.nodes):
            await self.stop(name)
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """Where its server listens."""
        return self.server.url

    async def start(self, role: str, name: str, slots: int = 8, more: str = "{}") -> None:
        """Start a node, with further fields of its configuration as JSON, and wait until it is ready."""
        node = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.bench.node",
            role,
            self.url,
            name,
            str(slots),
            more,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.nodes[name] = node
        assert node.stdout is not None
        line = await asyncio.wait_for(node.stdout.readline(), 60)
        assert line == b"ready\n", f"{name} did not become ready"

    async def kill(self, name: str) -> None:
        """End a node without warning (SIGKILL)."""
        node = self.nodes.pop(name)
        node.kill()
        await node.wait()

    async def stop(self, name: str) -> None:
        """End a node in good order."""
        node = self.nodes.pop(name)
        if node.returncode is None:
            node.terminate()
            await node.wait()

    def pids(self) -> Iterator[tuple[str, int]]:
        """Every process of the cluster, this one included, by name."""
        yield "client", os.getpid()
        yield "nats-server", self.server.pid
        for name, node in self.nodes.items():
            yield name, node.pid

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by process."""
        return {name: cpu_s_of(pid) for name, pid in self.pids()}

    def rss_mb(self, name: str) -> float:
        """Resident memory of one process now."""
        pid = dict(self.pids())[name]
        rss: int = psutil.Process(pid).memory_info().rss
        return rss / 2**20


def cpu_s_of(pid: int) -> float:
    """CPU seconds a process has used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
