"""Projectors as processes: killed again and again, told to end, cut off, beside masters that start from their files."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from agentflow import Client
from agentflow.bus import Bus
from agentflow.domain.snapshot import state_hash
from agentflow.ending import end_tasks
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.stream import stream_names
from agentflow_nodes.cli.errors import Exit
from agentflow_projections.database import Database
from agentflow_projections.hydrate import StateFile, history_path
from agentflow_projections.projector import Projector
from tests.app import add
from tests.cluster import Cluster, audit
from tests.eventually import eventually
from tests.rows import rows_in
from tests.servers import NatsServer
from tests.unit.dump import dump

KILLS: Final = int(os.environ.get("AGENTFLOW_PROJECTOR_KILLS", "4"))
"""`just projector-kills` sets it to 100."""
_KEEP: Final = ("--keep-events", "300")
"""So often that many a kill comes while the state is written."""

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def load(cluster: Cluster) -> AsyncGenerator[None]:
    """Tasks that come and go all the time."""
    await cluster.leader()
    await cluster.worker(slots=8)
    client = await cluster.client()

    async def submit() -> None:
        while True:
            handles = await client.submit_many(add, [(number, 1) for number in range(60)])
            await handles[-1]

    submitting = asyncio.create_task(submit())
    try:
        yield
    finally:
        await end_tasks(submitting)


async def project(url: str, path: Path) -> tuple[str, int]:
    """Bring a file up to the log's end; the state's hash, and where the file was before."""
    async with Bus(url, name="test") as bus, JetStreamLog(bus, "default") as log:
        with Database(path, "default") as database:
            projector = Projector(log, database, StateFile(path, "default"))
            try:
                await projector.open()
                begun = projector.seq
                await projector.run(until=(await log.identity()).last_seq)
            finally:
                await projector.close()
            return state_hash(projector.state), begun


async def last_seq(bus: Bus) -> int:
    async with JetStreamLog(bus, "default") as log:
        return (await log.identity()).last_seq


@pytest.mark.timeout(120 + 10 * KILLS)
async def test_killed_again_and_again_under_load_it_loses_and_doubles_nothing(
    cluster: Cluster, bus: Bus, tmp_path: Path
) -> None:
    chance = random.Random(KILLS)
    path = history_path(tmp_path / "killed", "default")
    begun: list[int] = []
    async with load(cluster):
        for _ in range(KILLS):
            projector = await cluster.process("projector", "--data", str(path.parent), *_KEEP)
            more = await last_seq(bus) + chance.randrange(400)
            await eventually(partial(_reached, bus, more))
            await projector.kill()
            begun.append(_checkpoint(path))
    found, _ = await project(cluster.url, path)
    fresh, _ = await project(cluster.url, tmp_path / "fresh.duckdb")
    assert found == fresh
    assert rows_in(path, "default") == rows_in(tmp_path / "fresh.duckdb", "default")
    assert begun == sorted(begun), "what was committed stayed"
    assert begun[-1] > 0
    assert not path.with_name(f"{path.name}.damaged").exists(), "no kill cost the file"


async def _reached(bus: Bus, seq: int) -> bool:
    return await last_seq(bus) >= seq


def _checkpoint(path: Path) -> int:
    """How far a file is; 0 if it was not made yet."""
    if not path.exists():
        return 0
    with Database(path, "default") as database:
        checkpoint = database.checkpoint()
    return checkpoint.seq if checkpoint is not None else 0


async def test_told_to_end_it_leaves_everything_it_read(cluster: Cluster, bus: Bus, tmp_path: Path) -> None:
    async with load(cluster):
        projector = await cluster.process("projector", "--data", str(tmp_path), "--keep-events", "1")
        target = await last_seq(bus) + 300
        await eventually(lambda: _kept_seq(tmp_path) >= target)
        projector.send(signal.SIGTERM)
        assert await projector.ended() == Exit.OK
    path = history_path(tmp_path, "default")
    assert not path.with_name(f"{path.name}.wal").exists()
    kept = StateFile(path, "default").read()
    assert kept is not None
    assert kept.seq == _checkpoint(path) > 0


async def test_it_waits_for_its_log_and_for_its_server(
    nats_server: NatsServer, cluster: Cluster, bus: Bus, tmp_path: Path
) -> None:
    await cluster.process("projector", "--data", str(tmp_path), "--keep-events", "1")
    await cluster.leader()
    client = await cluster.client()
    await eventually(lambda: _kept_seq(tmp_path) > 0)
    await nats_server.kill()
    await nats_server.start()
    await client.submit_many(add, [(number, 1) for number in range(50)])
    target = await last_seq(bus)
    await eventually(lambda: _kept_seq(tmp_path) >= target)


def _kept_seq(folder: Path) -> int:
    kept = StateFile(history_path(folder, "default"), "default").read()
    return 0 if kept is None else kept.seq


async def test_a_log_that_is_another_ends_it_with_the_status_for_that(
    cluster: Cluster, tmp_path: Path
) -> None:
    await cluster.leader()
    await project(cluster.url, history_path(tmp_path, "default"))
    async with NatsServer() as another:
        async with Bus(another.url, name="test") as elsewhere, JetStreamLog(elsewhere, "default"):
            pass
        status, said = await _run_projector(another.url, tmp_path)
    assert status == Exit.LOG_GONE
    assert "the file follows AF_default" in said["error"]
    assert "move the DuckDB file away" in said["error"]


async def test_a_log_that_was_deleted_is_not_made_again(cluster: Cluster, bus: Bus, tmp_path: Path) -> None:
    await cluster.leader()
    await project(cluster.url, history_path(tmp_path, "default"))
    async with NatsServer() as another:
        status, said = await _run_projector(another.url, tmp_path)
        async with Bus(another.url, name="test") as elsewhere:
            assert await stream_names(elsewhere, 5) == []
    assert status == Exit.LOG_GONE
    assert "there is no stream AF_default" in said["error"]


async def _run_projector(url: str, folder: Path) -> tuple[int, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentflow_nodes", "projector", "--nats", url, "--data", str(folder), "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    said: dict[str, Any] = json.loads(stderr.splitlines()[-1])
    return process.returncode, said


async def test_a_master_that_starts_beside_it_reads_the_tail_only(
    cluster: Cluster, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with load(cluster):
        projector = await cluster.process("projector", "--data", str(tmp_path), *_KEEP)
        target = await last_seq(bus) + 100
        await eventually(lambda: _kept_seq(tmp_path) >= target)
        read_after: list[int] = []
        monkeypatch.setattr(JetStreamLog, "follow", _noting(read_after))
        begun = await cluster.master(name="begun", data=tmp_path)
        monkeypatch.undo()
        assert projector.running, "it has the DuckDB file to itself"
    assert min(read_after) >= target
    client, state = await cluster.client(), begun.seats["default"].follower.state

    async def same() -> bool:
        audited = (await audit(client)).state
        return state.seq == audited.seq and dump(state) == dump(audited)

    await eventually(same)


def _noting(read_after: list[int]) -> Any:
    follow = JetStreamLog.follow

    def noting(log: JetStreamLog, after: int, *, subjects: Any = ()) -> Any:
        read_after.append(after)
        return follow(log, after, subjects=subjects)

    return noting


async def test_up_keeps_the_history_and_starts_its_master_from_there(tmp_path: Path) -> None:
    for count in (1, 2):
        async with _up(tmp_path) as url:
            async with Client(url) as client:
                assert await (await client.shell("echo done")) == "done"
            await eventually(partial(_follows, tmp_path, count))
    log = (tmp_path / "log" / "master.log").read_text()
    assert log.count("no state was kept") == 1
    assert log.count("begun with a kept state") == 1
    with Database(history_path(tmp_path / "history", "default"), "default") as database:
        states = database.ask("SELECT state, count(*) FROM tasks GROUP BY ALL").fetchall()
        left = database.ask("SELECT count(*) FROM master_changes WHERE change = 'left'").fetchall()
    assert states == [("completed", 2)]
    assert left == [(2,)], "the master's last word is in it"


def _follows(folder: Path, count: int) -> bool:
    """Whether the master of the so many-th start keeps the history itself."""
    return (folder / "log" / "master.log").read_text().count('"event": "keeping the history"') == count


@asynccontextmanager
async def _up(folder: Path) -> AsyncGenerator[str]:
    """`agentflow up` in a folder; its address. Left, it has ended in good order."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agentflow_nodes", "up", "--data-dir", str(folder), "--port", "0", "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield json.loads(line)["url"]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == Exit.OK
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
