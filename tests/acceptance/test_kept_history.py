"""Histories that masters keep themselves: the same rows as a projector's, whatever becomes of the process or the file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from agentflow import LogGone, wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow.frames import decode_any, encode
from agentflow_nodes.cli.errors import Exit
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.history import History
from agentflow_nodes.master.node import Master
from agentflow_projections import file_writer
from agentflow_projections.database import Database, DatabaseFull
from agentflow_projections.hydrate import StateFile, history_path
from tests.acceptance.test_projector import last_seq, load, project
from tests.app import add
from tests.cluster import Cluster
from tests.eventually import eventually
from tests.rows import rows_in

_HOLD: Final = (
    "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
)
_KEEPS: Final = '"event": "keeping the history"'
_LEAVES: Final = "left to a projector"
_KILLS: Final = 2
_KEPT: Final = ("master", "--name", "kept", "--lease-ttl-s", "1", "--history")

pytestmark = pytest.mark.timeout(120)


def history_of(master: Master) -> History:
    recording = master.seats["default"].follower.recording
    assert isinstance(recording, History)
    return recording


@asynccontextmanager
async def leading(cluster: Cluster, folder: Path, name: str = "kept") -> AsyncGenerator[Master]:
    """A master that leads and keeps its history in a folder."""
    config = MasterConfig(url=cluster.url, name=name, history=folder, lease_ttl_s=1, worker_ttl_s=2.0)
    async with Master(config) as master:
        await eventually(lambda: master.leading)
        yield master


async def work(cluster: Cluster, count: int = 200) -> None:
    """Some tasks, from the first to the last."""
    client = await cluster.client()
    for handle in await client.submit_many(add, [(number, 1) for number in range(count)]):
        await handle


async def require_whole(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    """Nobody has the file now, and brought up to the log's end it holds what one made anew does."""
    path = history_path(folder, "default")
    found, _ = await project(cluster.url, path)
    fresh, _ = await project(cluster.url, tmp_path / "fresh.duckdb")
    assert found == fresh
    assert rows_in(path, "default") == rows_in(tmp_path / "fresh.duckdb", "default")


async def answers(bus: Bus, seq: int) -> bool:
    """Whether the history can be asked about, up to a sequence or more."""
    try:
        answer = await bus.request(wire.service("default", wire.QUERY_SERVICE), encode({"at_least": seq}), 5)
    except Disconnected:
        return False
    return "position" in decode_any(answer)


async def test_it_holds_what_a_projector_would_have_written(
    cluster: Cluster, bus: Bus, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    async with leading(cluster, folder) as master:
        await cluster.worker()
        await work(cluster)
        seq = await last_seq(bus)
        await eventually(partial(answers, bus, seq))
        assert history_of(master).writer is not None, "nobody else keeps it"
    kept = StateFile(history_path(folder, "default"), "default").read()
    assert kept is not None
    assert kept.seq >= seq
    await require_whole(cluster, folder, tmp_path)


async def test_killed_again_and_again_under_load_it_goes_on_where_the_file_ends(
    cluster: Cluster, bus: Bus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(_KILLS)
    folder = tmp_path / "killed"
    async with load(cluster):
        for _ in range(_KILLS):
            master = await cluster.process(*_KEPT, str(folder))
            more = await last_seq(bus) + 20 + chance.randrange(100)
            await eventually(partial(_reached, bus, more))
            await master.kill()
        last = await cluster.process(*_KEPT, str(folder))
        last.send(signal.SIGTERM)
        assert await last.ended() == Exit.OK
    said = capfd.readouterr().err
    assert said.count(_KEEPS) == _KILLS + 1
    assert _LEAVES not in said
    await require_whole(cluster, folder, tmp_path)


async def _reached(bus: Bus, seq: int) -> bool:
    return await last_seq(bus) >= seq


class TestWhenTheFileIsNotInOrder:
    """The master leads on, and a projector beside it sees to the history."""

    async def test_removed_under_it(self, cluster: Cluster, bus: Bus, tmp_path: Path) -> None:
        async with self._led_on(cluster, bus, tmp_path / "kept"):
            history_path(tmp_path / "kept", "default").unlink()
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def test_on_a_disk_that_is_full(
        self, cluster: Cluster, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise DatabaseFull("no room")

        async with self._led_on(cluster, bus, tmp_path / "kept"):
            monkeypatch.setattr(Database, "commit", refuse)
        monkeypatch.undo()
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def test_on_a_disk_that_is_too_slow(
        self, cluster: Cluster, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with self._led_on(cluster, bus, tmp_path / "kept"):
            monkeypatch.setattr(file_writer, "BATCH_BYTES_MAX", 1)
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def test_a_standby_that_waits_for_a_disk_that_is_full_follows_on(
        self, cluster: Cluster, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await cluster.leader(name="first")
        await cluster.worker()
        standby = await cluster.master(name="second", history=tmp_path / "kept")
        writer = history_of(standby).writer
        assert writer is not None
        begun, may = threading.Event(), threading.Event()

        def refuse(*_: Any, **__: Any) -> None:
            begun.set()
            assert may.wait(30)
            raise DatabaseFull("no room")

        monkeypatch.setattr(Database, "commit", refuse)
        monkeypatch.setattr(file_writer, "BATCH_BYTES_MAX", 1)
        await work(cluster)
        await eventually(begun.is_set)
        await work(cluster)
        await eventually(lambda: writer.is_crowded and not writer._room.is_set())
        may.set()
        seq = await last_seq(bus)
        await eventually(lambda: standby.seats["default"].follower.state.seq >= seq)
        assert history_of(standby).writer is None
        monkeypatch.undo()

    @asynccontextmanager
    async def _led_on(self, cluster: Cluster, bus: Bus, folder: Path) -> AsyncGenerator[None]:
        """Something is done to the file while a master keeps it."""
        async with leading(cluster, folder) as master:
            await cluster.worker()
            await work(cluster, 20)
            epoch = master.seats["default"].follower.state.epoch
            yield
            await work(cluster)
            history = history_of(master)
            await eventually(lambda: history.writer is None)
            seq = await last_seq(bus)
            await eventually(partial(answers, bus, seq))
            assert master.leading
            assert master.seats["default"].follower.state.epoch == epoch

    async def test_deleted_before_it_starts(
        self, cluster: Cluster, bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = await self._kept_before(cluster, tmp_path / "kept")
        path.unlink()
        async with leading(cluster, tmp_path / "kept", "second"):
            assert _LEAVES in caplog.text
            await work(cluster, 20)
            seq = await last_seq(bus)
            await eventually(partial(answers, bus, seq))
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def test_with_other_frames_than_the_log_has(
        self, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = await self._kept_before(cluster, tmp_path / "kept")
        StateFile(path, "default").forget()
        with Database(path, "default") as database, database.transaction():
            database._execute("UPDATE checkpoint SET chain = 'another'::BLOB")
        async with leading(cluster, tmp_path / "kept", "second"):
            await eventually(lambda: "does not hold what the log holds" in caplog.text)
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def test_held_by_another_process(
        self, cluster: Cluster, bus: Bus, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = await self._kept_before(cluster, tmp_path / "kept")
        with subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            async with leading(cluster, tmp_path / "kept", "second"):
                assert "DatabaseLocked" in caplog.text
                await work(cluster, 20)
                holder.communicate()
                seq = await last_seq(bus)
                await eventually(partial(answers, bus, seq))
        await require_whole(cluster, tmp_path / "kept", tmp_path)

    async def _kept_before(self, cluster: Cluster, folder: Path) -> Path:
        """A file that a master kept, and closed in good order."""
        async with leading(cluster, folder):
            await cluster.worker()
            await work(cluster, 20)
        return history_path(folder, "default")


async def test_the_file_of_another_log_halts_it_before_it_does_anything(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with leading(cluster, tmp_path):
        await cluster.worker()
        await work(cluster, 20)
    path = history_path(tmp_path, "default")
    with Database(path, "default") as database, database.transaction():
        database._execute("UPDATE checkpoint SET created_ns = created_ns + 1")
    before = rows_in(path, "default")
    with pytest.raises(LogGone, match="move the DuckDB file away"):
        await cluster.master(history=tmp_path, name="second")
    assert rows_in(path, "default") == before
