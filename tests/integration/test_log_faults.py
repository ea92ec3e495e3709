"""The log over a network and a server that fail."""

# pyright: reportPrivateUsage=false
# A fault from inside the client needs the inside.

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Self

import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Appended, Done, Fence, Frame, Message, Reason, Refused, Unknown
from agentflow_nodes.embedded.address import free_ports
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

NAMESPACE = "faults"
ELECTED = wire.elected(NAMESPACE)
SUBMITTED = wire.event(NAMESPACE, "task.submitted", "cli")

# How long a test lets one write try before the fault is over.
_PATIENCE_S = 20.0


def frame(number: int, subject: str = SUBMITTED) -> Frame:
    """A frame like no other with another number."""
    return Frame(subject, b'{"n":%d}' % number, f"cli.n0nce.{number}")


class Reader:
    """Follows a log in the background and keeps what it reads."""

    def __init__(self, log: JetStreamLog, after: int = 0, subjects: Sequence[str] = ()) -> None:
        self.messages: list[Message] = []
        self._log = log
        self._after = after
        self._subjects = subjects
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def reaches(self, count: int) -> None:
        """Wait until `count` messages were read, each once and in order."""
        await eventually(lambda: len(self.messages) >= count, within_s=30)
        read = [message.seq for message in self.messages]
        assert read == list(range(1, len(read) + 1))

    async def _read(self) -> None:
        async for messages in self._log.follow(self._after, subjects=self._subjects):
            self.messages += messages


@pytest.fixture
async def proxy(nats_server: NatsServer) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the server."""
    async with FaultProxy(nats_server.port) as running:
        yield running


@pytest.fixture
async def shaky(proxy: FaultProxy) -> AsyncIterator[Bus]:
    """A bus connected through the proxy."""
    async with Bus(proxy.url, name="shaky") as connected:
        yield connected


@pytest.fixture
async def log(shaky: Bus) -> AsyncIterator[JetStreamLog]:
    """A log over the shaky bus."""
    async with JetStreamLog(shaky, NAMESPACE) as opened:
        yield opened


@pytest.fixture
async def steady(bus: Bus, log: JetStreamLog) -> AsyncIterator[JetStreamLog]:
    """The same log over a connection nothing happens to."""
    assert log.namespace == NAMESPACE
    async with JetStreamLog(bus, NAMESPACE) as opened:
        yield opened


async def stored(log: JetStreamLog) -> list[Message]:
    """Everything in the log."""
    last = (await log.identity()).last_seq
    messages: list[Message] = []
    if last:
        async with aclosing(log.follow(0)) as follower:
            async for some in follower:
                messages += some
                if messages[-1].seq >= last:
                    break
    return messages


async def ids(log: JetStreamLog) -> list[str]:
    """The message ids in the log, in order."""
    return [(message.headers or {})[wire.MSG_ID] for message in await stored(log)]


async def write_while(log: JetStreamLog, fault: asyncio.Task[None]) -> int:
    """Append one by one until the fault is over, and say how many."""
    number = 0
    while not fault.done():
        number += 1
        assert isinstance(await log.append(frame(number), timeout_s=_PATIENCE_S), Done)
    await fault
    return number


async def test_a_killed_server_loses_nothing_and_nobody_notices(nats_server: NatsServer, bus: Bus) -> None:
    async with JetStreamLog(bus, NAMESPACE) as log, Reader(log) as reader:

        async def kill_thrice() -> None:
            for kill in range(1, 4):
                await reader.reaches(50 * kill)
                await nats_server.restart()

        written = await write_while(log, asyncio.create_task(kill_thrice()))
        await reader.reaches(written)
        assert [message.data for message in reader.messages] == [frame(n).data for n in range(1, written + 1)]


async def test_cut_connections_lose_nothing_and_double_nothing(proxy: FaultProxy, log: JetStreamLog) -> None:
    async with Reader(log) as reader:

        async def cut_often() -> None:
            for cut in range(1, 6):
                await reader.reaches(20 * cut)
                proxy.cut()

        written = await write_while(log, asyncio.create_task(cut_often()))
        await reader.reaches(written)


async def test_batches_survive_cut_connections_whole_and_once(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    async def cut_often() -> None:
        for cut in range(1, 5):
            await grows_to(steady, 300 * cut)
            proxy.cut()

    fault = asyncio.create_task(cut_often())
    batches: list[list[Frame]] = []
    while not fault.done():
        batches.append([frame(len(batches) * 100 + n) for n in range(100)])
        assert isinstance(await log.append_batch(batches[-1], timeout_s=_PATIENCE_S), Done)
    await fault
    assert await ids(steady) == [each.msg_id for batch in batches for each in batch]


async def grows_to(log: JetStreamLog, seq: int) -> None:
    """Wait until the log holds that much."""

    async def has_grown() -> bool:
        return (await log.identity()).last_seq >= seq

    await eventually(has_grown)


async def lose_the_answer(
    proxy: FaultProxy, append: asyncio.Task[Appended], log: JetStreamLog, seq: int
) -> Appended:
    """Let the write arrive while its answer is lost, then heal."""
    await grows_to(log, seq)
    await eventually(lambda: proxy.dropped_bytes > 0)
    proxy.heal()
    return await append


async def test_a_lost_acknowledgement_is_found_out(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    proxy.drop_answers()
    append = asyncio.create_task(log.append(frame(1), timeout_s=_PATIENCE_S))
    assert await lose_the_answer(proxy, append, steady, 1) == Done(1, duplicate=True)
    assert await ids(steady) == ["cli.n0nce.1"]


async def test_a_lost_acknowledgement_of_a_compare_and_set_is_found_out(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    proxy.drop_answers()
    append = asyncio.create_task(
        log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0), timeout_s=_PATIENCE_S)
    )
    assert await lose_the_answer(proxy, append, steady, 1) == Done(1, duplicate=True)
    assert await ids(steady) == ["cli.n0nce.1"]


async def test_a_fenced_write_that_arrived_before_its_fence_fell_is_found_out(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    await steady.append(frame(1, ELECTED), fence=Fence(ELECTED, 0))
    proxy.drop_answers()
    append = asyncio.create_task(log.append(frame(2), fence=Fence(ELECTED, 1), timeout_s=_PATIENCE_S))
    await grows_to(steady, 2)
    await steady.append(frame(3), timeout_s=_PATIENCE_S)
    await steady.append(frame(4, ELECTED), fence=Fence(ELECTED, 1))
    assert await lose_the_answer(proxy, append, steady, 2) == Done(2, duplicate=True)
    assert await ids(steady) == [f"cli.n0nce.{n}" for n in range(1, 5)]


async def test_a_fenced_write_that_came_too_late_is_refused_for_certain(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    await steady.append(frame(1, ELECTED), fence=Fence(ELECTED, 0))
    proxy.blackhole(to_server=True)
    append = asyncio.create_task(log.append(frame(2), fence=Fence(ELECTED, 1), timeout_s=_PATIENCE_S))
    await steady.append(frame(3, ELECTED), fence=Fence(ELECTED, 1))
    proxy.heal()
    appended = await append
    assert isinstance(appended, Refused), appended
    assert appended.reason is Reason.FENCED
    assert await ids(steady) == ["cli.n0nce.1", "cli.n0nce.3"]


async def test_a_lost_acknowledgement_of_a_batch_is_found_out(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    batch = [frame(n) for n in range(50)]
    proxy.drop_answers()
    append = asyncio.create_task(log.append_batch(batch, timeout_s=_PATIENCE_S))
    assert await lose_the_answer(proxy, append, steady, 50) == Done(50, duplicate=True)
    assert await ids(steady) == [each.msg_id for each in batch]


async def test_a_write_without_an_id_is_never_repeated(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    proxy.drop_answers()
    append = asyncio.create_task(log.append(Frame(SUBMITTED, b"{}"), timeout_s=_PATIENCE_S))
    assert isinstance(await lose_the_answer(proxy, append, steady, 1), Unknown)
    assert (await steady.identity()).last_seq == 1


async def test_an_unknown_write_is_settled_by_repeating_it_later(
    proxy: FaultProxy, log: JetStreamLog, steady: JetStreamLog
) -> None:
    proxy.drop_answers()
    assert isinstance(await log.append(frame(1), timeout_s=0.3), Unknown)
    proxy.heal()
    assert await log.append(frame(1), timeout_s=_PATIENCE_S) == Done(1, duplicate=True)
    assert (await steady.identity()).last_seq == 1


async def test_what_could_not_be_sent_is_refused(proxy: FaultProxy, shaky: Bus, log: JetStreamLog) -> None:
    proxy.refuse()
    await eventually(lambda: not shaky.connected)
    appended = await log.append(frame(1), timeout_s=0.2)
    assert isinstance(appended, Refused), appended
    assert appended.reason is Reason.BUSY
    with pytest.raises(Disconnected):
        shaky.publish("anything", b"")


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
async def test_a_half_open_connection_is_noticed(
    proxy: FaultProxy, shaky: Bus, log: JetStreamLog, steady: JetStreamLog, direction: str
) -> None:
    async with Reader(log) as reader:
        await steady.append(frame(1))
        await reader.reaches(1)
        proxy.blackhole(**{direction: True})
        await eventually(lambda: not shaky.connected)
        proxy.heal()
        await steady.append(frame(2))
        await reader.reaches(2)


async def test_a_dead_read_loop_is_noticed(shaky: Bus, log: JetStreamLog, steady: JetStreamLog) -> None:
    async with Reader(log) as reader:
        await steady.append(frame(1))
        await reader.reaches(1)
        kill_read_loop(shaky)
        await steady.append(frame(2))
        await reader.reaches(2)
        assert isinstance(await log.append(frame(3)), Done)


def kill_read_loop(bus: Bus) -> None:
    """End the task that reads, as a defect in the client would: nothing else is told."""
    (task,) = [task for task in asyncio.all_tasks() if is_read_loop_of(task, bus)]
    task.cancel()


def is_read_loop_of(task: asyncio.Task[object], bus: Bus) -> bool:
    """Whether the task is the read loop of the bus's present connection."""
    coroutine = task.get_coro()
    frame_locals = getattr(coroutine, "cr_frame", None)
    owner = frame_locals.f_locals.get("self") if frame_locals is not None else None
    return getattr(coroutine, "__name__", "") == "_read_loop" and owner is client_of(bus)


def client_of(bus: Bus) -> object:
    """The foreign client below the bus."""
    connection = bus._connection
    return None if connection is None else connection._client


@pytest.mark.parametrize("lost", [3, 6], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("subjects", [(), (SUBMITTED,)], ids=["all subjects", "one subject"])
async def test_a_delivery_that_got_lost_is_fetched_again(
    shaky: Bus, log: JetStreamLog, lost: int, subjects: Sequence[str]
) -> None:
    known = set(shaky._subscriptions)
    async with Reader(log, subjects=subjects) as reader:
        assert isinstance(await log.append(frame(1)), Done)
        await reader.reaches(1)
        (sid,) = set(shaky._subscriptions) - known
        lose_message(shaky, sid, seq=lost)
        for number in range(2, 7):
            assert isinstance(await log.append(frame(number)), Done)
        await reader.reaches(6)


def lose_message(bus: Bus, sid: int, seq: int) -> None:
    """Let one message of a subscription not arrive."""
    assert bus._connection is not None
    callbacks = bus._connection._client.callbacks
    deliver = callbacks[sid]

    def deliver_others(subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        if data != frame(seq).data:
            deliver(subject, data, reply, headers)

    callbacks[sid] = deliver_others


async def test_a_slow_reader_stops_the_server_and_loses_nothing(
    log: JetStreamLog, steady: JetStreamLog
) -> None:
    big = [Frame(SUBMITTED, b"x" * 400_000, f"big.{n}") for n in range(200)]
    for start in range(0, 200, 50):
        assert isinstance(await steady.append_batch(big[start : start + 50]), Done)
    largest = 0
    read: list[int] = []
    async with aclosing(log.follow(0)) as follower:
        async for messages in follower:
            largest = max(largest, sum(len(message.data) for message in messages))
            read += [message.seq for message in messages]
            await let_others_run()
            if len(read) == len(big):
                break
    assert read == list(range(1, 201))
    assert largest <= 48 * 1024 * 1024  # the server's window, and what was under way


async def let_others_run() -> None:
    """Let everything else run, as a slow reader does."""
    for _ in range(200):
        await asyncio.sleep(0)


class Cluster:
    """Three nats-servers."""

    def __init__(self) -> None:
        routes = free_ports(3)
        self.servers = [NatsServer(routes=routes, cluster_port=port) for port in routes]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(self._stack.enter_async_context(server) for server in self.servers))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [server.url for server in self.servers]


async def open_replicated(bus: Bus) -> JetStreamLog:
    """A log on three servers, as soon as they have found each other."""
    log = JetStreamLog(bus, NAMESPACE, replicas=3)

    async def opened() -> bool:
        try:
            await log.__aenter__()
        except Exception:  # noqa: BLE001 - any: the cluster is still electing
            return False
        return True

    await eventually(opened, within_s=40)
    return log


@pytest.mark.timeout(120)
async def test_on_three_servers_a_repetition_is_recognised_and_fences_hold() -> None:
    async with Cluster() as cluster, Bus(cluster.urls, name="cluster") as bus:
        log = await open_replicated(bus)
        async with Reader(log) as reader:
            elected = await log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0), timeout_s=_PATIENCE_S)
            assert elected == Done(1)
            again = await log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0), timeout_s=_PATIENCE_S)
            assert again == Done(1, duplicate=True)
            fence = Fence(ELECTED, 1)
            parallel = await asyncio.gather(
                *(log.append(frame(n), fence=fence, timeout_s=_PATIENCE_S) for n in range(2, 22))
            )
            assert all(isinstance(each, Done) for each in parallel), parallel
            batch = [frame(n) for n in range(22, 32)]
            done = await log.append_batch(batch, fence=fence, timeout_s=_PATIENCE_S)
            assert done == Done(31)
            assert await log.append_batch(batch, fence=fence) == Done(31, duplicate=True)
            await cluster.servers[0].kill()
            for number in range(32, 42):
                assert isinstance(await log.append(frame(number), fence=fence, timeout_s=_PATIENCE_S), Done)
            stale = await log.append(frame(50), fence=Fence(ELECTED, 0), timeout_s=_PATIENCE_S)
            assert isinstance(stale, Refused), stale
            assert stale.reason is Reason.FENCED
            await reader.reaches(41)
