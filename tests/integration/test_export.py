"""An incident as a file: who reads it comes to the same as who reads the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentflow.domain.snapshot import state_hash
from agentflow.errors import InvalidRequest, OperatingError
from agentflow_projections.export import ExportedPast, as_database, export
from agentflow_projections.past import Until
from agentflow_projections.replay import replay
from agentflow_projections.why import why
from tests.integration.test_projection import require_same
from tests.unit.given import Logged, fold_all
from tests.unit.histories import History
from tests.unit.told import Told, messages_of

SEED = 3


def logged() -> list[Logged]:
    return History(SEED).run(200)


async def exported(messages: list[Logged], path: Path, begin: Until, until: Until = Until()) -> ExportedPast:  # noqa: B008 - it is frozen
    await export(Told(messages), path, begin=begin, until=until)
    return ExportedPast.read(path)


@pytest.mark.parametrize(("begin", "end"), [(1, 50), (17, 100), (80, 81)])
async def test_a_file_holds_the_stretch_and_the_state_before_it(begin: int, end: int, tmp_path: Path) -> None:
    messages = logged()
    past = await exported(messages, tmp_path / "x.parquet", Until(seq=begin), Until(seq=end))
    assert (past.extent.basis, past.last_seq) == (begin - 1, end)
    assert state_hash(past.begin()) == state_hash(fold_all(messages[: begin - 1]))
    found = [message async for batch in past.messages(begin - 1) for message in batch]
    assert found == messages_of(messages[begin - 1 : end])


async def test_a_replay_of_the_file_comes_to_the_state_of_the_log(tmp_path: Path) -> None:
    messages = logged()
    past = await exported(messages, tmp_path / "x.parquet", Until(seq=60))
    assert (await replay(past)).hash == state_hash(fold_all(messages))
    assert (await replay(past, until=Until(seq=90))).hash == state_hash(fold_all(messages[:90]))


async def test_without_a_beginning_it_is_the_whole_log(tmp_path: Path) -> None:
    past = await exported(logged(), tmp_path / "x.parquet", Until())
    assert past.extent.basis == 0


async def test_a_stretch_can_be_named_by_time(tmp_path: Path) -> None:
    messages = logged()
    begin_ms, end_ms = (fold_all(messages[:seq]).clock_ms for seq in (60, 120))
    past = await exported(messages, tmp_path / "x.parquet", Until(ms=begin_ms), Until(ms=end_ms))
    assert fold_all(messages[: past.extent.basis]).clock_ms < begin_ms
    assert fold_all(messages[: past.extent.basis + 1]).clock_ms >= begin_ms
    assert fold_all(messages[: past.last_seq]).clock_ms == end_ms


async def test_a_file_can_be_exported_from_a_file(tmp_path: Path) -> None:
    messages = logged()
    long = await exported(messages, tmp_path / "long.parquet", Until(seq=20))
    await export(long, tmp_path / "short.parquet", begin=Until(seq=60), until=Until(seq=90))
    short = ExportedPast.read(tmp_path / "short.parquet")
    assert (await replay(short)).hash == state_hash(fold_all(messages[:90]))


async def test_why_is_answered_from_a_file(tmp_path: Path) -> None:
    messages = logged()
    state = fold_all(messages)
    past = await exported(messages, tmp_path / "x.parquet", Until(seq=100))
    for task in list(state.tasks)[:5]:
        from_log, from_file = await why(Told(messages), task), await why(past, task)
        assert from_file.waiting == from_log.waiting
        assert from_file.moments == [each for each in from_log.moments if each.seq >= 100]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.7])
async def test_in_sql_it_answers_like_the_history_of_the_whole_log(
    seed: int, share: float, tmp_path: Path
) -> None:
    messages = History(seed).run(120)
    begin = int(share * len(messages))
    await exported(messages, tmp_path / "x.parquet", Until(seq=begin))
    async with as_database(tmp_path / "x.parquet") as database:
        for end in range(begin, len(messages) + 1, 11):
            require_same(database, fold_all(messages[:end]))


async def test_nothing_in_the_stretch_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("before")
    with pytest.raises(InvalidRequest, match="nothing lies in that stretch"):
        await export(Told(logged()), path, begin=Until(seq=50), until=Until(seq=40))
    assert [each.name for each in tmp_path.iterdir()] == ["x.parquet"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("what", ["nothing", "text", "foreign", "newer"])
def test_other_files_are_told_apart(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    if what == "text":
        path.write_text("no parquet")
    if what in {"foreign", "newer"}:
        metadata: Any = {"agentflow": '{"form":99,"namespace":"x","basis":0,"last_seq":1}'}
        table = pa.table({"x": [1]})
        pq.write_table(table.replace_schema_metadata(metadata if what == "newer" else None), path)
    with pytest.raises(InvalidRequest):
        ExportedPast.read(path)


async def test_a_damaged_file_is_an_error_and_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    past = await exported(logged(), path, Until(seq=60))
    data = bytearray(path.read_bytes())
    data[100:2_000] = bytes(1_900)
    path.write_bytes(data)
    with pytest.raises(OperatingError):
        await replay(past)


async def test_what_lies_before_the_file_is_not_in_it(tmp_path: Path) -> None:
    past = await exported(logged(), tmp_path / "x.parquet", Until(seq=60))
    for asked in (replay(past, until=Until(seq=58)), why(past, "t1", until=Until(seq=58))):
        with pytest.raises(InvalidRequest, match="begins with the state at position 59"):
            await asked
    with pytest.raises(InvalidRequest, match="begins with the state at position 59"):
        await export(past, tmp_path / "y.parquet", begin=Until(seq=10))
