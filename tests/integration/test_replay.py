"""Replay: what is made anew from the log is the same, and what is not the same is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from agentflow.domain.snapshot import state_hash
from agentflow.errors import InvalidRequest, OperatingError
from agentflow_projections.database import Database
from agentflow_projections.past import LoggedPast, Past, Until
from agentflow_projections.query import Question, Reader
from agentflow_projections.replay import Verified, project, replay, verify
from tests.unit.given import NAMESPACE, fold_all
from tests.unit.histories import History
from tests.unit.told import Told, trimmed_log

SEED = 3


@pytest.fixture(scope="module")
def told() -> Told:
    return Told(History(SEED).run(300), batch=50)


@pytest.fixture
async def projected(told: Told, tmp_path: Path) -> Path:
    """A projection of all of it."""
    path = tmp_path / "history.duckdb"
    with Database(path, NAMESPACE) as database:
        await project(told, database)
    return path


async def compared(told: Past, path: Path, until: Until = Until()) -> Verified:  # noqa: B008 - it is frozen
    with Reader(path) as reader:

        async def ask(query: str, parameters: Any) -> list[Any]:
            with reader.ask(Question(query, parameters)) as answer:
                return [row for batch in answer.rows() for row in batch]

        return await verify(told, ask, until=until)


def change(path: Path, statement: str) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute(statement)


def tables_of(path: Path) -> Iterator[str]:
    with duckdb.connect(str(path), read_only=True) as connection:
        for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
            yield name


async def test_a_replay_comes_to_the_state_of_the_fold(told: Told) -> None:
    replayed = await replay(told)
    state = fold_all(History(SEED).run(300))
    assert (replayed.hash, replayed.seq) == (state_hash(state), state.seq)
    assert replayed.messages == state.seq
    assert replayed.verdicts["rejected"] == state.rejected
    assert replayed.state["open tasks"] == len(state.tasks)


@pytest.mark.parametrize("end", [1, 17, 100])
async def test_up_to_a_position_and_up_to_a_time(told: Told, end: int) -> None:
    messages = History(SEED).run(300)
    state = fold_all(messages[:end])
    assert (await replay(told, until=Until(seq=end))).hash == state_hash(state)
    by_time = await replay(told, until=Until(ms=state.clock_ms))
    assert by_time.seq >= end
    assert by_time.time_ms == state.clock_ms


async def test_a_projection_of_the_same_log_is_the_same(told: Told, projected: Path) -> None:
    verified = await compared(told, projected)
    assert (verified.same, verified.differs_at, verified.chain) == (True, None, True)
    assert verified.seq == told.last_seq
    assert set(verified.tables) <= set(tables_of(projected))


async def test_every_table_is_compared(told: Told, projected: Path) -> None:
    compared_tables = set((await compared(told, projected)).tables)
    assert compared_tables == set(tables_of(projected)) - {"checkpoint"}


@pytest.mark.parametrize(
    ("table", "position", "change_of"),
    [
        ("task_changes", "pos >> 13", "state = 'failed'"),
        ("frames", "seq", "actor = 'somebody'"),
        ("task_submissions", "pos >> 13", "runs = 'something else'"),
        ("worker_joins", "worker", "slots = slots + 1"),
    ],
)
async def test_one_altered_row_is_found_where_it_is(
    told: Told, projected: Path, table: str, position: str, change_of: str
) -> None:
    with duckdb.connect(str(projected)) as connection:
        found = connection.execute(
            f"SELECT {position}, rowid FROM {table} ORDER BY 1 DESC LIMIT 1 OFFSET 1"  # noqa: S608 - our own
        ).fetchone()
        assert found is not None
        connection.execute(f"UPDATE {table} SET {change_of} WHERE rowid = {found[1]}")  # noqa: S608 - our own
    verified = await compared(told, projected)
    assert not verified.same
    assert ([each.table for each in verified.differences], verified.differs_at) == ([table], found[0])


async def test_a_row_that_is_missing_or_twice_is_found(told: Told, projected: Path) -> None:
    change(projected, "DELETE FROM task_changes WHERE pos = (SELECT max(pos) FROM task_changes)")
    (missing,) = (await compared(told, projected)).differences
    assert missing.expected_rows > missing.found_rows
    change(projected, "INSERT INTO elections FROM elections LIMIT 1")
    verified = await compared(told, projected)
    assert [each.table for each in verified.differences] == ["elections", "task_changes"]
    assert verified.differs_at == 1


async def test_what_lies_behind_the_position_does_not_count(told: Told, projected: Path) -> None:
    change(projected, "UPDATE frames SET actor = 'somebody' WHERE seq = 50")
    assert (await compared(told, projected, Until(seq=49))).same
    assert (await compared(told, projected, Until(seq=50))).differs_at == 50


async def test_a_projection_of_another_log_shows_in_the_chain(told: Told, projected: Path) -> None:
    change(projected, "UPDATE checkpoint SET chain = unhex(repeat('00', 16))")
    verified = await compared(told, projected)
    assert (verified.same, verified.chain, verified.differences) == (False, False, [])


async def test_a_projection_ahead_of_the_log_is_none_of_it(told: Told, projected: Path) -> None:
    shorter = Told(History(SEED).run(20))
    with pytest.raises(InvalidRequest, match="the log only to"):
        await compared(shorter, projected)


async def test_of_a_trimmed_log_what_follows_the_snapshot_can_be_had() -> None:
    messages = History(SEED).run(300)
    async with trimmed_log(messages, 80, snapshot_seq=100) as (log, objects):
        with pytest.raises(OperatingError, match="trimmed"):
            await replay(await LoggedPast.of(log))
        past = await LoggedPast.of(log, objects)
        replayed = await replay(past)
    assert (past.first_seq, past.known_from) == (81, 101)
    assert (replayed.first_seq, replayed.hash) == (101, state_hash(fold_all(messages)))


async def test_a_whole_projection_is_compared_with_what_is_left_of_a_trimmed_log(projected: Path) -> None:
    messages = History(SEED).run(300)
    async with trimmed_log(messages, 80, snapshot_seq=100) as (log, objects):
        past = await LoggedPast.of(log, objects)
        assert (await compared(past, projected)).same
        change(projected, "UPDATE frames SET actor = 'somebody' WHERE seq IN (90, 150)")
        assert (await compared(past, projected)).differs_at == 150
