"""Leases in memory keep the port's promises, and its faults are those ordered."""

from __future__ import annotations

import asyncio

import pytest

from agentflow.errors import Disconnected
from agentflow.leases.memory import Fault, MemoryLeases, MemoryLeaseServer
from agentflow.leases.port import MARGIN_SHARE, Entry, Lease
from tests.integration.leases_conformance import BUCKET, KEY, LONG_S, LeasesConformance, held, seen


class MemoryHarness:
    """Two holders on a server in memory, in simulated time."""

    def __init__(self) -> None:
        self.server = MemoryLeaseServer()
        self.leases = MemoryLeases(self.server, BUCKET, name="a")
        self.other = MemoryLeases(self.server, BUCKET, name="b")

    async def pass_ttl(self, lease: Lease) -> None:
        self.server.advance(lease.ttl_s)

    async def recreate(self) -> None:
        await self.delete()
        self.server.create(BUCKET)

    async def delete(self) -> None:
        self.server.delete(BUCKET)

    async def silence(self) -> None:
        self.server.inject(Fault.ANSWER_LOST)

    async def stall(self) -> None:
        self.server.stop()

    async def heal(self) -> None:
        self.server.start()

    def now(self) -> float:
        return self.server.now


@pytest.fixture
async def harness() -> MemoryHarness:
    made = MemoryHarness()
    await made.leases.__aenter__()
    await made.other.__aenter__()
    return made


class TestMemoryLeases(LeasesConformance):
    """The suite, in memory."""


async def test_a_lost_write_was_not_stored(harness: MemoryHarness) -> None:
    harness.server.inject(Fault.WRITE_LOST)
    with pytest.raises(Disconnected):
        await harness.leases.acquire(KEY, b"a", LONG_S)
    assert await harness.other.read(KEY) is None


async def test_a_holder_cut_off_is_alone(harness: MemoryHarness) -> None:
    lease = await held(harness.leases)
    harness.server.cut_off("a")
    with pytest.raises(Disconnected):
        await harness.leases.renew(lease)
    assert await harness.other.read(KEY) is not None
    harness.server.heal("a")
    assert await harness.leases.renew(lease) is not None


async def test_the_deadline_counts_from_before_an_answer_held_back(harness: MemoryHarness) -> None:
    harness.server.hold_answers()
    sent_at = harness.now()
    acquiring = asyncio.create_task(harness.leases.acquire(KEY, b"a", 10))
    entry = await seen_soon(harness)
    harness.server.advance(8)
    harness.server.let_go()
    lease = await acquiring
    assert lease is not None
    assert lease.deadline == sent_at + 10 * (1 - MARGIN_SHARE)
    assert entry.epoch == lease.epoch


async def test_a_write_held_back_is_judged_when_it_arrives(harness: MemoryHarness) -> None:
    lease = await held(harness.leases)
    entry = await seen(harness.other)
    harness.server.hold_writes()
    renewing = asyncio.create_task(harness.leases.renew(lease))
    evicting = asyncio.create_task(harness.other.evict(entry))
    harness.server.let_go()
    assert await evicting == (await renewing is None)


async def test_everything_expires_by_the_servers_clock() -> None:
    now = 5.0
    server = MemoryLeaseServer(lambda: now)
    async with MemoryLeases(server, BUCKET, clock=lambda: now + 100) as leases:
        lease = await held(leases, ttl_s=10)
        assert lease.deadline == 105 + 9
        now = 14.9
        assert await leases.read(KEY) is not None
        now = 15.0
        assert await leases.read(KEY) is None


async def seen_soon(harness: MemoryHarness) -> Entry:
    while await harness.other.read(KEY) is None:
        await asyncio.sleep(0)
    return await seen(harness.other)
