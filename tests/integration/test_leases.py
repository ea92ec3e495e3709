"""Leases on real servers: one and three, with the server's markers and without."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import AgentFlowError, Disconnected, StreamMismatch
from agentflow.leases.bucket import bucket_config
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.leases.port import Lease, Removed
from agentflow_nodes.embedded.address import free_ports
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.integration.leases_conformance import BUCKET, KEY, LONG_S, LeasesConformance, Watching, held, seen
from tests.servers import NatsServer

STREAM = wire.bucket_stream(BUCKET)


@contextlib.asynccontextmanager
async def harness_on(
    servers: Sequence[NatsServer], *, markers: bool = False
) -> AsyncGenerator[JetStreamHarness, None]:
    """Two holders on a fresh bucket, which the server marks expiries in if `markers`."""
    urls = [server.url for server in servers]
    async with (
        FaultProxy(servers[0].port) as proxy,
        Bus(proxy.url, name="near") as near,
        Bus(urls, name="far") as far,
    ):
        harness = JetStreamHarness(servers, proxy, near, far)
        await eventually(lambda: deleted(far), within_s=40)
        if markers:
            await create(far, {"subject_delete_marker_ttl": 5_000_000_000})
        await harness.open()
        try:
            yield harness
        finally:
            await harness.heal()


async def deleted(bus: Bus) -> bool:
    """Delete the bucket, if there is one; false while the servers have not found each other."""
    try:
        await bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 1)
    except Disconnected:
        return False
    return True


async def create(bus: Bus, changes: dict[str, Any]) -> None:
    """Create the bucket as somebody else might."""
    config = bucket_config(BUCKET, replicas=1, first_seq=0) | changes
    answer = await bus.js_api(f"STREAM.CREATE.{STREAM}", msgspec.json.encode(config), 5)
    assert b'"error"' not in answer, answer


class JetStreamHarness:
    """Two holders with a connection each: `leases` through a proxy, `other` past it."""

    def __init__(self, servers: Sequence[NatsServer], proxy: FaultProxy, near: Bus, far: Bus) -> None:
        self._servers = servers
        self._proxy = proxy
        self._far = far
        self._stalled = False
        self.replicas = len(servers)
        self.leases = JetStreamLeases(near, BUCKET, replicas=self.replicas)
        self.other = JetStreamLeases(far, BUCKET, replicas=self.replicas)

    async def open(self) -> None:
        """Open the bucket, as soon as the servers have found each other."""

        async def opened() -> bool:
            try:
                await self.leases.__aenter__()
                await self.other.__aenter__()
            except AgentFlowError:
                return False
            return True

        await eventually(opened, within_s=40)

    async def pass_ttl(self, lease: Lease) -> None:
        async def gone() -> bool:
            return await self.other.read(lease.key) is None

        await eventually(gone)
        assert lease.left_s() <= 0, "the server let go before the holder did"

    async def recreate(self) -> None:
        await self.delete()
        async with JetStreamLeases(self._far, BUCKET, replicas=self.replicas):
            pass

    async def delete(self) -> None:
        await self._far.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)

    async def silence(self) -> None:
        self._proxy.drop_answers()

    async def stall(self) -> None:
        self._stalled = True
        for server in self._servers:
            os.kill(server.pid, signal.SIGSTOP)

    async def heal(self) -> None:
        self._proxy.heal()
        if self._stalled:
            for server in self._servers:
                os.kill(server.pid, signal.SIGCONT)
        self._stalled = False

    def now(self) -> float:
        return time.monotonic()


class TestOneServer(LeasesConformance):
    """The suite on one server."""

    @pytest.fixture
    async def harness(self, nats_server: NatsServer) -> AsyncGenerator[JetStreamHarness, None]:
        async with harness_on([nats_server]) as made:
            yield made


class TestServersMarkers(LeasesConformance):
    """The suite on a bucket in which the server marks what has expired."""

    @pytest.fixture
    async def harness(self, nats_server: NatsServer) -> AsyncGenerator[JetStreamHarness, None]:
        async with harness_on([nats_server], markers=True) as made:
            yield made

    async def test_an_expiry_is_told(self, harness: JetStreamHarness) -> None:
        lease = await held(harness.leases, ttl_s=1)
        watching = Watching(harness.other, KEY, lease.revision)
        (change,) = await watching.until(bool)
        assert isinstance(change, Removed)
        assert (await held(harness.other)).epoch > change.revision
        await watching.close()


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def servers() -> AsyncGenerator[list[NatsServer], None]:
    """Three servers, for all tests of a class."""
    async with AsyncExitStack() as stack:
        routes = free_ports(3)
        servers = [NatsServer(routes=routes, cluster_port=port) for port in routes]
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        yield servers


@pytest.mark.asyncio(loop_scope="class")
@pytest.mark.timeout(120)
class TestThreeServers(LeasesConformance):
    """The suite on three servers, which stay for all of its tests."""

    @pytest_asyncio.fixture(loop_scope="class")
    async def harness(self, servers: list[NatsServer]) -> AsyncGenerator[JetStreamHarness, None]:
        async with harness_on(servers) as made:
            yield made


async def test_a_bucket_made_by_somebody_else_is_refused(bus: Bus) -> None:
    await create(bus, {"allow_msg_ttl": False})
    with pytest.raises(StreamMismatch, match="allow_msg_ttl: expected True, found False"):
        await JetStreamLeases(bus, BUCKET).__aenter__()


async def test_revisions_begin_where_they_are_told_to(bus: Bus) -> None:
    async with JetStreamLeases(bus, BUCKET, first_seq=7 << 32) as leases:
        assert leases.first_seq == 7 << 32
        assert (await held(leases)).epoch == 7 << 32
    async with JetStreamLeases(bus, BUCKET) as again:
        assert again.first_seq == 7 << 32


async def test_more_leases_than_one_answer_holds_are_read(bus: Bus) -> None:
    async with JetStreamLeases(bus, BUCKET) as leases:
        keys = [f"lock.{number}" for number in range(1_100)]
        await asyncio.gather(*(leases.acquire(key, b"", LONG_S) for key in keys))
        snapshot = await leases.entries(">")
        assert {entry.key for entry in snapshot.entries} == set(keys)


async def test_a_key_that_somebody_put_without_ceremony_is_a_lease(bus: Bus) -> None:
    async with JetStreamLeases(bus, BUCKET) as leases:
        await bus.ask(wire.bucket_subject(BUCKET, KEY), b"by hand", timeout_s=5)
        entry = await seen(leases)
        assert entry.ttl_s > 0
        assert await leases.acquire(KEY, b"", LONG_S) is None
        assert await leases.evict(entry)
        await held(leases)
