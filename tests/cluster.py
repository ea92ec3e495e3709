"""A cluster for tests: a real nats-server, masters and workers in this process or in others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import agentflow
from agentflow import frames
from agentflow.client.watching import LoggedEvent, logged_events
from agentflow.domain.fold import fold
from agentflow.domain.state import Namespace, Verdict
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests import app
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

_READY_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 20.0
_ENDS = frozenset({"task.completed", "task.failed", "task.cancelled", "task.timed_out", "task.quarantined"})


class Cluster:
    """A server; masters, workers and clients as asked. An async context manager."""

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        return self.server.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def master(self, **config: Any) -> Master:
        config = {"url": self.url, "lease_ttl_s": 1, "worker_ttl_s": 2.0, **config}
        return await self._stack.enter_async_context(Master(MasterConfig(**config)))

    async def leader(self, **config: Any) -> Master:
        """A master that leads already."""
        master = await self.master(**config)
        await eventually(lambda: master.leading)
        return master

    async def worker(self, **config: Any) -> Worker:
        assert app.add.name in agentflow.registered()
        config = {
            "url": self.url,
            "slots": 4,
            "heartbeat_s": 0.2,
            "drain_s": 0.5,
            "stall_s_max": 0.0,
            **config,
        }
        return await self._stack.enter_async_context(Worker(WorkerConfig(**config)))

    async def client(self, **options: Any) -> agentflow.Client:
        options = {"url": self.url, **options}
        return await self._stack.enter_async_context(agentflow.Client(**options))

    async def proxy(self) -> FaultProxy:
        """A proxy in front of the server; it outlives the nodes that are made after it."""
        return await self._stack.enter_async_context(FaultProxy(self.server.port))

    async def process(self, *arguments: str, env: dict[str, str] | None = None, url: str = "") -> Process:
        """`agentflow <arguments>` in a process of its own, once it is ready."""
        return await self._stack.enter_async_context(Process(arguments, url or self.url, env or {}))


class Process:
    """A node in a process of its own. An async context manager: entered means ready, left means dead."""

    def __init__(self, arguments: Sequence[str], url: str, env: dict[str, str]) -> None:
        self._arguments = arguments
        self._env = {**os.environ, "AGENTFLOW_NATS_URL": url, **env}
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "agentflow_nodes", *self._arguments, "--json"),
            stdout=asyncio.subprocess.PIPE,
            env=self._env,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(_READY_TIMEOUT_S):
            line = await self._process.stdout.readline()
        assert json.loads(line)["ready"], line
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)
        await self.ended()

    @property
    def running(self) -> bool:
        assert self._process is not None
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        await self.ended()

    async def ended(self) -> int:
        """Wait for its end; the exit status."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), _END_TIMEOUT_S)


class Audit:
    """The log from its beginning, folded by itself: what really happened."""

    def __init__(self, namespace: str) -> None:
        self.state = Namespace(namespace)
        self.verdicts: dict[tuple[int, int], Verdict] = {}
        self.events: list[LoggedEvent] = []
        self.messages = 0

    def of_kind(self, *kinds: str) -> list[LoggedEvent]:
        return [logged for logged in self.events if logged.kind in kinds]

    def about(self, task_id: str) -> list[str]:
        """The kinds of the events that say something of a task, in order."""
        return [logged.kind for logged in self.events if getattr(logged.event, "id", None) == task_id]

    def outcomes(self) -> dict[str, list[str]]:
        """For each task the events that ended it: one, if all is well."""
        found: dict[str, list[str]] = {}
        for logged in self.events:
            event: Any = logged.event
            if event is None or str(self.verdicts[logged.seq, logged.index].kind) != "applied":
                continue
            if logged.kind in _ENDS and getattr(event, "error", "") != "stopped":
                found.setdefault(event.id, []).append(logged.kind)
            elif logged.kind == "task.retried":
                assert found[event.id].pop() == "task.failed"
        return found


async def all_completed(
    client: agentflow.Client, handles: Sequence[agentflow.Handle[Any]], *, within_s: float
) -> Audit:
    """All complete in time, each with one outcome in the log; the log then."""
    async with asyncio.timeout(within_s):
        for handle in handles:
            assert (await handle.outcome()).state == "completed"
    found = await audit(client)
    outcomes = found.outcomes()
    assert {handle.id for handle in handles} <= outcomes.keys()
    assert [ended for ended in outcomes.values() if len(ended) != 1] == []
    return found


async def audit(client: agentflow.Client) -> Audit:
    """Read and fold the log up to its present end."""
    found = Audit(client.namespace)
    last_seq = (await client.log.identity()).last_seq
    if not last_seq:
        return found
    async for messages in client.log.follow(0):
        for message in messages:
            found.messages += 1
            judged = frames.judge(message.subject, message.data, message.headers)
            verdicts = fold(found.state, message.seq, message.time_ns, judged)
            first = -1 if judged.whole is not None else 0
            for index, verdict in enumerate(verdicts, first):
                found.verdicts[message.seq, index] = verdict
            found.events += logged_events(message)
        if messages[-1].seq >= last_seq:
            return found
    raise AssertionError("a log never ends")
