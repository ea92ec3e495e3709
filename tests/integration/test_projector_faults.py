"""Whatever becomes of the DuckDB file: it is noticed, said and made good, and never answers wrongly."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import duckdb
import pytest

from agentflow.ending import end_tasks
from agentflow.errors import InvalidRequest, LogGone, LogTrimmed
from agentflow.log.memory import MemoryLog
from agentflow.objects import MemoryObjectStore
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.projection import Projection
from agentflow_projections.archive import Archive
from agentflow_projections.archiver import Archiver, Keep, Sealing
from agentflow_projections.database import Database, DatabaseDamaged, DatabaseLocked
from tests.disks import require_root, small_disk
from tests.eventually import eventually
from tests.integration.test_projector import World, expected_rows, rows_of
from tests.unit.given import NAMESPACE

HALF = 60
_PAUSE_S = 0.01


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "histories")


@asynccontextmanager
async def following(
    world: World, archive: Path | None = None
) -> AsyncGenerator[tuple[Projection, asyncio.Task[None]]]:
    """A projection at work, as the daemon has it."""
    async with MemoryLog(world.server, NAMESPACE) as log:
        projection = Projection(
            log, ProjectorConfig(data=world.path.parent, archive=archive), pause_s=_PAUSE_S
        )
        running = asyncio.create_task(projection.run())
        try:
            yield projection, running
        finally:
            await end_tasks(running)


async def has_all(projection: Projection, world: World) -> None:
    """Wait until the file holds the log."""
    await eventually(
        lambda: projection.projector is not None and projection.projector.seq == world.stream.last_seq
    )


async def require_made_good(world: World, tmp_path: Path) -> None:
    """The rest of the log arrives, and the file comes to hold all of it."""
    world.store()
    async with following(world) as (projection, _):
        await has_all(projection, world)
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


def _overwrite(path: Path, start: float, end: float, byte: bytes) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * start))
        file.write(byte * (int(size * end) - int(size * start)))


def _execute(path: Path, statement: str) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute(statement)


def _another_database(path: Path) -> None:
    path.unlink()
    _execute(path, "CREATE TABLE mine (i INTEGER)")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "not a valid DuckDB"),
    "cut to its header": (lambda path: os.truncate(path, 4096), "Could not read"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "Could not read"),
    "zeroed": (lambda path: _overwrite(path, 0, 1, b"\0"), "not a valid DuckDB"),
    "without a head": (lambda path: _overwrite(path, 0, 0.01, b"\0"), "not a valid DuckDB"),
    "overwritten inside": (lambda path: _overwrite(path, 0.3, 0.7, b"\xa5"), "checksum"),
    "a text": (lambda path: path.write_text("hello"), "not a valid DuckDB"),
    "another database": (_another_database, "none of ours"),
    "of an older schema": (
        lambda path: _execute(path, "UPDATE checkpoint SET schema_version = 1"),
        "of another release",
    ),
    "of a newer schema": (
        lambda path: _execute(path, "ALTER TABLE checkpoint RENAME COLUMN schema_version TO version"),
        "another schema",
    ),
    "without its checkpoint": (lambda path: _execute(path, "DELETE FROM checkpoint"), "0 checkpoints"),
    "with a frame changed": (
        lambda path: _execute(path, "UPDATE frames SET data = 'x' WHERE seq = 5"),
        "do not lead to its checkpoint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_is_set_aside_and_made_anew(
    damage: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.store(HALF)
    await world.project(kept=damage != "with a frame changed")
    ruin, reason = DAMAGES[damage]
    ruin(world.path)
    await require_made_good(world, tmp_path)
    assert reason in caplog.text
    assert world.path.with_name(f"{world.path.name}.damaged").exists()


_BLOCK_BYTES = 1 << 18


async def test_a_byte_that_flipped_in_any_block_is_found_by_reading_all_of_them(world: World) -> None:
    world.store()
    await world.project()
    whole = world.path.read_bytes()
    for at in range(_BLOCK_BYTES // 2, len(whole), _BLOCK_BYTES):
        world.path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DatabaseDamaged), _opened(world.path) as database:
            database.check_blocks(database.cursor())


@contextmanager
def _opened(path: Path) -> Generator[Database]:
    """A file as it is: it is not made anew."""
    database = Database(path, NAMESPACE)
    database._open()
    try:
        yield database
    finally:
        database.__exit__(None, None, None)


async def test_and_then_the_file_is_made_anew(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.store(HALF)
    await world.project()
    damaged, size = world.path.read_bytes(), world.path.stat().st_size
    at = size - _BLOCK_BYTES // 2
    world.path.write_bytes(damaged[:at] + bytes([damaged[at] ^ 1]) + damaged[at + 1 :])
    with _opened(world.path):
        pass  # nothing is noticed so far
    world.store()
    async with following(world) as (projection, _):
        await eventually(lambda: "the history is built anew" in caplog.text)
        await has_all(projection, world)
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


async def test_a_deleted_file_is_made_anew(world: World, tmp_path: Path) -> None:
    world.store(HALF)
    await world.project()
    world.path.unlink()
    await require_made_good(world, tmp_path)


def _cut_wal(path: Path) -> None:
    wal = path.with_name(f"{path.name}.wal")
    os.truncate(wal, wal.stat().st_size // 2)


WAL_DAMAGES: dict[str, Callable[[Path], object]] = {
    "whole": lambda path: path,
    "deleted": lambda path: path.with_name(f"{path.name}.wal").unlink(),
    "cut": _cut_wal,
    "zeroed inside": lambda path: _overwrite(path.with_name(f"{path.name}.wal"), 0.4, 0.6, b"\0"),
    "overwritten": lambda path: _overwrite(path.with_name(f"{path.name}.wal"), 0, 1, b"\xa5"),
}


@pytest.mark.parametrize("damage", WAL_DAMAGES)
async def test_a_write_ahead_log_that_is_damaged_loses_nothing(
    damage: str, world: World, tmp_path: Path
) -> None:
    """As after kill -9: the file is copied while it is open."""
    await world.project(until=world.store(10))
    world.store(HALF)
    async with following(world) as (projection, _):
        await has_all(projection, world)
        shutil.copytree(world.path.parent, tmp_path / "killed")
    shutil.rmtree(world.path.parent)
    (tmp_path / "killed").rename(world.path.parent)
    assert world.path.with_name(f"{world.path.name}.wal").stat().st_size > 0
    WAL_DAMAGES[damage](world.path)
    await require_made_good(world, tmp_path)


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_removed_while_it_is_open_is_made_anew(
    replaced: bool, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.store(HALF)
    async with following(world) as (projection, _):
        await has_all(projection, world)
        world.path.unlink()
        if replaced:
            (tmp_path / "another").write_text("hello")
            (tmp_path / "another").rename(world.path)
        world.store()
        await has_all(projection, world)
    assert "was removed or replaced" in caplog.text
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


_HOLD = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


async def test_a_file_that_another_process_has_open_is_waited_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.store(HALF)
    await world.project()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(world.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DatabaseLocked, match=rf"another process .* \(PID {holder.pid}\)"):
            await world.project()
        world.store()
        async with following(world) as (projection, _):
            await eventually(lambda: "DatabaseLocked" in caplog.text)
            holder.communicate()
            await has_all(projection, world)
    finally:
        holder.kill()
        holder.wait()
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


async def test_a_full_disk_is_waited_out(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_root()
    with small_disk(world.path.parent, 8) as disk:
        world.store(10)
        await world.project()
        ballast = disk / "ballast"
        world.store(HALF)
        async with following(world) as (projection, _):
            await has_all(projection, world)
            _fill(ballast)
            world.store()
            await eventually(lambda: "DatabaseFull" in caplog.text)
            assert projection.projector is None or projection.projector.seq < world.stream.last_seq
            ballast.unlink()
            await has_all(projection, world)
        assert not world.path.with_name(f"{world.path.name}.damaged").exists()
        assert rows_of(world.path) == await expected_rows(world, tmp_path)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


async def test_a_file_of_another_namespace_is_left_alone(world: World) -> None:
    world.store(HALF)
    await world.project()
    before = world.path.read_bytes()
    with (
        pytest.raises(InvalidRequest, match="is of namespace 'test', expected 'other'"),
        Database(world.path, "other"),
    ):
        pass
    assert world.path.read_bytes() == before


async def test_a_log_that_is_another_ends_the_projection(world: World) -> None:
    world.store(HALF)
    await world.project()
    before = rows_of(world.path)
    world.stream.truncate(5)
    async with following(world) as (_, running):
        with pytest.raises(LogGone, match="the log ends at 5"):
            await asyncio.wait_for(running, 20)
    assert rows_of(world.path) == before


@pytest.mark.parametrize("loaded", [True, False])
async def test_of_a_log_that_was_trimmed_it_is_made_from_the_archive(
    loaded: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.store()
    await world.project()
    expected = await expected_rows(world, tmp_path)
    archive = await _archive_and_trim(world, tmp_path / "archive")
    if not loaded:  # it was sealed by a release with other tables
        monkeypatch.setattr("agentflow_projections.archive_load.archived_schema", lambda: "other")
    world.path.write_text("damaged")
    async with following(world, archive) as (projection, _):
        await has_all(projection, world)
    found = rows_of(world.path)
    assert {name: sorted(rows, key=repr) for name, rows in found.items()} == {
        name: sorted(rows, key=repr) for name, rows in expected.items()
    }


async def _archive_and_trim(world: World, folder: Path) -> Path:
    clock = world.stream.messages[-1].time_ns / 1e9 + 1
    async with MemoryLog(world.server, NAMESPACE) as log:
        archiver = Archiver(
            log,
            Archive(folder, NAMESPACE),
            MemoryObjectStore(),
            clock=lambda: clock,
            keep=Keep(age_s=0, young_s=0),
            sealing=Sealing(events=20, state_every_s=0),
        )
        async with archiver:
            await archiver.run(until=world.stream.last_seq)
            await archiver.trim()
        assert (await log.identity()).trimmed_seq > HALF
    return folder


async def test_without_the_archive_it_says_what_is_missing(world: World, tmp_path: Path) -> None:
    world.store()
    await _archive_and_trim(world, tmp_path / "archive")
    async with following(world) as (_, running):
        with pytest.raises(LogTrimmed, match="read it from the archive"):
            await asyncio.wait_for(running, 20)


async def test_a_file_that_cannot_be_made_good_is_not_fought_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses grow: no loop of crashes, whatever is wrong."""
    world.store(HALF)
    monkeypatch.setattr(Database, "_check_schema", _broken)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    async with MemoryLog(world.server, NAMESPACE) as log:
        projection = Projection(log, ProjectorConfig(data=world.path.parent), sleep=sleep)
        running = asyncio.create_task(projection.run())
        await eventually(lambda: len(pauses) >= 9)
        assert not running.done()
        await end_tasks(running)
    assert pauses[:9] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def _broken(_: Database) -> None:
    raise DatabaseDamaged("bad disk")
