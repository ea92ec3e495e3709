"""A cluster that lost everything comes back equal."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.domain.snapshot import state_hash
from agentflow.errors import InvalidRequest, LogGone
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Fence, Frame, Log, Message
from agentflow.objects import ObjectStore
from agentflow_projections.archive import Archive
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.archiver import Archiver, Keep
from agentflow_projections.backup import MANIFEST, BackupDamaged, backup, namespaces_of, restore
from agentflow_projections.trimmed import fetch_snapshot
from tests import app
from tests.cluster import Cluster
from tests.integration.test_archive import fold_of
from tests.servers import NatsCluster, NatsServer
from tests.unit.given import NAMESPACE
from tests.unit.histories import History

SUBMITTED = wire.event(NAMESPACE, "task.submitted", "cli")
FRAMES = 400


async def read_all(log: Log, after: int = 0) -> list[Message]:
    last = (await log.identity()).last_seq
    found: list[Message] = []
    reading: Any = log.follow(after)
    async with aclosing(reading):
        async for messages in reading:
            found += messages
            if found[-1].seq >= last:
                return found
    raise AssertionError("a log never ends")


async def fill(log: Log) -> None:
    """A random history, and frames the compressor cannot make small."""
    for number, each in enumerate(History(3).run(120)):
        if not each.subject.startswith(SUBMITTED.partition("task.")[0]):
            continue  # what no stream of this namespace takes
        frame = Frame(each.subject, each.data, f"h.{number}", each.headers)
        assert isinstance(await log.append(frame), Done)
    noise = [
        Frame(SUBMITTED, random.Random(n).randbytes(1_000).hex().encode(), f"n.{n}") for n in range(FRAMES)
    ]
    assert isinstance(await log.append_batch(noise), Done)


async def saved(folder: Path) -> list[Message]:
    """A backup of a log on a server that is gone afterwards, and what was in the log."""
    async with NatsServer() as server, Bus(server.url, name="t") as bus, JetStreamLog(bus, NAMESPACE) as log:
        await fill(log)
        await ObjectStore(bus, NAMESPACE).put(b"kept" * 100_000)
        messages = await read_all(log)
        await backup(bus, folder, [NAMESPACE])
        return messages


async def test_a_cluster_that_lost_everything_comes_back_equal(tmp_path: Path) -> None:
    size = 400_000  # too large for the log: it lies in the object store
    async with NatsServer() as server, Cluster(server) as cluster:
        await cluster.leader()
        await cluster.worker(name="w1")
        client = await cluster.client(name="before")
        for number in range(20):
            assert await (await client.submit(app.add, number, 1)).result(20) == number + 1
        large = await client.submit(app.text_of, size)
        text = await large.result(20)
        assert len(text) == size
        async with client.lock("door", ttl_s=2) as before:
            token = before.token
        async with Bus(server.url, name="backup") as bus:
            assert await namespaces_of(bus) == ["default"]
            await backup(bus, tmp_path / "backup", ["default"])
        logged = await read_all(client.log)

    async with NatsServer() as server, Cluster(server) as cluster:
        async with Bus(server.url, name="restore") as bus:
            assert await restore(bus, tmp_path / "backup") == ["default"]
            async with JetStreamLog(bus, "default") as log:
                found = await read_all(log)
        assert found == logged[: len(found)]
        assert len(found) > 60
        await cluster.leader()
        await cluster.worker(name="w2")
        client = await cluster.client(name="after")
        assert await client.task(large.id).result(20) == text
        assert await (await client.submit(app.add, 1, 1)).result(20) == 2
        async with client.lock("door", ttl_s=2) as after:
            assert after.token > token


async def test_messages_keep_sequence_time_and_hash(tmp_path: Path) -> None:
    messages = await saved(tmp_path)
    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        await restore(bus, tmp_path)
        async with JetStreamLog(bus, NAMESPACE, create=False) as log:
            found = await read_all(log)
            assert found == messages
            assert state_hash(fold_of(found)) == state_hash(fold_of(messages))
            assert await log.append(Frame(SUBMITTED, b"next", "n.next")) == Done(messages[-1].seq + 1)


@pytest.mark.parametrize("after", [1, 3])
async def test_an_interrupted_restore_is_run_again(tmp_path: Path, after: int) -> None:
    messages = await saved(tmp_path)
    pieces = 0

    def interrupt(stream: str, sent: int, size: int) -> None:
        nonlocal pieces
        pieces += stream == wire.stream(NAMESPACE)
        if pieces == after:
            raise asyncio.CancelledError

    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        with pytest.raises(asyncio.CancelledError):
            await restore(bus, tmp_path, progress=interrupt)
        with pytest.raises(LogGone):
            await JetStreamLog(bus, NAMESPACE, create=False).__aenter__()
        assert await restore(bus, tmp_path) == [NAMESPACE]
        async with JetStreamLog(bus, NAMESPACE, create=False) as log:
            assert await read_all(log) == messages
        assert await restore(bus, tmp_path) == []


async def test_what_was_on_one_server_comes_back_on_three(tmp_path: Path) -> None:
    messages = await saved(tmp_path)
    async with NatsCluster() as cluster, Bus(cluster.urls, name="t") as bus:
        await restore(bus, tmp_path, replicas=3)
        async with JetStreamLog(bus, NAMESPACE, replicas=3, create=False) as log:
            assert (await log.identity()).replicas == 3
            assert await read_all(log) == messages
            assert await restore(bus, tmp_path, replicas=3) == []


async def test_a_server_killed_while_it_restores_begins_anew(tmp_path: Path) -> None:
    messages = await saved(tmp_path)
    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        half = asyncio.Event()
        restoring = asyncio.create_task(
            restore(bus, tmp_path, progress=lambda name, *_: half.set() if name.startswith("AF_") else None)
        )
        await half.wait()
        await server.kill()
        restoring.cancel()
        await asyncio.wait([restoring])
        await server.start()
        await bus.wait_connected(20)
        await restore(bus, tmp_path)
        async with JetStreamLog(bus, NAMESPACE, create=False) as log:
            assert await read_all(log) == messages


async def test_an_interrupted_backup_is_written_anew(tmp_path: Path) -> None:
    async with NatsServer() as server, Bus(server.url, name="t") as bus, JetStreamLog(bus, NAMESPACE) as log:
        await fill(log)

        def interrupt(*_: Any) -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await backup(bus, tmp_path, [NAMESPACE], interrupt)
        with pytest.raises(BackupDamaged, match="no whole backup"):
            await restore(bus, tmp_path)
        await backup(bus, tmp_path, [NAMESPACE])
        with pytest.raises(InvalidRequest, match="holds a backup already"):
            await backup(bus, tmp_path, [NAMESPACE])
        messages = await read_all(log)
    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        await restore(bus, tmp_path)
        async with JetStreamLog(bus, NAMESPACE, create=False) as log:
            assert await read_all(log) == messages


async def test_what_is_there_already_is_not_touched(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with NatsServer() as server, Bus(server.url, name="t") as bus, JetStreamLog(bus, NAMESPACE) as log:
        await log.append(Frame(SUBMITTED, b"mine", "n.mine"))
        with pytest.raises(InvalidRequest, match=r"is there already.*found 1 to 1.*Stop all nodes"):
            await restore(bus, tmp_path)
        assert [each.data for each in await read_all(log)] == [b"mine"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
async def test_a_damaged_backup_is_refused_before_anything_is_written(tmp_path: Path, damage: str) -> None:
    await saved(tmp_path)
    path = tmp_path / f"{wire.stream(NAMESPACE)}.snapshot"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "remove":
        path.unlink()
    else:
        (tmp_path / MANIFEST).write_text('{"form": 1}')
    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        with pytest.raises(BackupDamaged):
            await restore(bus, tmp_path)
        assert await namespaces_of(bus) == []


async def test_a_trimmed_log_comes_back_with_its_snapshot_and_its_archive(tmp_path: Path) -> None:
    elected = wire.elected(NAMESPACE)
    archive, old = Archive(tmp_path / "archive", NAMESPACE), Keep(age_s=0, young_s=0)
    async with NatsServer() as server, Bus(server.url, name="t") as bus, JetStreamLog(bus, NAMESPACE) as log:
        await fill(log)
        messages = await read_all(log)
        objects = ObjectStore(bus, NAMESPACE)
        async with Archiver(log, archive, objects, keep=old, clock=lambda: 4e9) as archiver:
            await archiver.run(until=messages[-1].seq)
        await log.append(Frame(SUBMITTED, b"after", "n.after"))
        trim = (await log.identity()).trim
        election = await log.last(elected)
        await backup(bus, tmp_path / "backup", [NAMESPACE])
    async with NatsServer() as server, Bus(server.url, name="t") as bus:
        await restore(bus, tmp_path / "backup")
        objects = ObjectStore(bus, NAMESPACE)
        async with JetStreamLog(bus, NAMESPACE, create=False) as log:
            assert (await log.identity()).trim == trim
            assert await log.last(elected) == election
            assert election is not None
            assert isinstance(
                await log.append(Frame(SUBMITTED, b"x", "n.x"), fence=Fence(elected, election.seq)), Done
            )
            state, _ = await fetch_snapshot(log, objects)
            assert state_hash(state) == state_hash(fold_of(messages))
            async with ArchivedLog(log, tmp_path / "archive") as whole:
                assert (await read_all(whole))[: len(messages)] == messages
            async with Archiver(log, archive, objects) as archiver:
                await archiver.run(until=messages[-1].seq + 2)
                assert archiver.sealed_seq == messages[-1].seq + 2


async def test_every_namespace_that_was_named_comes_back(tmp_path: Path, bus: Bus) -> None:
    for name in ("one", "two"):
        async with JetStreamLog(bus, name) as log:
            await log.append(Frame(wire.event(name, "task.submitted", "cli"), b"{}", "n.1"))
    await backup(bus, tmp_path, ["one", "two"])
    with pytest.raises(LogGone, match="no stream AF_three"):
        await backup(bus, tmp_path / "other", ["three"])
    async with NatsServer() as server, Bus(server.url, name="t") as fresh:
        assert await restore(fresh, tmp_path, ["two"]) == ["two"]
        assert await namespaces_of(fresh) == ["two"]
        with pytest.raises(InvalidRequest, match="holds one, two, not 'three'"):
            await restore(fresh, tmp_path, ["three"])
