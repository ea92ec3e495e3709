"""What was archived is what was in the log, and a log that was trimmed has lost nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from agentflow import wire
from agentflow.domain.fold import fold
from agentflow.domain.snapshot import state_hash
from agentflow.domain.state import Namespace
from agentflow.errors import LogGone, LogTrimmed
from agentflow.frames import judge
from agentflow.log.memory import MemoryLog, MemoryServer, MemoryStream
from agentflow.log.port import Log, Message
from agentflow.objects import MemoryObjectStore
from agentflow_projections.archive import MANIFEST, STATE, Archive, ArchiveDamaged, verify
from agentflow_projections.archive_load import load
from agentflow_projections.archive_store import UNFINISHED, ArchiveLocked
from agentflow_projections.archive_writer import archived_schema
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.archiver import (
    Archiver,
    Keep,
    Sealing,
)
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Database
from agentflow_projections.hydrate import StateFile
from agentflow_projections.projector import Projector
from agentflow_projections.trimmed import fetch_snapshot
from tests.unit.given import NAMESPACE
from tests.unit.histories import History

EVERYTHING_OLD = Keep(age_s=0, young_s=0)
DAY_NS = 86_400 * 1_000_000_000


class World:
    """A log in memory with a random history in it, an object store, and a folder for the archive."""

    def __init__(self, folder: Path, messages: Sequence[Message], where: str = "") -> None:
        self.folder = folder
        self.where = where or str(folder)
        self.messages = list(messages)
        self.server = MemoryServer()
        self.stream = self.server.create(NAMESPACE)
        self.objects = MemoryObjectStore()
        self.clock = messages[-1].time_ns / 1e9 + 1

    @property
    def log(self) -> MemoryLog:
        log = MemoryLog(self.server, NAMESPACE)
        log._created_ns = self.stream.created_ns
        return log

    @property
    def archive(self) -> Archive:
        return Archive(self.where, NAMESPACE)

    def store(self, count: int) -> None:
        """Let the log hold the first `count` messages."""
        put(self.stream, self.messages[self.stream.last_seq : count])

    def archiver(self, **options: Any) -> Archiver:
        sealing = options.pop("sealing", Sealing(events=20, state_every_s=0))
        return Archiver(
            self.log, self.archive, self.objects, clock=lambda: self.clock, sealing=sealing, **options
        )

    async def run(self, **options: Any) -> None:
        """One archiver, until all that is in the log is sealed."""
        async with self.archiver(**options) as archiver:
            await archiver.run(until=self.stream.last_seq)


def put(stream: MemoryStream, messages: Sequence[Message]) -> None:
    for message in messages:
        stream.messages.append(message)
        stream.last_seq = message.seq
        stream.bytes += len(message.data)
        stream._last_by_subject[message.subject] = message.seq
    stream.wake()


def history(seed: int, count: int) -> list[Message]:
    found = History(seed).run(2 * count)[:count]
    return [Message(each.seq, each.time_ns, each.subject, each.data, each.headers) for each in found]


def fold_of(messages: Sequence[Message], state: Namespace | None = None) -> Namespace:
    state = state or Namespace(NAMESPACE)
    for message in messages:
        fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))
        state.ended.clear()
    return state


def chain_of(messages: Sequence[Message]) -> bytes:
    chain = START
    for message in messages:
        chain = chained(chain, message)
    return chain


async def read_all(log: Log, after: int, until: int, subjects: Sequence[str] = ()) -> list[Message]:
    found: list[Message] = []
    reading: Any = log.follow(after, subjects=subjects)
    async with aclosing(reading):
        async for messages in reading:
            found += messages
            if found[-1].seq >= until:
                return found
    return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "archive", history(7, 200))
    made.store(len(made.messages))
    return made


async def test_the_archive_holds_the_log_byte_by_byte(world: World) -> None:
    await world.run()
    stretches = world.archive.stretches()
    assert len(stretches) > 3
    assert [each for some in world.archive.messages() for each in some] == world.messages
    assert stretches[-1].chain == chain_of(world.messages)
    assert sum(each.manifest.messages for each in stretches) == len(world.messages)
    for stretch in stretches:
        verify(stretch)


async def test_messages_are_read_from_a_place_to_a_place(world: World) -> None:
    await world.run()
    found = [each for some in world.archive.messages(after=33, until=77) for each in some]
    assert found == world.messages[33:77]


async def test_stretches_end_with_the_day(tmp_path: Path) -> None:
    messages = history(3, 60)
    later = [
        Message(m.seq, m.time_ns + DAY_NS * (m.seq > 30), m.subject, m.data, m.headers) for m in messages
    ]
    world = World(tmp_path, later)
    world.store(len(later))
    await world.run(sealing=Sealing())
    found = [(each.day, each.manifest.first_seq) for each in world.archive.stretches()]
    assert [first for _, first in found] == [1, 31]
    assert found[0][0] < found[1][0]


async def test_the_next_archiver_goes_on_where_the_last_one_ended(world: World) -> None:
    for count in range(10, 201, 10):
        fresh = World(world.folder, world.messages)
        fresh.store(count)
        await fresh.run(sealing=Sealing(state_every_s=0 if count % 30 else 1e9))
    assert [each for some in world.archive.messages() for each in some] == world.messages[:200]
    async with world.archiver() as archiver:
        assert state_hash(archiver.state) == state_hash(fold_of(world.messages[:200]))


@pytest.mark.parametrize("point", ["write", "verify", "seal", "state", "snapshot", "trim"])
async def test_interrupted_at_any_point_nothing_is_lost(world: World, point: str) -> None:
    class Interrupted(BaseException):
        """Not an error anybody handles."""

    for stop_at in (1, 3):
        seen = 0

        def interrupt(reached: str, stop_at: int = stop_at) -> None:
            nonlocal seen
            seen += reached == point
            if seen == stop_at:
                raise Interrupted

        fresh = World(world.folder / f"{stop_at}", world.messages)
        fresh.store(120)
        try:
            await fresh.run(keep=EVERYTHING_OLD, point=interrupt)
        except Interrupted:
            async with ArchivedLog(fresh.log, fresh.folder) as whole:
                assert await read_all(whole, 0, 120) == world.messages[:120]
        fresh.store(200)
        await fresh.run(keep=EVERYTHING_OLD)
        assert [each for some in fresh.archive.messages() for each in some] == world.messages[:200]
        assert not list(fresh.folder.rglob(f"*{UNFINISHED}"))
        assert (await fresh.log.identity()).first_seq == 201
        if stop_at == 1:
            assert seen >= 1, "the point was never reached"


async def test_after_a_trim_archive_and_log_are_one(world: World) -> None:
    world.store(150)
    world.stream.truncate(150)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    identity = await world.log.identity()
    assert identity.first_seq == 151
    with pytest.raises(LogTrimmed):
        await read_all(world.log, 0, 200)
    async with ArchivedLog(world.log, world.folder) as whole:
        assert await read_all(whole, 0, 200) == world.messages[:200]
        assert await read_all(whole, 140, 200) == world.messages[140:200]
        assert (await whole.identity()).first_seq == 1
        assert await whole.read(10) == world.messages[9]
        assert await whole.read(190) == world.messages[189]
        subject = wire.event(NAMESPACE, "task.submitted", "*")
        submitted = [each for each in world.messages[:200] if ".task.submitted." in each.subject]
        assert await read_all(whole, 0, submitted[-1].seq, [subject]) == submitted
        last = await whole.last(world.messages[20].subject)
        assert (
            last == [each for each in world.messages[:200] if each.subject == world.messages[20].subject][-1]
        )


async def test_a_fold_from_the_snapshot_comes_to_the_same(world: World) -> None:
    world.stream.truncate(150)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    state, chain = await fetch_snapshot(world.log, world.objects)
    assert (state.seq, chain) == (150, chain_of(world.messages[:150]))
    tail = await read_all(world.log, state.seq, 200)
    assert state_hash(fold_of(tail, state)) == state_hash(fold_of(world.messages[:200]))


async def test_an_old_snapshot_gives_way_to_the_next(world: World) -> None:
    world.stream.truncate(100)
    await world.run(keep=EVERYTHING_OLD)
    before = (await world.log.identity()).trim
    world.store(200)
    await world.run(keep=EVERYTHING_OLD)
    after = (await world.log.identity()).trim
    assert before is not None
    assert after is not None
    assert (before.seq, after.seq) == (100, 200)
    stands_in = {after.snapshot.name, *(each.messages.name for each in after.kept)}
    assert set(world.objects._objects) == stands_in


async def test_what_is_young_stays(world: World) -> None:
    middle = world.messages[99].time_ns / 1e9
    await world.run(keep=Keep(age_s=world.clock - middle, young_s=0))
    identity = await world.log.identity()
    kept = [each for each in world.archive.stretches() if each.last_seq > identity.trimmed_seq]
    assert 0 < identity.trimmed_seq <= 100
    assert kept[0].manifest.last_ns / 1e9 > middle


async def test_so_much_goes_that_the_rest_is_as_small_as_asked(world: World) -> None:
    whole = world.stream.bytes
    await world.run(keep=Keep(bytes=whole // 2, young_s=0))
    assert whole // 4 < world.stream.bytes <= whole // 2
    trimmed = (await world.log.identity()).trimmed_seq
    await world.run(keep=Keep(bytes=whole // 2, young_s=0))
    assert (await world.log.identity()).trimmed_seq == trimmed


async def test_nothing_young_goes_for_size(world: World) -> None:
    await world.run(keep=Keep(bytes=0, young_s=1e9))
    assert (await world.log.identity()).trim is None


async def test_an_archive_begun_after_a_trim_goes_on_from_the_snapshot(world: World) -> None:
    world.stream.truncate(150)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    shutil.rmtree(world.folder)
    await world.run()
    (first, *_), last = world.archive.stretches(), world.archive.stretches()[-1]
    assert first.manifest.first_seq == 151
    assert last.chain == chain_of(world.messages[:200])
    async with world.archiver() as archiver:
        assert state_hash(archiver.state) == state_hash(fold_of(world.messages[:200]))


async def test_an_archive_that_misses_what_another_one_trimmed_says_so(world: World, tmp_path: Path) -> None:
    world.stream.truncate(100)
    other = World(tmp_path / "other", world.messages)
    other.server, other.stream = world.server, world.stream
    await other.run()
    world.store(200)
    await world.run(keep=EVERYTHING_OLD)
    with pytest.raises(LogTrimmed, match="trimmed up to 200 by another archive"):
        await other.run()


async def test_another_log_is_not_archived_into_the_same_folder(world: World, tmp_path: Path) -> None:
    world.stream.truncate(100)
    await world.run()
    for stranger in (history(8, 200), history(8, 40)):
        other = World(world.folder, stranger)
        other.store(min(200, len(stranger)))
        with pytest.raises(LogGone, match="another log"):
            await other.run()


async def test_one_archiver_works_in_a_folder(world: World) -> None:
    async with world.archiver():
        with pytest.raises(ArchiveLocked, match="one is enough"):
            await world.run()
    await world.run()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "gap"])
async def test_damage_is_found_before_anything_is_trimmed(world: World, damage: str) -> None:
    await world.run()
    victim = world.archive.stretches()[1]
    frames = world.folder / NAMESPACE / victim.name("frames")
    data = bytearray(frames.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        frames.write_bytes(data)
    elif damage == "cut":
        frames.write_bytes(data[:-10])
    elif damage == "remove":
        frames.unlink()
    elif damage == "manifest":
        (frames.parent / MANIFEST).write_text("{}")
    else:
        shutil.rmtree(frames.parent)
    with pytest.raises(ArchiveDamaged, match="archive"):
        await world.run(keep=EVERYTHING_OLD)
    assert (await world.log.identity()).first_seq == 1


async def test_a_kept_state_that_is_damaged_is_folded_anew(world: World) -> None:
    await world.run()
    for place in world.archive.states():
        (world.folder / NAMESPACE / place / STATE).write_bytes(b"nonsense")
    async with world.archiver() as archiver:
        assert state_hash(archiver.state) == state_hash(fold_of(world.messages))


async def test_only_the_latest_states_are_kept(world: World) -> None:
    await world.run()
    assert world.archive.states() == {each.place for each in world.archive.stretches()[-2:]}


def rows_of(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    names = [name for (name,) in database.ask("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()]
    return {name: list(database.ask(f'FROM "{name}"').fetchall()) for name in names if name != "checkpoint"}


async def project(log: Log, path: Path, until: int) -> Namespace:
    with Database(path, NAMESPACE) as database:
        projector = Projector(log, database)
        await projector.open()
        await projector.run(until=until)
        await projector.close()
        return projector.state


async def test_a_history_is_loaded_from_the_archive_without_folding(world: World, tmp_path: Path) -> None:
    await project(world.log, tmp_path / "folded.duckdb", 200)
    await world.run()
    kept = StateFile(tmp_path / "loaded.duckdb", NAMESPACE)
    with Database(tmp_path / "loaded.duckdb", NAMESPACE) as loaded:
        assert load(world.archive, loaded, await world.log.identity(), kept) == 200
        with Database(tmp_path / "folded.duckdb", NAMESPACE) as folded:
            assert rows_of(loaded) == rows_of(folded)
    found = kept.read()
    assert found is not None
    assert (found.seq, found.chain) == (200, chain_of(world.messages[:200]))


async def test_whoever_archived_the_rows_are_the_same(world: World, tmp_path: Path) -> None:
    await project(world.log, tmp_path / "folded.duckdb", 200)
    for count in range(10, 201, 10):
        fresh = World(world.folder, world.messages)
        fresh.store(count)
        await fresh.run(sealing=Sealing(state_every_s=0 if count % 30 else 1e9))
    with Database(None, NAMESPACE) as loaded, Database(tmp_path / "folded.duckdb", NAMESPACE) as folded:
        assert load(world.archive, loaded, await world.log.identity()) == 200
        assert rows_of(loaded) == rows_of(folded)


async def test_what_was_loaded_goes_on_with_the_live_log(world: World, tmp_path: Path) -> None:
    world.stream.truncate(120)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    path = tmp_path / "loaded.duckdb"
    with Database(path, NAMESPACE) as loaded:
        assert load(world.archive, loaded, await world.log.identity()) == 120
    state = await project(world.log, path, 200)
    assert state_hash(state) == state_hash(fold_of(world.messages[:200]))
    async with ArchivedLog(world.log, world.folder) as whole:
        await project(whole, tmp_path / "folded.duckdb", 200)
    with Database(path, NAMESPACE) as loaded, Database(tmp_path / "folded.duckdb", NAMESPACE) as folded:
        assert rows_of(loaded) == rows_of(folded)


async def test_tables_of_another_release_are_not_loaded(world: World, tmp_path: Path) -> None:
    await world.run()
    first, second, *_ = world.archive.stretches()
    for stretch in (second, first):
        manifest = world.folder / NAMESPACE / stretch.place / MANIFEST
        text = manifest.read_text()
        manifest.write_text(text.replace(f'"schema": {archived_schema()}', '"schema": 1'))
        with Database(None, NAMESPACE) as database:
            expected = first.last_seq if stretch is second else 0
            assert load(world.archive, database, await world.log.identity()) == expected
            assert len(list(database.messages(after=0))) == expected
