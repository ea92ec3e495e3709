"""Small stretches of a day become one, in a folder and in a bucket, and nobody who reads notices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from agentflow.domain.snapshot import state_hash
from agentflow.log.port import Message
from agentflow_projections.archive import ArchiveDamaged, verify
from agentflow_projections.archive_compact import groups, merge
from agentflow_projections.archive_load import load
from agentflow_projections.archive_store import ArchiveLocked
from agentflow_projections.archived_log import ArchivedLog
from agentflow_projections.archiver import Sealing
from agentflow_projections.database import Database
from tests.integration.test_archive import (
    DAY_NS,
    EVERYTHING_OLD,
    World,
    fold_of,
    history,
    project,
    read_all,
    rows_of,
)
from tests.unit.given import NAMESPACE

SMALL, LARGE = Sealing(events=25, state_every_s=0), Sealing(state_every_s=0)
DAYS = 3


class Interrupted(BaseException):
    """Not an error anybody handles."""


def world_in(where: str) -> World:
    """Three days of history."""
    messages = [
        Message(m.seq, m.time_ns + DAY_NS * ((m.seq - 1) * DAYS // 150), m.subject, m.data, m.headers)
        for m in history(7, 150)
    ]
    made = World(Path(where), messages, where)
    made.store(len(messages))
    return made


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An archive in a folder."""
    return world_in(str(tmp_path / "archive"))


@pytest.fixture
def anywhere(place: str) -> World:
    """An archive in a folder, and one in a bucket."""
    return world_in(place)


def archived(world: World) -> list[Message]:
    return [each for some in world.archive.messages() for each in some]


async def test_each_day_that_is_over_becomes_one(anywhere: World) -> None:
    world = anywhere
    await world.run(sealing=SMALL)
    before = world.archive.stretches()
    await world.run(sealing=LARGE)
    first, second, *rest = world.archive.stretches()
    assert [first.manifest.first_seq, second.manifest.first_seq] == [1, 51]
    assert rest == [each for each in before if each.day == before[-1].day]  # that day goes on
    assert archived(world) == world.messages
    for stretch in (first, second):
        verify(stretch)
        parts = [each.manifest for each in before if each.day == stretch.day]
        assert stretch.manifest.events == sum(each.events for each in parts)
        assert stretch.manifest.bytes == sum(each.bytes for each in parts)
    assert set(world.archive.places()) == {each.place for each in world.archive.stretches()}


async def test_a_history_is_loaded_from_it_row_by_row_the_same(world: World, tmp_path: Path) -> None:
    await project(world.log, tmp_path / "folded.duckdb", 150)
    await world.run(sealing=SMALL)
    await world.run(sealing=LARGE)
    with Database(None, NAMESPACE) as loaded, Database(tmp_path / "folded.duckdb", NAMESPACE) as folded:
        assert load(world.archive, loaded, await world.log.identity()) == 150
        assert rows_of(loaded) == rows_of(folded)


async def test_what_is_large_enough_stays(world: World) -> None:
    await world.run(sealing=SMALL)
    limit = 3 * max(each.manifest.events for each in world.archive.stretches())
    sealing = Sealing(events=limit, state_every_s=0)
    await world.run(sealing=sealing)
    once = world.archive.stretches()
    for before, after in pairwise(each for each in once if each.day < once[-1].day):
        assert before.manifest.events <= limit
        assert before.day < after.day or before.manifest.events + after.manifest.events > limit
    await world.run(sealing=sealing)
    assert world.archive.stretches() == once


@pytest.mark.parametrize("point", ["compact", "replace", "remove", "remove:3"])
async def test_killed_at_any_point_it_loses_nothing(world: World, point: str) -> None:
    await killed_at(point, world)


async def test_killed_while_it_removes_from_a_bucket_it_loses_nothing(anywhere: World) -> None:
    await killed_at("remove:2", anywhere)


async def killed_at(point: str, world: World) -> None:
    await world.run(sealing=SMALL)
    name, _, number = point.partition(":")
    reached: list[str] = []

    def interrupt(at: str) -> None:
        reached.append(at)
        if reached.count(name) == int(number or 1):
            raise Interrupted

    with pytest.raises(Interrupted):
        await world.run(sealing=LARGE, point=interrupt)
    assert archived(world) == world.messages
    async with world.archiver(sealing=LARGE) as archiver:
        assert state_hash(archiver.state) == state_hash(fold_of(world.messages))
        await archiver.run(until=150)
    assert archived(world) == world.messages
    assert [each.manifest.first_seq for each in world.archive.stretches()[:2]] == [1, 51]
    assert set(world.archive.places()) == {each.place for each in world.archive.stretches()}


async def test_who_reads_meanwhile_sees_each_message_once(world: World) -> None:
    for seen in (1, 60):
        fresh = World(world.folder, world.messages, f"{world.where}-{seen}")
        fresh.store(150)
        await fresh.run(sealing=SMALL)
        reading: Iterator[list[Message]] = fresh.archive.messages()
        found: list[Message] = []
        while len(found) < seen:
            found += next(reading)
        await fresh.run(sealing=LARGE)
        assert found + [each for some in reading for each in some] == fresh.messages


async def test_archive_and_live_log_stay_one(world: World) -> None:
    world.stream.truncate(120)
    await world.run(sealing=SMALL, keep=EVERYTHING_OLD)
    world.store(150)
    async with ArchivedLog(world.log, world.where) as whole:
        await world.run(sealing=LARGE)
        assert await read_all(whole, 0, 150) == world.messages
        assert await whole.read(60) == world.messages[59]


async def test_a_damaged_stretch_stays_as_it_is(world: World) -> None:
    await world.run(sealing=SMALL)
    before = world.archive.stretches()
    damaged = before[1]
    world.archive.store.put(damaged.name("frames"), b"nonsense")
    await world.run(sealing=LARGE)
    after = world.archive.stretches()
    first_day = [each for each in before if each.day == damaged.day]
    assert after[: len(first_day)] == first_day
    assert after[len(first_day)].manifest.first_seq == 51
    assert len([each for each in after if each.day == after[len(first_day)].day]) == 1
    with pytest.raises(ArchiveDamaged, match="frames"):
        verify(damaged)


async def test_a_second_archiver_is_noticed(anywhere: World) -> None:
    world = anywhere
    world.stream.truncate(100)
    await world.run(sealing=LARGE)
    world.store(150)
    other = World(world.folder, world.messages, world.where)
    other.server, other.stream = world.server, world.stream
    if not world.where.startswith("s3://"):
        async with world.archiver():
            with pytest.raises(ArchiveLocked, match="one is enough"):
                await other.run()
        return
    async with world.archiver(sealing=LARGE) as archiver:  # nothing keeps the other one away
        await other.run(sealing=LARGE)
        with pytest.raises(ArchiveLocked, match="has sealed up to 150: one is enough"):
            await archiver.run(until=150)
    assert archived(world) == world.messages


async def test_what_two_sealed_at_once_is_read_once(world: World) -> None:
    await world.run(sealing=SMALL)
    group = next(groups(world.archive.stretches(), events=10**6, size=10**9))

    def keep_both(at: str) -> None:
        if at == "remove":
            raise Interrupted

    with pytest.raises(Interrupted):
        merge(world.archive, group[1:], keep_both)
    sealed = world.archive.sealed()
    assert len(sealed) > len(world.archive.stretches())
    assert archived(world) == world.messages
