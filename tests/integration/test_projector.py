"""The projector on a log: wherever it was stopped, the file comes to hold the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow.domain import state as domain_state
from agentflow.domain.snapshot import state_hash
from agentflow.domain.state import Namespace
from agentflow.ending import end_tasks
from agentflow.errors import LogGone
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Identity, Log, Message
from agentflow_projections import file_writer
from agentflow_projections.database import Database
from agentflow_projections.hydrate import Prepared, StateFile, history_path, hydrate
from agentflow_projections.projector import Projector
from tests.eventually import eventually
from tests.rows import Rows, rows_in
from tests.unit.given import NAMESPACE, fold_all
from tests.unit.histories import History

SEEDS = st.integers(0, 2**32)


class World:
    """A log in memory with a history in it, and a folder."""

    def __init__(self, folder: Path, seed: int = 1, steps: int = 150) -> None:
        self.history = History(seed).run(steps)
        self.path = history_path(folder, NAMESPACE)
        self.server = MemoryServer()
        self.stream = self.server.create(NAMESPACE)
        self.later: list[Message] = [
            Message(each.seq, each.time_ns, each.subject, each.data, each.headers) for each in self.history
        ]
        self.seqs = [each.seq for each in self.later]

    def store(self, count: int | None = None) -> int:
        """Let the next messages of the history arrive; the last one's sequence."""
        count = len(self.later) if count is None else count
        for message in self.later[:count]:
            self.stream.messages.append(message)
            self.stream.last_seq = message.seq
        del self.later[:count]
        self.stream.wake()
        return self.stream.last_seq

    async def project(self, *, until: int | None = None, kept: bool = True) -> tuple[str, int]:
        """Bring the file up to the log's end; the state's hash, and where it was taken up."""
        async with MemoryLog(self.server, NAMESPACE) as log:
            return await self._project(log, until, kept=kept)

    async def _project(self, log: Log, until: int | None, *, kept: bool) -> tuple[str, int]:
        with Database(self.path, NAMESPACE) as database:
            projector = Projector(log, database, StateFile(self.path, NAMESPACE) if kept else None, pace_s=0)
            try:
                await projector.open()
                begun = projector.seq
                await projector.run(until=self.stream.last_seq if until is None else until)
            finally:
                await projector.close()
            return state_hash(projector.state), begun

    async def identity(self) -> Identity:
        async with MemoryLog(self.server, NAMESPACE) as log:
            return await log.identity()


def rows_of(path: Path) -> Rows:
    return rows_in(path, NAMESPACE)


async def expected_rows(world: World, folder: Path) -> Rows:
    """What a projection made in one go holds."""
    path, world.path = world.path, folder / "fresh.duckdb"
    try:
        await world.project(kept=False)
    finally:
        world.path, fresh = path, world.path
    return rows_of(fresh)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@with_random(seed=SEEDS, cuts=st.lists(st.integers(0, 100), min_size=1, max_size=5))
@settings(max_examples=6, deadline=None)
async def test_stopped_and_started_anywhere_it_writes_the_same(
    seed: int, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    world = World(folder, seed, 60)
    for count in cuts:
        await world.project(until=world.store(count))
    world.store()
    found, _ = await world.project()
    assert found == state_hash(fold_all(world.history))
    assert rows_of(world.path) == await expected_rows(world, folder)


async def test_it_writes_what_arrives_while_it_runs(world: World, tmp_path: Path) -> None:
    told: list[int] = []
    async with MemoryLog(world.server, NAMESPACE) as log:
        with Database(world.path, NAMESPACE) as database:
            projector = Projector(log, database, pace_s=0)
            await projector.open()
            running = asyncio.create_task(projector.run(until=world.seqs[-1], progress=told.append))
            while world.later:
                world.store(7)
                await asyncio.sleep(0)
            await running
            await projector.close()
    assert told == sorted(set(told))
    assert told[-1] == world.seqs[-1]
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


@pytest.mark.parametrize(("limit", "most"), [("BATCH_ROWS_MAX", 3), ("BATCH_BYTES_MAX", 300)])
async def test_a_pile_too_large_is_written_in_parts(
    limit: str, most: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = World(tmp_path)
    expected.store()
    world.store()
    monkeypatch.setattr(file_writer, limit, most)
    await world.project()
    assert rows_of(world.path) == await expected_rows(expected, tmp_path)


async def test_closed_while_it_takes_up_a_long_file_it_is_closed_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.store(60)
    await world.project(kept=False)
    reading = threading.Event()

    def without_end(_: Database, *, after: int) -> Iterator[Message]:
        while True:
            reading.set()
            yield world.stream.messages[0]

    monkeypatch.setattr(Database, "messages", without_end)
    async with MemoryLog(world.server, NAMESPACE) as log:
        with Database(world.path, NAMESPACE) as database:
            projector = Projector(log, database)
            opening = asyncio.create_task(projector.open())
            await eventually(reading.is_set)
            await end_tasks(opening)
            await projector.close()


class HeldUp(StateFile):
    """Takes the state down once it may."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, NAMESPACE)
        self.begun, self.may = threading.Event(), threading.Event()

    def prepare(self, state: Namespace, identity: tuple[str, int], chain: bytes) -> Prepared:
        self.begun.set()
        assert self.may.wait(30)
        return super().prepare(state, identity, chain)


async def test_cancelled_between_taking_rows_and_writing_them_it_loses_none(
    world: World, tmp_path: Path
) -> None:
    kept = HeldUp(world.path)
    world.store(60)
    async with MemoryLog(world.server, NAMESPACE) as log:
        with Database(world.path, NAMESPACE) as database:
            projector = Projector(log, database, kept, pace_s=0, keep_events=1)
            await projector.open()
            running = asyncio.create_task(projector.run())
            await eventually(kept.begun.is_set)
            await end_tasks(running)
            kept.may.set()
            await projector.close()
    kept_state = StateFile(world.path, NAMESPACE).read()
    assert kept_state is not None
    assert kept_state.seq == len(rows_of(world.path)["frames"]) > 0
    world.store()
    await world.project()
    assert rows_of(world.path) == await expected_rows(world, tmp_path)


class TestKeptState:
    """What is kept beside the file, for who starts next."""

    async def test_a_start_reads_only_what_came_after_it(self, world: World) -> None:
        half = world.store(60)
        await world.project()
        world.store()
        kept = hydrate(world.path.parent, await world.identity(), NAMESPACE)
        assert kept is not None
        state = kept.state
        assert state.seq == half
        found = fold_all([each for each in world.history if each.seq > half], state)
        assert state_hash(found) == state_hash(fold_all(world.history))

    @with_random(seed=SEEDS, every=st.integers(1, 9))
    @settings(max_examples=15, deadline=None)
    def test_ids_of_what_ended_are_appended_generation_by_generation(
        self, seed: int, every: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(domain_state, "CLOSED_IDS_MAX", 5)
            path = tmp_path_factory.mktemp("ids") / "it.duckdb"
            file, state = StateFile(path, NAMESPACE), Namespace(NAMESPACE)
            for number, message in enumerate(History(seed).run(60)):
                fold_all([message], state)
                if number % every == 0:
                    file.write(file.prepare(state, ("AF", 1), b"chain"))
                    found = StateFile(path, NAMESPACE).read()
                    assert found is not None
                    assert state_hash(found.state) == state_hash(state)
            assert len(list(path.parent.glob("it.ids-*"))) == 2

    async def test_one_that_was_not_written_whole_leaves_the_one_before(self, world: World) -> None:
        half = world.store(60)
        await world.project()
        file = StateFile(world.path, NAMESPACE)
        file.prepare(fold_all(world.history), ("other", 1), b"")
        for ids in world.path.parent.glob("*.ids-*"):
            ids.write_bytes(ids.read_bytes() + b"begun, never finished")
        kept = hydrate(world.path.parent, await world.identity(), NAMESPACE)
        assert kept is not None
        state = kept.state
        assert state.seq == half

    @pytest.mark.parametrize("name", ["snapshot", "ids-2"])
    @pytest.mark.parametrize("damage", ["gone", "flipped", "cut"])
    async def test_damaged_it_is_not_used(self, world: World, name: str, damage: str, tmp_path: Path) -> None:
        world.store(110)
        await world.project()
        path = world.path.with_suffix(f".{name}")
        data = path.read_bytes()
        middle = len(data) // 2
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[:middle])
        else:
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        assert hydrate(world.path.parent, await world.identity(), NAMESPACE) is None
        world.store()
        found, _ = await world.project()
        assert found == state_hash(fold_all(world.history))
        assert rows_of(world.path) == await expected_rows(world, tmp_path)

    async def test_of_another_log_it_is_not_used(self, world: World) -> None:
        world.store()
        await world.project()
        world.server.delete(NAMESPACE)
        world.stream = world.server.create(NAMESPACE)
        assert hydrate(world.path.parent, await world.identity(), NAMESPACE) is None

    async def test_of_a_level_not_known_it_is_not_used(self, tmp_path: Path) -> None:
        world = World(tmp_path, seed=3, steps=200)
        world.store()
        await world.project()
        assert fold_all(world.history).level == 2
        assert hydrate(tmp_path, await world.identity(), NAMESPACE, level=1) is None


class TestAnotherLog:
    """The log is no longer the one the file was made of: that is for people to decide."""

    async def test_made_anew(self, world: World) -> None:
        world.store()
        await world.project()
        world.server.delete(NAMESPACE)
        world.stream = world.server.create(NAMESPACE)
        with pytest.raises(LogGone, match=r"the file follows .* move the DuckDB file away"):
            await world.project()

    async def test_gone_backwards(self, world: World) -> None:
        world.store()
        await world.project()
        world.stream.truncate(5)
        with pytest.raises(LogGone, match="the log ends at 5"):
            await world.project()

    async def test_cut_off_where_the_file_does_not_reach(self, world: World) -> None:
        world.store(20)
        await world.project()
        world.store()
        world.stream.purge(40)
        with pytest.raises(LogGone, match=r"the history reaches up to .*begins at 40"):
            await world.project()

    async def test_a_log_without_its_beginning_makes_no_history(self, world: World) -> None:
        world.store()
        world.stream.purge(40)
        with pytest.raises(LogGone, match="the history reaches up to 0"):
            await world.project()
