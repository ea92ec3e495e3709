"""The proxy's faults: what is delayed keeps its order, and only acknowledgements are swallowed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
import uvloop

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame, Unknown
from tests.eventually import eventually
from tests.faultproxy import FaultProxy, _Line
from tests.servers import NatsServer

SUBJECT = "af.proxied.task.submitted.c"


@pytest.fixture
async def proxy(nats_server: NatsServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(nats_server.port) as standing:
        yield standing


async def test_a_delay_counts_each_way_and_keeps_the_order(proxy: FaultProxy) -> None:
    async with Bus(proxy.url, name="test") as bus:
        heard: list[int] = []
        await bus.subscribe("there", lambda _subject, data, _reply, _headers: heard.append(int(data)))
        proxy.delay(0.1)
        began = time.monotonic()
        bus.publish("there", b"0")
        await eventually(lambda: heard)
        assert time.monotonic() - began >= 0.2
        for number in range(1, 50):
            proxy.delay(0.1 if number < 25 else 0.0)
            bus.publish("there", str(number).encode())
            await asyncio.sleep(0)
        await eventually(lambda: len(heard) == 50)
        assert heard == list(range(50))


class _Heard:
    """What arrived at the other end."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.said.append(int(data))


@pytest.mark.parametrize("loop_runs", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_whatever_the_delay_is_nothing_overtakes_what_was_said_before(
    loop_runs: Callable[[Any], None],
) -> None:
    """A stream whose bytes change places is one that no network makes, and that nobody need survive."""
    chance = random.Random(1)

    async def talk() -> None:
        heard = _Heard()
        line = _Line(cast("asyncio.StreamWriter", heard))
        for number in range(2_000):
            line.send(str(number).encode(), chance.choice((0.0, 0.003, 0.006)))
            if not number % 3:
                busy_until = time.perf_counter() + chance.random() * 0.000_6
                while time.perf_counter() < busy_until:
                    pass
                await asyncio.sleep(0)
        await eventually(lambda: len(heard.said) == 2_000)
        assert heard.said == list(range(2_000))

    loop_runs(talk())


async def test_a_write_whose_acknowledgement_is_swallowed_is_stored(proxy: FaultProxy) -> None:
    frame = Frame(SUBJECT, b'{"function":"f"}')
    async with Bus(proxy.url, name="test") as bus, JetStreamLog(bus, "proxied") as log:
        proxy.drop_acks()
        await eventually(lambda: bus.connected and proxy.connections > 1)
        assert isinstance(await log.append(frame, timeout_s=0.3), Unknown)
        assert proxy.dropped_acks == 1
        assert (await log.identity()).last_seq == 1  # other answers pass
        proxy.heal()
        assert isinstance(await log.append(frame), Done)
        assert proxy.dropped_acks == 1


async def test_whoever_connects_while_nobody_listens_is_turned_away() -> None:
    async with FaultProxy(1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()
