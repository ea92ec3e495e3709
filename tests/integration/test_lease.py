"""Leases on a real server: one holder, and what time and lost answers do to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from agentflow.bus import Bus
from agentflow.errors import Disconnected, StreamMismatch
from agentflow.lease import Lease, LeaseStore
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

KEY = "leader.default"


@pytest.fixture
async def leases(bus: Bus) -> AsyncIterator[LeaseStore]:
    """The bucket of leases."""
    async with LeaseStore(bus) as store:
        yield store


async def acquired(leases: LeaseStore, value: bytes = b"a", ttl_s: int = 30) -> Lease:
    """A lease that must be free."""
    lease = await leases.acquire(KEY, value, ttl_s)
    assert lease is not None
    return lease


async def test_one_of_many_acquires(leases: LeaseStore) -> None:
    contenders = [leases.acquire(KEY, b"%d" % number, 30) for number in range(10)]
    held = [lease for lease in await asyncio.gather(*contenders) if lease is not None]
    assert len(held) == 1
    assert await leases.holder(KEY) == held[0].value


async def test_a_renewal_keeps_the_epoch_and_moves_the_deadline(leases: LeaseStore) -> None:
    lease = await acquired(leases)
    renewed = await leases.renew(lease)
    assert renewed is not None
    assert renewed.epoch == lease.epoch
    assert renewed.revision > lease.revision
    assert lease.deadline < renewed.deadline <= time.monotonic() + lease.ttl_s


async def test_a_released_lease_is_free_and_its_epoch_past(leases: LeaseStore) -> None:
    first = await acquired(leases, b"a")
    await leases.release(first)
    assert await leases.holder(KEY) is None
    second = await acquired(leases, b"b")
    assert second.epoch > first.epoch
    assert await leases.renew(first) is None
    await leases.release(first)
    assert await leases.holder(KEY) == b"b"


async def test_a_lease_ends_by_itself_though_it_was_renewed(leases: LeaseStore) -> None:
    lease = await leases.renew(await acquired(leases, ttl_s=1))
    assert lease is not None

    async def free() -> bool:
        return await leases.holder(KEY) is None

    await eventually(free)
    assert lease.left_s <= 0, "the server let go before the holder did"
    assert await leases.renew(lease) is None, "a holder whose key is gone has lost it"
    assert (await acquired(leases, b"b")).epoch > lease.epoch


async def test_a_lost_answer_is_found_out(nats_server: NatsServer, leases: LeaseStore) -> None:
    async with FaultProxy(nats_server.port) as proxy, Bus(proxy.url, name="shaky") as shaky:
        store = LeaseStore(shaky)
        lease = await acquired(store)
        proxy.drop_answers()
        with pytest.raises(Disconnected):
            await store.renew(lease)
        proxy.heal()

        async def renewed() -> Lease | None:
            try:
                return await store.renew(lease)
            except Disconnected:
                return None

        again = await eventually(renewed)
        assert again.epoch == lease.epoch
        assert await leases.holder(KEY) == lease.value


async def test_a_bucket_made_by_somebody_else_is_refused(bus: Bus) -> None:
    await bus.js_api(
        "STREAM.CREATE.KV_AF_LEASES", b'{"name":"KV_AF_LEASES","subjects":["$KV.AF_LEASES.>"]}', 5
    )
    with pytest.raises(StreamMismatch, match="allow_msg_ttl: expected True, found False"):
        await LeaseStore(bus).__aenter__()
