"""Archiving, trimming, backup and restore as an operator does them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agentflow import Needs, Workflow, wire
from agentflow.bus import Bus
from agentflow.errors import LogTrimmed
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame, Message
from agentflow_nodes.archiver.node import ArchiverConfig, ArchiverNode, archiver_of
from agentflow_nodes.cli.errors import Exit
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.node import ProjectorNode
from agentflow_projections.archive import Archive, verify
from agentflow_projections.archive_store import UNFINISHED
from agentflow_projections.archive_writer import remove_unfinished
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.archiver import Keep, Sealing
from tests.app import add, size_of, text_of, wait_for_file
from tests.cluster import Cluster
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.integration.test_backup import read_all
from tests.s3 import S3Server
from tests.servers import NatsServer, free_port

pytestmark = pytest.mark.timeout(180)

SUBMITTED = wire.event("default", "task.submitted", "cli")


class Ran:
    """What a command ended in."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def agentflow(url: str, *arguments: str, env: Mapping[str, str] | None = None) -> Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentflow_nodes", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "AGENTFLOW_NATS_URL": url, **(env or {})},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def submit(log: JetStreamLog, first: int, count: int) -> None:
    """Submissions as any client writes them, a few in each frame."""
    for start in range(first, first + count, 5):
        tasks = [{"id": f"task-{n}", "shell": "true"} for n in range(start, start + 5)]
        done = await log.append(Frame(SUBMITTED, json.dumps(tasks).encode(), f"cli.s.{start}"))
        assert isinstance(done, Done)


async def whole(log: JetStreamLog, folder: Path) -> list[Message]:
    async with ArchivedLog(log, folder) as archived:
        return await read_all(archived)


async def test_an_operator_archives_and_trims(nats_server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    folder = str(tmp_path / "archive")
    async with JetStreamLog(bus, "default") as log:
        await submit(log, 0, 500)
        messages = await read_all(log)
        ran = await agentflow(
            nats_server.url, "archive", "--once", "--dir", folder, "--keep-age", "1d", "--json"
        )
        assert (ran.status, ran.json["archived_seq"], ran.json["trimmed_seq"]) == (0, 100, 0), ran.err
        assert [each["events"] for each in ran.json["sealed"]] == [500]
        assert await whole(log, tmp_path / "archive") == messages
    ran = await agentflow("nats://127.0.0.1:1", "archive", "--verify", "--dir", folder)
    assert "Messages 1 to 100 are sound" in ran.out
    ran = await agentflow(nats_server.url, "archive", "--once", "--dir", folder)
    assert "Nothing new to archive" in ran.out
    frames = next((tmp_path / "archive").rglob("frames.parquet"))
    frames.write_bytes(frames.read_bytes()[:-1])
    ran = await agentflow(nats_server.url, "archive", "--verify", "--dir", folder, "--json")
    assert ran.status == Exit.OPERATING
    assert "frames.parquet: expected" in json.loads(ran.err)["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep-age", "7 parsecs"], "--keep-age: expected an age like 90s, 15m, 12h, 7d or 2w"),
        (["--keep-bytes", "much"], "--keep-bytes: expected a size like 500MB or 10GiB, found 'much'"),
        (["--verify"], "--dir: expected an archive of namespace 'default', found none"),
    ],
)
async def test_what_is_not_understood_is_told(arguments: list[str], said: str, tmp_path: Path) -> None:
    ran = await agentflow("nats://127.0.0.1:1", "archive", "--dir", str(tmp_path / "none"), *arguments)
    assert ran.status == Exit.USAGE
    assert said in ran.err


async def _until_more_is_sealed(archive: Archive) -> None:
    sealed = len(archive.stretches())
    await eventually(lambda: len(archive.stretches()) > sealed)


async def test_an_archiver_that_is_killed_again_and_again_loses_nothing(
    nats_server: NatsServer, bus: Bus, place: str
) -> None:
    archive = Archive(place, "default")
    arguments = ("archive", "--dir", place, "--seal-after", "0.05s")
    chance = random.Random(1)
    async with Cluster(nats_server) as cluster, JetStreamLog(bus, "default") as log:
        for round_ in range(3):
            await submit(log, round_ * 1_000, 200)
            archiver = await cluster.process(*arguments)
            await submit(log, round_ * 1_000 + 200, 200)
            await _until_more_is_sealed(archive)
            await submit(log, round_ * 1_000 + 400, chance.randrange(5, 100, 5))
            await archiver.kill()
        ran = await agentflow(nats_server.url, *arguments, "--once", "--keep-age", "0s", "--json")
        assert ran.status == 0, ran.err
        messages = await read_all(log)
        assert [each for some in archive.messages() for each in some] == messages
        for stretch in archive.stretches():
            verify(stretch)
        ran = await agentflow(nats_server.url, "replay", "--archive", place, "--json")
        assert (ran.status, ran.json["first_seq"]) == (0, 1), ran.err
    ran = await agentflow("nats://127.0.0.1:1", "archive", "--verify", "--dir", place, "--json")
    assert (ran.status, ran.json["last_seq"]) == (0, messages[-1].seq), ran.err
    await asyncio.to_thread(remove_unfinished, archive)
    places = {each.place for each in archive.stretches()}
    assert set(archive.places()) >= places
    assert not [name for name in archive.store.names() if name.endswith(UNFINISHED)]


async def test_a_store_that_is_away_is_waited_for(
    nats_server: NatsServer,
    bus: Bus,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = f"s3://{s3.bucket}/away"
    monkeypatch.setattr("agentflow_nodes.archiver.node._AGAIN_S", 0.1)

    async def until_said() -> None:
        caplog.clear()
        await eventually(lambda: "archiving is tried again" in caplog.text)

    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    archive = Archive(where, "default")
    async with FaultProxy(s3.port) as proxy, JetStreamLog(bus, "default") as log:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.refuse()
        await submit(log, 0, 100)
        ran = await agentflow(nats_server.url, "archive", "--once", "--dir", where)
        assert (ran.status, "cannot be reached" in ran.err) == (Exit.OPERATING, True), ran.err
        config = ArchiverConfig(where=where, url=nats_server.url, sealing=Sealing(after_s=0.05))
        node = ArchiverNode(config)
        entering = asyncio.create_task(node.__aenter__())
        await until_said()
        proxy.heal()
        await asyncio.wait_for(entering, 30)
        await eventually(lambda: [each.last_seq for each in archive.stretches()][-1:] == [20])
        proxy.refuse()
        await submit(log, 100, 100)
        await until_said()
        proxy.heal()
        await eventually(lambda: archive.stretches()[-1].last_seq == 40)
        await node.__aexit__(None, None, None)


async def test_everything_on_one_machine_archives_too(s3: S3Server, tmp_path: Path) -> None:
    port, where = free_port(), f"s3://{s3.bucket}/up"
    options = ("--archive", where, "--seal-after", "0.1s", "--keep-age", "1d")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentflow_nodes", "up", "--json", "--port", str(port), "--data-dir", str(tmp_path / "data")),
        *options,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **s3.environment()},
    )
    try:
        assert process.stdout is not None
        assert json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["ready"] is True
        url = f"nats://127.0.0.1:{port}"
        ran = await agentflow(url, "submit", "--shell", "echo done", "--wait")
        assert ran.status == 0, ran.err
        verifying = ("archive", "--verify", "--dir", where)

        async def archived() -> bool:
            return (await agentflow(url, *verifying, env=s3.environment())).status == 0

        await eventually(archived, within_s=30)
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    log_text = (tmp_path / "data" / "log" / "archiver.log").read_text()
    assert "error" not in log_text.lower(), log_text


async def test_the_daemon_trims_while_a_cluster_works(
    nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    config = ArchiverConfig(
        where=tmp_path,
        url=nats_server.url,
        keep=Keep(age_s=0.5, young_s=0.2),
        sealing=Sealing(events=50, after_s=0.1, state_every_s=0.2),
    )
    async with Cluster(nats_server) as cluster:
        master = await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        async with ArchiverNode(config), JetStreamLog(bus, "default") as log:

            async def work_until_trimmed(seq: int) -> int:
                """Tasks are done all the while the log is trimmed behind them."""
                while (trimmed := (await log.identity()).trimmed_seq) <= seq:
                    assert await (await client.submit(add, 1, 2)).result(20) == 3
                return trimmed

            first = await work_until_trimmed(0)
            assert await work_until_trimmed(first) > first
            assert master.leading
            # One that starts now begins with the snapshot, and leads when its turn comes.
            late = await cluster.master(name="late")
            await master.__aexit__(None, None, None)
            await eventually(lambda: late.leading)
            assert await (await client.submit(add, 2, 2)).result(20) == 4
            # A history begun now has what was trimmed all the same.
            projecting = ProjectorConfig(url=nats_server.url, data=tmp_path / "history", archive=tmp_path)
            async with ProjectorNode(projecting) as projector:
                projection = projector.projections["default"]
                await projection.caught_up()
                assert projection.database is not None
                query = "SELECT count(*), count(DISTINCT seq), min(seq), max(seq) FROM frames"
                ((count, *found),) = projection.database.ask(query).fetchall()
                assert found == [count, 1, count]
            messages = await whole(log, tmp_path)
            assert [each.seq for each in messages] == list(range(1, messages[-1].seq + 1))
            elections = [each for each in messages if each.subject == wire.elected("default")]
            assert await log.last(wire.elected("default")) == elections[-1]


async def test_open_work_outlives_the_messages_it_came_with(
    nats_server: NatsServer, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow.log.trim._STEP_BYTES", 1_000)  # a few messages at a time
    large = "x" * 3_000  # the fold keeps its position only
    config = ArchiverConfig(where=tmp_path, url=nats_server.url, keep=Keep(age_s=0, young_s=0))
    async with Cluster(nats_server) as cluster, JetStreamLog(bus, "default") as log:

        async def trim() -> None:
            async with archiver_of(config, bus, log) as archiver:
                await archiver.run(until=(await log.identity()).last_seq)
            identity = await log.identity()
            assert identity.first_seq == identity.trimmed_seq + 1 > 2

        await cluster.leader()
        client = await cluster.client()
        await cluster.worker(name="first")
        done = await client.submit(add, 1, 1)
        assert await done.result(20) == 2
        flow = Workflow("texts")
        text, gate = flow.add(text_of, 3_000), flow.add(wait_for_file, str(tmp_path / "gate"))
        size = flow.add(size_of, text)
        flow.after(size, gate)
        running = await client.submit_workflow(flow)
        waiting = await client.submit(size_of.options(needs=Needs(group="later")), large)
        await running.task(text.task_id).result(20)
        await trim()
        await trim()
        (tmp_path / "gate").write_text("open")
        assert await running.task(size.task_id).result(20) == 3_000
        await cluster.worker(name="later", group="later")
        assert await waiting.result(20) == 3_000
        late = await cluster.client(name="late")
        with pytest.raises(LogTrimmed, match="read it from the archive"):
            await late.task(done.id).result(20)


async def test_the_archiver_outlives_the_server(nats_server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    archive = Archive(tmp_path, "default")
    config = ArchiverConfig(
        where=tmp_path,
        url=nats_server.url,
        keep=Keep(age_s=0, young_s=0),
        sealing=Sealing(after_s=0.05, state_every_s=0.05),
    )

    async def sealed_all(log: JetStreamLog) -> bool:
        identity, stretches = await log.identity(), archive.stretches()
        return bool(stretches) and stretches[-1].last_seq == identity.last_seq == identity.trimmed_seq

    async with JetStreamLog(bus, "default") as log:
        await submit(log, 0, 100)
        async with ArchiverNode(config):
            await eventually(lambda: sealed_all(log))
            for round_ in range(1, 4):
                await nats_server.kill()
                await nats_server.start()
                await bus.wait_connected(20)
                await submit(log, round_ * 100, 100)
                await eventually(lambda: sealed_all(log), within_s=40)
        messages = [each for some in archive.messages() for each in some]
        assert [each.seq for each in messages] == list(range(1, 81))
        for stretch in archive.stretches():
            verify(stretch)


async def test_a_replay_reads_archive_and_log_as_one(
    nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    config = ArchiverConfig(where=tmp_path, url=nats_server.url, keep=Keep(age_s=0, young_s=0))
    async with JetStreamLog(bus, "default") as log:
        await submit(log, 0, 200)
        before = await agentflow(nats_server.url, "replay", "--json")
        assert before.status == 0, before.err
        async with archiver_of(config, bus, log) as archiver:
            await archiver.run(until=30)
        assert (await log.identity()).first_seq == 31
        ran = await agentflow(nats_server.url, "replay", "--json")  # begins with the snapshot
        assert (ran.json["hash"], ran.json["messages"]) == (before.json["hash"], 10)
        ran = await agentflow(nats_server.url, "replay", "--archive", str(tmp_path), "--json")
        assert ran.status == 0, ran.err
        assert (ran.json["hash"], ran.json["first_seq"]) == (before.json["hash"], 1)


async def test_a_backup_comes_back_by_command(nats_server: NatsServer, bus: Bus, tmp_path: Path) -> None:
    folder = str(tmp_path / "backup")
    async with JetStreamLog(bus, "default") as log:
        await submit(log, 0, 500)
        messages = await read_all(log)
    ran = await agentflow(nats_server.url, "backup", folder, "--json")
    assert ran.status == 0, ran.err
    assert [(each["namespace"], each["last_seq"]) for each in ran.json["namespaces"]] == [("default", 100)]
    ran = await agentflow(nats_server.url, "backup", folder)
    assert (ran.status, "holds a backup already" in ran.err) == (Exit.USAGE, True)
    ran = await agentflow(nats_server.url, "backup", str(tmp_path / "no"), "--namespace", "none")
    assert (ran.status, "no namespace 'none'" in ran.err) == (Exit.NOT_FOUND, True)
    async with NatsServer() as other, Bus(other.url, name="t") as fresh:
        ran = await agentflow(other.url, "restore", folder)
        assert "Restored: default. Start the nodes now." in ran.out
        ran = await agentflow(other.url, "restore", folder, "--json")
        assert ran.json == {"restored": [], "already": ["default"]}
        async with JetStreamLog(fresh, "default", create=False) as log:
            assert await read_all(log) == messages
            await submit(log, 500, 5)
        ran = await agentflow(other.url, "restore", folder)
        assert (ran.status, "is there already" in ran.err) == (Exit.USAGE, True)
