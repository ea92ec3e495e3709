"""Keeping a ticket alive: what counts is the holder's own deadline, not what the server still grants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from agentflow.leases.memory import MemoryLeases, MemoryLeaseServer
from agentflow.locks.keeper import Keeper

KEY = "a.ticket"
TTL_S = 10


class Holder:
    """A ticket and its keeper, whose clock may run ahead of the server's."""

    def __init__(self, server: MemoryLeaseServer) -> None:
        self.server = server
        self.ahead_s = 0.0
        self.leases = MemoryLeases(server, "locks", clock=self.clock)

    def clock(self) -> float:
        return self.server.now + self.ahead_s

    async def revision(self) -> int:
        entry = await self.leases.read(KEY)
        assert entry is not None
        return entry.revision


@asynccontextmanager
async def kept() -> AsyncGenerator[tuple[Holder, Keeper]]:
    holder = Holder(MemoryLeaseServer())
    async with holder.leases:
        lease = await holder.leases.acquire(KEY, b"", TTL_S)
        assert lease is not None
        keeper = Keeper(holder.leases, lease, holder.clock)
        yield holder, keeper
        await keeper.stop()


async def test_a_renewal_in_time_counts() -> None:
    async with kept() as (holder, keeper):
        before = await holder.revision()
        assert await keeper.renew()
        assert await holder.revision() > before


async def test_nothing_is_sent_once_the_deadline_has_passed() -> None:
    async with kept() as (holder, keeper):
        before = await holder.revision()
        holder.ahead_s = TTL_S
        assert not await keeper.renew()
        assert await holder.revision() == before
        assert keeper.lost.is_set()


async def test_a_renewal_answered_too_late_changes_nothing() -> None:
    async with kept() as (holder, keeper):
        holder.ahead_s = TTL_S * 0.8
        holder.server.hold_answers()
        renewing = asyncio.create_task(keeper.renew())
        for _ in range(20):
            await asyncio.sleep(0)
        holder.ahead_s = TTL_S * 0.95  # past the old deadline, before that of the renewal
        holder.server.let_go()
        assert not await renewing
        assert keeper.lost.is_set()
