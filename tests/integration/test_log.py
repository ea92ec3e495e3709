"""The log's promises, kept by both adapters, and what is JetStream's alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, LogGone, LogTrimmed, StreamMismatch
from agentflow.log import follow, jetstream, trim
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.memory import Fault, MemoryLog, MemoryServer
from agentflow.log.port import Done, Fence, Frame, Log, Message, Reason, Refused, TrimmableLog, Unknown
from agentflow.log.stream import log_config
from tests.eventually import eventually
from tests.integration.log_conformance import (
    ASSIGNED,
    ELECTED,
    NAMESPACE,
    SUBMITTED,
    LogConformance,
    Logs,
    frame,
    refusal,
    trim_to,
)
from tests.servers import NatsServer

STREAM = wire.stream(NAMESPACE)


async def _rest_of(reading: AsyncIterator[list[Message]]) -> None:
    """Read on, until the log ends it."""
    async for _ in reading:
        pass


def _reader_of(reading: AsyncIterator[list[Message]]) -> Any:
    """What is behind a generator that reads."""
    return reading.ag_frame.f_locals["reader"]  # type: ignore[attr-defined]


class MemoryLogs:
    """Two handles on a log in memory."""

    def __init__(self, server: MemoryServer, log: TrimmableLog, other: Log) -> None:
        self.log = log
        self.other = other
        self._server = server

    async def recreate(self) -> None:
        """Delete the stream and create it again, empty."""
        self._server.delete(NAMESPACE)
        self._server.create(NAMESPACE)

    async def purge(self, before: int) -> None:
        """Remove the messages before a sequence."""
        self._server.streams[NAMESPACE].purge(before)


class JetStreamLogs:
    """Two handles on a log in JetStream."""

    def __init__(self, bus: Bus, log: TrimmableLog, other: Log) -> None:
        self.log = log
        self.other = other
        self._bus = bus

    async def recreate(self) -> None:
        """Delete the stream and create it again, empty."""
        await self._bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
        async with JetStreamLog(self._bus, NAMESPACE):
            pass

    async def purge(self, before: int) -> None:
        """Remove the messages before a sequence."""
        await self._bus.js_api(f"STREAM.PURGE.{STREAM}", b'{"seq":%d}' % before, 5)


class TestMemoryLog(LogConformance):
    """The log in memory."""

    @pytest.fixture
    async def logs(self) -> AsyncIterator[Logs]:
        """An empty log."""
        server = MemoryServer()
        async with MemoryLog(server, NAMESPACE) as log, MemoryLog(server, NAMESPACE) as other:
            yield MemoryLogs(server, log, other)

    async def test_a_message_id_is_forgotten_after_the_window(self) -> None:
        server = MemoryServer()
        async with MemoryLog(server, NAMESPACE) as log:
            await log.append(frame(1))
            server.advance(121)
            assert await log.append(frame(1)) == Done(2)

    async def test_faults_come_in_the_order_injected(self) -> None:
        server = MemoryServer()
        server.inject(
            Fault.ACK_LOST, Fault.STORED_UNKNOWN, Fault.LOST_UNKNOWN, Refused(Reason.FULL, 10077, "full")
        )
        async with MemoryLog(server, NAMESPACE) as log:
            assert await log.append(frame(1)) == Done(1, duplicate=True)
            assert isinstance(await log.append(frame(2)), Unknown)
            assert isinstance(await log.append(frame(3)), Unknown)
            assert refusal(await log.append(frame(4))) is Reason.FULL
            assert await log.find("cli.n0nce.2", after=0) == 2
            assert await log.append(frame(3)) == Done(3)

    async def test_a_log_that_went_back_is_gone(self) -> None:
        server = MemoryServer()
        async with MemoryLog(server, NAMESPACE) as log:
            await log.append_batch([frame(n) for n in range(5)])
            server.streams[NAMESPACE].truncate(3)
            with pytest.raises(LogGone, match="went back: it ends at 3, 5 was seen"):
                await anext(log.follow(5))

    async def test_a_full_log_refuses(self) -> None:
        async with MemoryLog(MemoryServer(), NAMESPACE, bytes_max=10) as log:
            assert isinstance(await log.append(frame(1)), Done)
            assert refusal(await log.append(frame(2))) is Reason.FULL


class TestJetStreamLog(LogConformance):
    """The log in JetStream."""

    @pytest.fixture
    async def logs(self, nats_server: NatsServer, bus: Bus) -> AsyncIterator[Logs]:
        """An empty log, with its two handles on two connections."""
        async with (
            Bus(nats_server.url, name="other") as other_bus,
            JetStreamLog(bus, NAMESPACE) as log,
            JetStreamLog(other_bus, NAMESPACE) as other,
        ):
            yield JetStreamLogs(bus, log, other)

    async def test_the_stream_is_configured_as_agreed(self, logs: Logs, bus: Bus) -> None:
        del logs
        info = msgspec.json.decode(await bus.js_api(f"STREAM.INFO.{STREAM}", b"", 5))
        config = info["config"]
        assert config["discard"] == "new"
        assert config["deny_delete"] is True
        assert config["max_consumers"] == 5000
        assert config["duplicate_window"] == 120_000_000_000
        assert not config["allow_rollup_hdrs"]
        assert not config["allow_msg_ttl"]

    async def test_every_difference_is_named(self, bus: Bus) -> None:
        config = log_config(NAMESPACE, replicas=1, bytes_max=-1)
        config |= {"deny_delete": False, "allow_rollup_hdrs": True, "max_consumers": 10, "max_age": 10**12}
        await bus.js_api(f"STREAM.CREATE.{STREAM}", msgspec.json.encode(config), 5)
        with pytest.raises(StreamMismatch) as raised:
            await JetStreamLog(bus, NAMESPACE).__aenter__()
        text = str(raised.value)
        assert f"stream {STREAM}" in text
        assert "deny_delete: expected True, found False" in text
        assert "allow_rollup_hdrs: expected False, found True" in text
        assert "max_consumers: expected 5000, found 10" in text
        assert "max_age: expected 0, found 1000000000000" in text
        assert "storage" not in text

    async def test_a_missing_log_is_not_created_unasked(self, bus: Bus) -> None:
        with pytest.raises(LogGone, match="there is no stream"):
            await JetStreamLog(bus, NAMESPACE, create=False).__aenter__()

    async def test_a_full_log_refuses(self, bus: Bus) -> None:
        async with JetStreamLog(bus, NAMESPACE, bytes_max=10_000) as log:
            fill = [await log.append(Frame(SUBMITTED, b"x" * 1000, f"fill.{n}")) for n in range(12)]
            assert isinstance(fill[0], Done)
            assert refusal(fill[-1]) is Reason.FULL

    async def test_a_deleted_log_refuses(self, logs: Logs, bus: Bus) -> None:
        await bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
        assert refusal(await logs.log.append(frame(1), timeout_s=0.5)) is Reason.GONE
        assert refusal(await logs.log.append_batch([frame(1), frame(2)], timeout_s=0.5)) is Reason.GONE
        with pytest.raises(LogGone):
            await logs.log.last(SUBMITTED)

    async def test_a_purge_under_a_reader_ends_it(
        self, logs: Logs, bus: Bus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow, "_CHECK_S", 0.1)
        for number in range(1, 6):
            await logs.log.append(frame(number))
        early, late = logs.log.follow(0, subjects=[SUBMITTED]), logs.log.follow(3)
        assert (await anext(early))[0].seq == 1
        assert (await anext(late))[0].seq == 4
        waiting = asyncio.create_task(_rest_of(late))
        await logs.purge(before=4)
        with pytest.raises(LogGone, match="was purged: it begins at 4, 1 is wanted"):
            await asyncio.wait_for(_rest_of(early), 10)
        await logs.log.append(frame(6))
        await logs.purge(before=6)
        with pytest.raises(LogGone, match="was purged: it begins at 6, 4 is wanted"):
            await asyncio.wait_for(waiting, 10)

    async def test_an_idle_reader_of_some_subjects_outlives_a_trim(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow, "_CHECK_S", 0.05)
        reading = logs.log.follow(0, subjects=[ASSIGNED])
        await logs.log.append(frame(1, ASSIGNED))
        assert [each.seq for each in await anext(reading)] == [1]
        waiting = asyncio.ensure_future(anext(reading))
        for number in range(2, 6):
            await logs.log.append(frame(number))
        passed = _reader_of(reading)
        await eventually(lambda: passed._passed_seq >= 5, within_s=10)
        await logs.log.trim(trim_to(5))
        await eventually(lambda: passed._trimmed_seq == 5, within_s=10)
        await logs.log.append(frame(6, ASSIGNED))
        assert [each.seq for each in await asyncio.wait_for(waiting, 10)] == [6]

    async def test_a_reader_that_fell_behind_a_trim_is_told(
        self, logs: Logs, nats_server: NatsServer
    ) -> None:
        await logs.log.append(frame(1))
        reading = logs.log.follow(0)
        assert [each.seq for each in await anext(reading)] == [1]
        assert isinstance(logs.log, JetStreamLog)
        _reader_of(reading)._drop()  # whoever is slow, cut off, stopped
        for number in range(2, 6):
            await logs.other.append(frame(number))
        await logs.log.trim(trim_to(3))
        with pytest.raises(LogTrimmed, match="trimmed up to 3, 2 is wanted"):
            await asyncio.wait_for(anext(reading), 10)

    async def test_a_purge_by_somebody_else_is_told_from_a_trim(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow, "_CHECK_S", 0.1)
        for number in range(1, 6):
            await logs.log.append(frame(number))
        reading = logs.log.follow(0)
        assert (await anext(reading))[0].seq == 1
        waiting = asyncio.create_task(_rest_of(reading))
        await logs.log.trim(trim_to(2))
        await logs.purge(before=5)
        with pytest.raises(LogGone, match="was purged: it begins at 5, 3 is wanted") as told:
            await asyncio.wait_for(waiting, 10)
        assert not isinstance(told.value, LogTrimmed)

    async def test_a_trim_outlives_the_server(self, logs: Logs, nats_server: NatsServer, bus: Bus) -> None:
        await logs.log.append(frame(1, ELECTED))
        for number in range(2, 50):
            await logs.log.append(frame(number))
        await logs.log.trim(trim_to(40))
        await nats_server.restart()
        await bus.wait_connected(20)
        identity = await logs.other.identity()
        assert (identity.first_seq, identity.last_seq, identity.trim) == (41, 49, trim_to(40))
        assert await logs.other.append(frame(50), fence=Fence(ELECTED, 1)) == Done(50)

    async def test_a_trim_that_was_cut_off_is_finished_by_the_next(
        self, logs: Logs, bus: Bus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number, subject in enumerate((ELECTED, SUBMITTED, ASSIGNED, SUBMITTED, ASSIGNED), 1):
            await logs.log.append(frame(number, subject))
        purge, calls = trim._purge, 0

        async def cut_off(*arguments: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise Disconnected("cut off")
            return await purge(*arguments)

        monkeypatch.setattr(trim, "_purge", cut_off)
        with pytest.raises(Disconnected):
            await logs.log.trim(trim_to(4))
        assert (await logs.other.identity()).first_seq == 5
        with pytest.raises(LogTrimmed):
            await anext(logs.other.follow(0))
        monkeypatch.undo()
        assert calls == 3
        assert await logs.log.trim(trim_to(4)) == 2
        assert [await logs.other.read(seq) for seq in (2, 3, 4)] == [None] * 3

    async def test_a_record_of_trimming_that_cannot_be_read_is_told(self, logs: Logs, bus: Bus) -> None:
        config = log_config(NAMESPACE, replicas=1, bytes_max=-1) | {"metadata": {"af-trim": "{}"}}
        await bus.js_api(f"STREAM.UPDATE.{STREAM}", msgspec.json.encode(config), 5)
        with pytest.raises(StreamMismatch, match=r"record of trimming in metadata 'af-trim', found '\{\}'"):
            await logs.log.identity()

    async def test_a_write_into_a_log_that_was_made_anew_is_told(self, logs: Logs) -> None:
        for number in range(1, 4):
            await logs.log.append(frame(number))
        await logs.recreate()
        with pytest.raises(LogGone, match="went back: it ends at 1, 3 was seen"):
            await logs.log.append(frame(4))
        with pytest.raises(LogGone, match="went back: it ends at 1, 3 was seen"):
            await logs.log.append(frame(5))
        with pytest.raises(LogGone, match=r"deleted and created again.*restore it from a backup"):
            await logs.other.identity()

    async def test_more_replicas_than_servers_are_refused(
        self, bus: Bus, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jetstream, "_OPEN_TIMEOUT_S", 0.5)
        with pytest.raises(
            StreamMismatch, match=r"cannot have 3 replicas .*run 3 nats-servers in one cluster"
        ):
            await JetStreamLog(bus, NAMESPACE, replicas=3).__aenter__()
        async with JetStreamLog(bus, NAMESPACE):
            with pytest.raises(
                StreamMismatch, match=r"num_replicas: expected 3 or more, found 1 .*stream edit"
            ):
                await JetStreamLog(bus, NAMESPACE, replicas=3).__aenter__()

    async def test_what_may_not_be_published_is_denied_at_once(self) -> None:
        users = """authorization { users: [
            { user: admin, password: admin },
            { user: reader, password: reader,
              permissions: { publish: { deny: "af.>" }, subscribe: ">" } } ] }"""
        async with NatsServer(extra=users) as server:
            host = server.url.removeprefix("nats://")
            async with (
                Bus(f"nats://admin:admin@{host}", name="admin") as admin,
                Bus(f"nats://reader:reader@{host}", name="reader") as reader,
                JetStreamLog(admin, NAMESPACE),
                JetStreamLog(reader, NAMESPACE) as log,
            ):
                assert refusal(await log.append(frame(1))) is Reason.DENIED

    async def test_a_large_batch_is_stored(self, logs: Logs) -> None:
        part = b"x" * 500_000
        frames = [Frame(SUBMITTED, part, f"part.{n}") for n in range(40)]
        assert await logs.log.append_batch(frames) == Done(40)

    async def test_followers_leave_no_consumer_behind(self, logs: Logs, bus: Bus) -> None:
        await logs.log.append(frame(1))
        assert await logs.log.find("nobody", after=0) is None

        async def none_left() -> bool:
            info = msgspec.json.decode(await bus.js_api(f"STREAM.INFO.{STREAM}", b"", 5))
            return bool(info["state"]["consumer_count"] == 0)

        await eventually(none_left)
