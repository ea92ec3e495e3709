"""A log on three servers: any one of them may die, hang or be cut off, and the work goes on.

Whatever happens, what was acknowledged stays, every task ends with exactly one outcome, and no
master, worker or client is started anew for it.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import pytest
import pytest_asyncio

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.leases.port import Lease
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame, Reason, Refused, Unknown
from agentflow.log.stream import stream_names
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests.app import add_in_thread
from tests.cluster import all_completed
from tests.eventually import eventually
from tests.servers import NatsCluster, NatsServer

# One cluster serves all tests, each in a namespace of its own.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SOON_S: Final = 60.0
"""An election of the stream and one of the lease bucket, and the work."""
PART: Final = 300


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers() -> AsyncIterator[NatsCluster]:
    async with NatsCluster() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def site(servers: NatsCluster, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """A master, a worker and a client that know all three servers."""
    namespace = request.node.name.removeprefix("test_")[:40].rstrip("_")
    async with Site(servers, namespace) as running:
        yield running
    servers.heal()


class Site:
    """Everything that works in one namespace. An async context manager."""

    def __init__(self, servers: NatsCluster, namespace: str) -> None:
        self.servers = servers
        self.namespace = namespace
        self.stream = wire.stream(namespace)
        common: dict[str, Any] = {"url": servers.url, "namespace": namespace, "replicas": 3}
        self.master = Master(MasterConfig(**common, lease_ttl_s=2, worker_ttl_s=15.0))
        self.worker = Worker(WorkerConfig(**common, slots=4, heartbeat_s=0.5, drain_s=0.5))
        self.client = agentflow.Client(servers.urls, namespace=namespace, replicas=3)
        self.handles: list[agentflow.Handle[int]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for node in (self.master, self.worker, self.client):
            await self._stack.enter_async_context(node)
        await eventually(lambda: self.master.leading)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def submit(self, count: int = PART) -> None:
        """Hand over work; returns once it is acknowledged."""
        calls = [(number, 1) for number in range(count)]
        self.handles += await asyncio.wait_for(self.client.submit_many(add_in_thread, calls), SOON_S)

    async def all_done(self) -> None:
        """Every task handed over ends, with one outcome recorded, and no node has stopped."""
        await all_completed(self.client, self.handles, within_s=SOON_S)
        assert not any(task.done() for task in (*self.master._tasks.running, *self.worker._tasks))

    async def leader(self) -> NatsServer:
        return await self.servers.leader(self.stream)

    async def another_leads(self, former: NatsServer) -> None:
        """Wait until the log has a leader other than that."""
        others = [server.url for server in self.servers.servers if server is not former]
        async with Bus(others, name="test") as bus:

            async def led() -> bool:
                try:
                    info = await bus.js_api(f"STREAM.INFO.{self.stream}", b"", 1.0)
                except Disconnected:
                    return False
                return b'"leader":"' in info and f'"leader":"{former.name}"'.encode() not in info

            await eventually(led, within_s=SOON_S)


async def test_a_bucket_that_another_has_just_created_is_waited_for(servers: NatsCluster) -> None:
    """It is there before it has a leader: who opens it then waits for the election."""
    async with AsyncExitStack() as stack:
        buses = [Bus(servers.urls[number % 3], name=f"opener {number}") for number in range(6)]
        await asyncio.gather(*map(stack.enter_async_context, buses))
        for bucket in map("FRESH_{}".format, range(5)):
            stream = wire.bucket_stream(bucket)
            first, *others = [JetStreamLeases(bus, bucket, replicas=3) for bus in buses]
            creating = asyncio.create_task(stack.enter_async_context(first))
            while not creating.done() and stream not in await stream_names(buses[-1], 5.0):
                pass
            await asyncio.gather(creating, *map(stack.enter_async_context, others))
            assert isinstance(await first.acquire("key", b"value", 60), Lease)


async def test_a_leader_killed(site: Site) -> None:
    await site.submit()
    leader = await site.leader()
    submitting = asyncio.create_task(site.submit())
    await leader.kill()
    await submitting
    await site.submit()
    await site.all_done()
    await leader.start()
    await site.servers.elected()


async def test_a_leader_that_hangs(site: Site) -> None:
    await site.submit()
    leader = await site.leader()
    leader.send(signal.SIGSTOP)
    try:
        await site.another_leads(leader)
        await site.submit()
    finally:
        leader.send(signal.SIGCONT)
    await site.submit()
    await site.all_done()


async def test_a_leader_cut_off(site: Site) -> None:
    """Those that are connected to it move to the others; who knows only it is refused in time."""
    await site.submit()
    leader = await site.leader()
    async with (
        Bus(leader.url, name="pinned") as bus,
        JetStreamLog(bus, site.namespace) as pinned,
    ):
        last_seq = (await pinned.identity()).last_seq
        site.servers.isolate(leader)
        number = itertools.count()

        async def refused() -> Refused | None:
            """Before it notices that it is alone it says nothing, which is no acknowledgement."""
            subject = wire.event(site.namespace, "task.submitted", "pinned")
            appended = await pinned.append(Frame(subject, b"[]", f"pinned.{next(number)}"), timeout_s=1.0)
            assert not isinstance(appended, Done), "acknowledged by a minority"
            if isinstance(appended, Unknown):
                assert "cannot reach a majority of the servers" in appended.detail
            return appended if isinstance(appended, Refused) else None

        await site.submit()
        refusal = await eventually(refused, within_s=SOON_S)
        assert refusal.reason is Reason.BUSY
        assert "no server takes writes" in refusal.detail
        with pytest.raises(Disconnected, match=r"no leader|no answer"):
            await pinned.identity()
        site.servers.heal()

        async def caught_up() -> bool:
            try:
                return (await pinned.identity()).last_seq > last_seq
            except Disconnected:
                return False

        await eventually(caught_up, within_s=SOON_S)
    await site.submit()
    await site.all_done()


async def test_two_of_three_dead(site: Site) -> None:
    await site.submit()
    first, second, _ = site.servers.servers
    await asyncio.gather(first.kill(), second.kill())
    subject = wire.event(site.namespace, "task.submitted", "cli")
    appended = await site.client.log.append(Frame(subject, b"[]", "alone.1"), timeout_s=2.0)
    assert isinstance(appended, Refused | Unknown)
    assert "no server takes writes" in appended.detail or "cannot reach a majority" in appended.detail
    late = asyncio.create_task(site.submit())
    await asyncio.gather(first.start(), second.start())
    await late
    await site.all_done()


async def test_every_server_killed_in_turn_while_tasks_run(site: Site) -> None:
    for server in site.servers.servers:
        submitting = asyncio.create_task(site.submit())
        await server.restart()
        await submitting
        await site.servers.elected()
    await site.all_done()
