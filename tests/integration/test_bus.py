"""The bus over a connection and a server that fail."""

# pyright: reportPrivateUsage=false
# Nothing public speaks nonsense to a server.

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvloop

from agentflow.bus import Bus
from agentflow.connection import Connection, OnMessage
from agentflow.errors import Disconnected, InvalidRequest, OperatingError
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer, free_port


class Heard:
    """Keeps what a subscription brings."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, dict[str, str] | None]] = []

    def __call__(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        del reply
        self.messages.append((subject, data, headers))


def answer_with(bus: Bus, text: bytes) -> OnMessage:
    """A callback that answers each request."""

    def answer(subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        del subject, headers
        bus.publish(reply, text + data)

    return answer


async def test_no_server_is_told_in_time() -> None:
    with pytest.raises(Disconnected, match=r"no connection to NATS within 0\.3 s: cannot connect"):
        async with Bus(f"nats://127.0.0.1:{free_port()}", name="lost", connect_timeout_s=0.3):
            pass


async def test_messages_and_headers_arrive_as_sent(bus: Bus) -> None:
    heard = Heard()
    subscription = await bus.subscribe("a.*", heard)
    bus.publish("a.b", b"plain")
    bus.publish("a.c", b"", {"Name": "värde: x", "Empty": ""})
    await eventually(lambda: len(heard.messages) == 2)
    assert heard.messages == [("a.b", b"plain", None), ("a.c", b"", {"Name": "värde: x", "Empty": ""})]
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    bus.publish("a.d", b"")
    await bus.js_api("INFO", b"", 5)
    assert len(heard.messages) == 2


async def test_a_queue_group_gets_each_message_once(bus: Bus) -> None:
    one, two = Heard(), Heard()
    await bus.subscribe("jobs", one, queue="workers")
    await bus.subscribe("jobs", two, queue="workers")
    for _ in range(20):
        bus.publish("jobs", b"")
    await bus.js_api("INFO", b"", 5)
    assert len(one.messages) + len(two.messages) == 20


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0\r\n", "a\tb"])
async def test_a_subject_cannot_smuggle_in_a_command(bus: Bus, subject: str) -> None:
    with pytest.raises(InvalidRequest):
        bus.publish(subject, b"")
    with pytest.raises(InvalidRequest):
        await bus.subscribe(subject, Heard())


@pytest.mark.parametrize("header", [{"A": "b\r\nC: d"}, {"A\r\n": "b"}, {"A": "b\n"}])
async def test_a_header_cannot_smuggle_in_another(bus: Bus, header: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        bus.publish("a", b"", header)


async def test_what_the_server_would_end_the_connection_for_is_not_sent(bus: Bus) -> None:
    with pytest.raises(InvalidRequest, match="the server takes"):
        bus.publish("a", b"x" * bus.max_payload, {"A": "b"})
    assert bus.connected


async def test_a_callback_that_fails_harms_nobody(bus: Bus) -> None:
    heard = Heard()

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    await bus.subscribe("a", fail)
    await bus.subscribe("a", heard)
    bus.publish("a", b"")
    await eventually(lambda: heard.messages)


async def test_nobody_answers_is_told_at_once(bus: Bus) -> None:
    with pytest.raises(Disconnected, match="nobody answers on nobody"):
        await bus.request("nobody", b"", 30)


async def test_an_answer_that_does_not_come_is_given_up(bus: Bus) -> None:
    await bus.subscribe("silent", Heard())
    with pytest.raises(Disconnected, match="no answer on silent"):
        await bus.request("silent", b"", 0.1)


async def test_a_forbidden_request_is_told_at_once() -> None:
    users = """authorization { users: [
        { user: u, password: p, permissions: { publish: { deny: "No.*" } } } ] }"""
    async with NatsServer(extra=users) as server:
        url = server.url.replace("//", "//u:p@")
        async with Bus(url, name="limited") as bus:
            with pytest.raises(OperatingError, match="permissions violation"):
                await bus.request("No.Way", b"", 30)


async def test_subscriptions_survive_the_server(nats_server: NatsServer, bus: Bus) -> None:
    changes: list[bool] = []
    bus.watch(changes.append)
    await bus.subscribe("question", answer_with(bus, b"re: "))
    assert await bus.request("question", b"1", 5) == b"re: 1"
    await nats_server.kill()
    await eventually(lambda: not bus.connected)
    with pytest.raises(Disconnected):
        bus.publish("question", b"")
    asking = asyncio.create_task(bus.request("question", b"2", 30))
    await nats_server.start()
    assert await asking == b"re: 2"
    assert changes == [False, True]


async def test_a_question_under_way_is_unknown_as_soon_as_the_connection_is_lost(
    nats_server: NatsServer,
) -> None:
    async with FaultProxy(nats_server.port) as proxy, Bus(proxy.url, name="shaky") as bus:
        await bus.subscribe("silent", Heard())
        answer = bus.ask("silent", b"", timeout_s=3600)
        await bus.js_api("INFO", b"", 5)
        proxy.cut()
        assert await answer is None


async def test_an_error_that_ends_the_connection_is_survived(nats_server: NatsServer, bus: Bus) -> None:
    connection = bus._connection
    assert connection is not None
    connection._write(b"NONSENSE\r\n")
    await eventually(lambda: bus._connection is not connection and bus.connected)
    assert nats_server.name in (await bus.request("$SYS.REQ.USER.INFO", b"", 5)).decode()


async def test_a_closed_bus_keeps_nobody_waiting(nats_server: NatsServer) -> None:
    async with Bus(nats_server.url, name="short") as bus:
        await nats_server.kill()
        await eventually(lambda: not bus.connected)
        waiting = asyncio.create_task(bus.wait_connected())
        asking = asyncio.create_task(bus.request("a", b"", 3600))
        await asyncio.sleep(0)
    for task in (waiting, asking):
        with pytest.raises(Disconnected, match="is closed"):
            await task


async def test_what_was_published_before_the_end_is_sent(nats_server: NatsServer, bus: Bus) -> None:
    heard = Heard()
    await bus.subscribe("last", heard)
    await bus.js_api("INFO", b"", 5)
    async with Bus(nats_server.url, name="short") as short:
        for _ in range(100):
            short.publish("last", b"x" * 10_000)
    await eventually(lambda: len(heard.messages) == 100)


async def test_several_servers_may_be_named_in_one_text(nats_server: NatsServer) -> None:
    urls = f" nats://127.0.0.1:{free_port()} ,{nats_server.url},"
    async with Bus(urls, name="listed") as bus:
        assert await bus.js_api("INFO", b"", 5)
    with pytest.raises(InvalidRequest, match="expected the URL of a NATS server"):
        Bus(" , ", name="none")


async def test_a_server_of_no_use_is_left_for_another() -> None:
    async with NatsServer() as one, NatsServer() as other, Bus([one.url, other.url], name="leaver") as bus:
        first = bus.server
        answer = bus.ask("nobody.answers", b"", timeout_s=30)
        bus.leave_server("it knows no leader")
        assert await answer is None, "what was asked is unknown"
        await eventually(lambda: bus.connected and bus.server != first)
        second = bus.server
        bus.leave_server("nor does this one")
        assert bus.connected, "not again at once"
        assert (first, second) in {(one.url, other.url), (other.url, one.url)}


async def test_the_only_server_is_not_left(bus: Bus) -> None:
    bus.leave_server("it is slow")
    assert bus.connected


def test_writing_to_what_was_reset_ends_the_connection(tmp_path: Path) -> None:
    """Under uvloop it raises, in the instant before the end of the connection is known."""

    async def use() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with NatsServer(folder=tmp_path) as server:
            connection = Connection(lambda _: None)
            await connection.open(server.url, name="reset", timeout_s=10)
            connection._transport.abort()
            await connection.dead.wait()
            connection.dead.clear()
            connection.publish("a.b", b"lost")
            await connection.dead.wait()
            connection.abort()
        assert failures == []

    uvloop.run(asyncio.wait_for(use(), 20))
