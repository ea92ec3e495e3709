"""Locks on a real server: one holder, first come first served, and what is lost is known to be."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import pytest

from agentflow import Client, InvalidRequest, LockLost, LockNotHeld, LockTimeout, wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, OperatingError
from agentflow.events import LockAcquired, LockOpened, LockReleased
from agentflow.events import LockLost as Lost
from agentflow.frames import encode, level_headers
from agentflow.leases.bucket import bucket_config
from agentflow.locks.held import Held
from agentflow.log.port import Frame
from agentflow_nodes.embedded.address import free_ports
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

LOCK = "db migrate: tenant/42 ✓"
TTL_S = 2
STREAM = wire.bucket_stream(wire.lock_bucket("default"))


@pytest.fixture
async def clients(nats_server: NatsServer) -> AsyncGenerator[list[Client], None]:
    """Two clients of one namespace."""
    async with Client(nats_server.url, name="a") as one, Client(nats_server.url, name="b") as two:
        yield [one, two]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left who would create a bucket that the log tells of: it is not waited for long."""
    monkeypatch.setattr("agentflow.locks.bucket._PATIENCE_S", 0.2)


class Journal:
    """A fenced resource: it refuses tokens below the highest it has seen."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []
        self.inside = 0
        self.most_inside = 0

    def write(self, token: int, text: str) -> bool:
        """Write, if nobody with a higher token has."""
        if self.entries and token < self.entries[-1][0]:
            return False
        self.entries.append((token, text))
        return True

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncGenerator[None, None]:
        """Be inside, for some turns of the loop."""
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        for _ in range(5):
            await asyncio.sleep(0)
        yield
        self.inside -= 1


async def history(client: Client, name: str = LOCK) -> list[Any]:
    """What the log says of a lock, in order."""
    until = (await client.log.identity()).last_seq
    return [
        logged.event
        async for logged in client.events(after=0, until=until)
        if getattr(logged.event, "name", None) == name
    ]


def assert_exclusive(said: Sequence[Any]) -> None:
    """In the log one hold ends before the next begins, and tokens rise."""
    holder: int | None = None
    highest = 0
    for event in said:
        if isinstance(event, LockAcquired):
            assert holder is None, f"{event} while {holder} holds"
            assert event.token > highest
            holder = highest = event.token
        elif event.token == holder:
            holder = None


async def waiting(client: Client, count: int, name: str = LOCK) -> bool:
    """Whether so many wait for a lock."""
    info = await client.lock_info(name)
    return info is not None and len(info.waiters) == count


# Holding -----------------------------------------------------------------------------


async def test_a_lock_is_held_inside_the_block_and_free_after_it(clients: list[Client]) -> None:
    one, two = clients
    async with one.lock(LOCK, metadata={"why": "v7"}) as held:
        assert held.is_held()
        assert await two.lock(LOCK).try_acquire() is None
        info = await two.lock_info(LOCK)
        assert info is not None
        (holder,) = info.holders
        assert (info.name, info.mode, info.permits) == (LOCK, "exclusive", 1)
        assert (holder.token, holder.metadata) == (held.token, {"why": "v7"})
        assert holder.holder.startswith("a@")
        assert holder.since < holder.expires
    assert not held.is_held()
    assert not held.lost.is_set()
    assert await two.lock_info(LOCK) is None
    second = await two.lock(LOCK).try_acquire()
    assert second is not None
    assert second.token > held.token
    await second.release()
    said = await history(one)
    assert [type(event) for event in said] == [LockAcquired, LockReleased] * 2
    assert_exclusive(said)


async def test_contenders_exclude_each_other(clients: list[Client]) -> None:
    journal = Journal()

    async def contend(number: int) -> None:
        async with clients[number % 2].lock(LOCK) as held, journal.work():
            assert journal.write(held.token, f"by {number}")

    await asyncio.gather(*(contend(number) for number in range(20)))
    assert journal.most_inside == 1
    assert len(journal.entries) == 20
    said = await history(clients[0])
    assert len(said) == 40
    assert_exclusive(said)


async def test_twenty_waiters_are_served_in_the_order_they_came(clients: list[Client]) -> None:
    served: list[int] = []

    async def wait(number: int) -> None:
        async with clients[number % 2].lock(LOCK):
            served.append(number)

    first = await clients[0].lock(LOCK).acquire()
    async with asyncio.TaskGroup() as waiters:
        for number in range(20):
            waiters.create_task(wait(number))
            await eventually(functools.partial(waiting, clients[0], number + 1))
        info = await clients[0].lock_info(LOCK)
        assert info is not None
        tokens = [waiter.token for waiter in info.waiters]
        assert tokens == sorted(tokens)
        assert served == []
        await first.release()
    assert served == list(range(20))


async def test_shared_holders_share_and_an_exclusive_one_does_not(clients: list[Client]) -> None:
    one, two = clients
    first = await one.lock(LOCK, mode="shared").acquire()
    second = await two.lock(LOCK, mode="shared").acquire(0)
    writer = asyncio.create_task(two.lock(LOCK).acquire())
    await eventually(lambda: waiting(one, 1))
    assert await one.lock(LOCK, mode="shared").try_acquire() is None, "who came after the writer waits"
    late = asyncio.create_task(one.lock(LOCK, mode="shared").acquire())
    await eventually(lambda: waiting(one, 2))
    await first.release()
    assert not writer.done()
    await second.release()
    third = await writer
    assert not late.done()
    await third.release()
    assert (await late).token > third.token > second.token


async def test_a_semaphore_has_as_many_holders_as_permits(clients: list[Client]) -> None:
    journal = Journal()
    full = asyncio.Event()

    async def contend(number: int) -> None:
        async with clients[number % 2].lock(LOCK, mode="semaphore", permits=3), journal.work():
            if journal.inside == 3:
                full.set()
            await full.wait()

    await asyncio.gather(*(contend(number) for number in range(12)))
    assert journal.most_inside == 3


async def test_those_who_disagree_about_a_lock_are_told(clients: list[Client]) -> None:
    one, two = clients
    async with one.lock(LOCK, mode="semaphore", permits=3):
        with pytest.raises(
            InvalidRequest, match=r"semaphore with 2 permits was asked for, but a@.* 3 permits"
        ):
            await two.lock(LOCK, mode="semaphore", permits=2).acquire()
        with pytest.raises(InvalidRequest, match=r"exclusive access was asked for, but a@.* 3 permits"):
            await two.lock(LOCK).acquire()
        assert await two.lock(LOCK, mode="semaphore", permits=3).try_acquire() is not None


async def test_the_locks_of_a_namespace_are_listed(clients: list[Client]) -> None:
    one, two = clients
    assert await one.locks() == []
    names = ["plain", "with.dots", "ümlaut", "*", ">", "a b", "x" * 200]
    for name in names:
        await one.lock(name).acquire()
    assert [info.name for info in await two.locks()] == sorted(names)
    assert [info.name for info in await two.locks("with.*")] == ["with.dots"]
    assert (await two.locks("ümlaut"))[0].holders[0].token > 0


async def test_looking_at_locks_creates_nothing(clients: list[Client]) -> None:
    one, two = clients
    before = await one.log.identity()
    assert await one.locks() == []
    assert await one.lock_info(LOCK) is None
    assert not await exists(one.bus, STREAM)
    assert (await one.log.identity()).last_seq == before.last_seq
    await two.lock(LOCK).acquire()
    assert [info.name for info in await one.locks()] == [LOCK], "the bucket was created meanwhile"
    await two.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
    assert await one.locks() == []
    assert not await exists(one.bus, STREAM)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        ("x" * 201, {}),
        ("x\0", {}),
        ("\ud800", {}),
        ("x", {"mode": "semaphore", "permits": 0}),
        ("x", {"permits": 2}),
        ("x", {"mode": "greedy"}),
        ("x", {"ttl_s": 0}),
        ("x", {"ttl_s": 1.5}),
        ("x", {"metadata": {"a": 1}}),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    clients: list[Client], name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        clients[0].lock(name, **options)


async def test_only_a_holder_renews_and_releases(clients: list[Client]) -> None:
    one, two = clients
    lock, other = one.lock(LOCK, ttl_s=TTL_S), two.lock(LOCK)
    with pytest.raises(LockNotHeld):
        await lock.release()
    held = await lock.acquire()
    with pytest.raises(InvalidRequest, match="held, or waited for, by this very Lock"):
        await lock.acquire()
    for forbidden in (other.release, other.renew, lambda: other.extend(5)):
        with pytest.raises(LockNotHeld):
            await forbidden()
    before = held.deadline
    await lock.renew()
    assert held.deadline > before
    await lock.extend(60)
    assert held.ttl_s == 60
    assert held.deadline > before + 40
    await lock.release()
    await lock.release()
    with pytest.raises(LockNotHeld):
        await lock.renew()
    assert (await lock.acquire()).token > held.token


async def test_a_lock_is_renewed_by_itself(clients: list[Client]) -> None:
    async with clients[0].lock(LOCK, ttl_s=1) as held:
        first = held.deadline
        await eventually(lambda: held.deadline > first + 1)
        assert held.is_held()
        info = await clients[1].lock_info(LOCK)
        assert info is not None
        assert info.holders[0].token == held.token


# Leaving the line --------------------------------------------------------------------


async def test_waiting_ends_in_time(clients: list[Client]) -> None:
    one, two = clients
    async with one.lock(LOCK):
        with pytest.raises(LockTimeout, match="before us: a@"):
            await two.lock(LOCK).acquire(0.1)
        with pytest.raises(LockTimeout):
            async with two.lock(LOCK, wait_s=0):
                pytest.fail("it is not free")
        info = await one.lock_info(LOCK)
        assert info is not None
        assert info.waiters == []


async def test_a_cancelled_wait_leaves_the_line(clients: list[Client]) -> None:
    one, two = clients
    held = await one.lock(LOCK).acquire()
    first = asyncio.create_task(two.lock(LOCK).acquire())
    await eventually(lambda: waiting(one, 1))
    second = asyncio.create_task(one.lock(LOCK).acquire())
    await eventually(lambda: waiting(one, 2))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await eventually(lambda: waiting(one, 1))
    await held.release()
    assert (await second).is_held()


async def test_a_client_that_ends_releases_what_it_holds(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    async with Client(nats_server.url, name="short") as short:
        await short.lock(LOCK).acquire()
    assert await clients[0].lock(LOCK).try_acquire() is not None
    said = await history(clients[0])
    assert [type(event) for event in said] == [LockAcquired, LockReleased, LockAcquired]


# Losing it ---------------------------------------------------------------------------


async def test_a_holder_cut_off_knows_it_and_the_next_one_follows(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    _, two = clients
    journal = Journal()
    async with FaultProxy(nats_server.port) as proxy, Client(proxy.url, name="cut-off") as lonely:
        entered = asyncio.Event()
        told: list[LockLost] = []

        async def hold() -> None:
            try:
                async with lonely.lock(LOCK, ttl_s=TTL_S) as held:
                    journal.write(held.token, "lonely")
                    entered.set()
                    await asyncio.Event().wait()
            except LockLost as lost:
                told.append(lost)

        holding = asyncio.create_task(hold())
        await entered.wait()
        next_one = asyncio.create_task(two.lock(LOCK).acquire())
        await eventually(lambda: waiting(two, 1))
        proxy.blackhole(to_server=True, to_client=True)
        held = await next_one
        assert told, "the holder gave up before the next one came"
        await holding
        assert held.token > told[0].token
        assert journal.write(held.token, "next")
        assert not journal.write(told[0].token, "late")
        said = await history(two)
        assert [type(event) for event in said] == [LockAcquired, Lost, LockAcquired]
        assert said[1].token == told[0].token
        assert "silent" in said[1].reason
        proxy.heal()


async def test_a_silent_ticket_is_taken_away_by_one_of_many(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    served: list[int] = []

    async def wait(number: int) -> None:
        async with clients[number % 2].lock(LOCK) as held:
            served.append(held.token)

    async with FaultProxy(nats_server.port) as proxy, Client(proxy.url, name="cut-off") as lonely:
        dead = await lonely.lock(LOCK, ttl_s=TTL_S).acquire()
        async with asyncio.TaskGroup() as waiters:
            for number in range(6):
                waiters.create_task(wait(number))
                await eventually(functools.partial(waiting, clients[0], number + 1))
            proxy.blackhole(to_server=True, to_client=True)
        assert served == sorted(served)
        assert dead.lost.is_set()
        assert_exclusive(await history(clients[0]))
        proxy.heal()


async def test_a_silent_waiter_holds_nobody_up_for_longer_than_his_time_to_live(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    one, two = clients
    held = await one.lock(LOCK).acquire()
    async with FaultProxy(nats_server.port) as proxy, Client(proxy.url, name="cut-off") as lonely:
        dead = asyncio.create_task(lonely.lock(LOCK, ttl_s=TTL_S).acquire())
        await eventually(lambda: waiting(one, 1))
        behind = asyncio.create_task(two.lock(LOCK).acquire())
        await eventually(lambda: waiting(one, 2))
        proxy.blackhole(to_server=True, to_client=True)
        await held.release()
        assert (await behind).is_held()
        assert not dead.done(), "he waits on, and will stand at the end of the line"
        dead.cancel()
        proxy.heal()


@pytest.mark.usefixtures("impatient")
async def test_a_bucket_deleted_under_a_holder_is_a_loss_and_tokens_rise(clients: list[Client]) -> None:
    one, two = clients
    held = await one.lock(LOCK, ttl_s=TTL_S).acquire()
    waiter = asyncio.create_task(two.lock(LOCK).acquire())
    await eventually(lambda: waiting(one, 1))
    await one.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
    second = await waiter
    await eventually(held.lost.is_set)
    assert second.token >> 32 == (held.token >> 32) + 1
    assert second.token < 2**53
    with pytest.raises(LockLost):
        await held.release()
    with pytest.raises(LockLost):
        await held.renew()
    third = await one.lock("another").acquire()
    assert third.token > second.token
    assert await opened(one) == [1, 2]


@pytest.mark.usefixtures("impatient")
async def test_a_bucket_that_came_back_from_the_dead_is_not_used(clients: list[Client]) -> None:
    one, two = clients
    first = await one.lock(LOCK, ttl_s=1).acquire()
    await one.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
    await create_bucket(one.bus, first_seq=0)
    second = await two.lock(LOCK).acquire()
    assert second.token > first.token
    assert await opened(one) == [1, 2]
    third = await one.lock("another").acquire()
    assert third.token > second.token


@pytest.mark.usefixtures("impatient")
async def test_a_bucket_newer_than_the_log_tells_is_kept(clients: list[Client]) -> None:
    one, two = clients
    await create_bucket(one.bus, first_seq=7 << 32)
    held = await one.lock(LOCK).acquire()
    assert held.token >> 32 == 7
    assert await two.lock(LOCK).try_acquire() is None
    await one.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
    await one.log.append(frame_of(LockOpened(generation=9)))
    assert (await two.lock(LOCK).acquire()).token >> 32 == 10


async def test_many_open_the_bucket_at_once(nats_server: NatsServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        many = [
            await stack.enter_async_context(Client(nats_server.url, name=f"c{number}")) for number in range(6)
        ]
        held = await asyncio.gather(*(each.lock(each.name).acquire() for each in many))
        assert len({each.token for each in held}) == 6
        assert {each.token >> 32 for each in held} == {1}
        assert await opened(many[0]) == [1]


async def test_what_is_lost_is_told_as_asked(clients: list[Client]) -> None:
    one, _ = clients
    told: list[Held] = []

    async def on_lost(held: Held) -> None:
        told.append(held)

    async with (
        one.lock("callback", ttl_s=TTL_S, on_lost=on_lost) as first,
        one.lock("warn", ttl_s=TTL_S, on_lost="warn") as second,
    ):
        await one.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
        await asyncio.gather(first.lost.wait(), second.lost.wait())
        await eventually(lambda: told)
    assert told == [first]


async def test_an_error_of_the_body_is_not_hidden_by_the_loss(clients: list[Client]) -> None:
    one, _ = clients

    async def body() -> None:
        async with one.lock(LOCK, ttl_s=TTL_S) as held:
            await one.bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
            try:
                await held.lost.wait()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("own") from None

    with pytest.raises(ValueError, match="own"):
        await body()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the cancellation was taken back"


async def test_a_cancellation_from_outside_stays_one(clients: list[Client]) -> None:
    entered = asyncio.Event()

    async def body() -> None:
        async with clients[0].lock(LOCK):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await clients[1].lock(LOCK).try_acquire() is not None


# NATS going away and back ------------------------------------------------------------


async def test_a_lock_outlives_a_restart_of_the_server(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    one, two = clients
    async with one.lock(LOCK, ttl_s=10) as held:
        waiter = asyncio.create_task(two.lock(LOCK, ttl_s=10).acquire())
        await eventually(lambda: waiting(one, 1))
        await nats_server.restart()
        before = held.deadline
        await eventually(lambda: held.deadline > before)
        assert not waiter.done()
    assert (await waiter).token > held.token
    assert_exclusive(await history(one))


async def test_waiting_begins_before_the_server_is_there(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    one, two = clients
    await nats_server.kill()
    waiter = asyncio.create_task(one.lock(LOCK).acquire())
    with pytest.raises(Disconnected):
        await two.lock(LOCK).try_acquire()
    await nats_server.start()
    assert (await waiter).is_held()


async def test_a_ticket_whose_answer_was_lost_is_the_one_that_is_used(
    nats_server: NatsServer, clients: list[Client]
) -> None:
    _, two = clients
    async with FaultProxy(nats_server.port) as proxy, Client(proxy.url, name="shaky") as shaky:
        await shaky.lock("opens the bucket").acquire()
        proxy.drop_answers()
        acquiring = asyncio.create_task(shaky.lock(LOCK, ttl_s=30).acquire())
        info = await eventually(lambda: two.lock_info(LOCK))
        proxy.heal()
        held = await acquiring
        assert held.token == info.holders[0].token
        assert (await two.lock_info(LOCK)) is not None
        await held.release()


async def opened(client: Client) -> list[int]:
    """The generations the log tells of."""
    until = (await client.log.identity()).last_seq
    return [
        logged.event.generation
        async for logged in client.events(after=0, until=until)
        if isinstance(logged.event, LockOpened)
    ]


async def exists(bus: Bus, stream: str) -> bool:
    """Whether there is such a stream."""
    return b'"error"' not in await bus.js_api(f"STREAM.INFO.{stream}", b"", 5)


def frame_of(event: LockOpened) -> Frame:
    """An event as its speaker writes it."""
    return Frame(wire.locks_opened("default"), encode([event]), "by-hand.1", level_headers([event]))


async def create_bucket(bus: Bus, *, first_seq: int) -> None:
    """Create the bucket of locks behind everybody's back."""
    config = bucket_config(wire.lock_bucket("default"), replicas=1, first_seq=first_seq)
    answer = await bus.js_api(f"STREAM.CREATE.{STREAM}", msgspec.json.encode(config), 5)
    assert b'"error"' not in answer, answer


# Three servers -----------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_on_three_servers_locks_outlive_the_loss_of_one() -> None:
    routes = free_ports(3)
    servers = [NatsServer(routes=routes, cluster_port=port) for port in routes]
    async with contextlib.AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        urls = [server.url for server in servers]
        one = await eventually(functools.partial(connected, stack, urls), within_s=40)
        two = await eventually(functools.partial(connected, stack, urls), within_s=40)
        journal = Journal()
        served: list[int] = []

        async def contend(number: int) -> None:
            async with (one, two)[number % 2].lock(LOCK) as held, journal.work():
                assert journal.write(held.token, "")
                served.append(held.token)

        await asyncio.gather(*(contend(number) for number in range(10)))
        await servers[0].kill()
        await asyncio.gather(*(contend(number) for number in range(10)))
        assert journal.most_inside == 1
        assert served == sorted(served)
        assert_exclusive(await history(one))


async def connected(stack: contextlib.AsyncExitStack, urls: Sequence[str]) -> Client | None:
    """A client of the cluster, or None while its servers have not found each other."""
    try:
        return await stack.enter_async_context(Client(urls, name="replicated", replicas=3))
    except OperatingError:
        return None
