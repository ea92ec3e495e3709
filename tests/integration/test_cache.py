"""A history of one's own: of a trimmed log it begins with the snapshot, or with the archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentflow.errors import InvalidRequest
from agentflow.events import WorkflowSubmitted, WorkflowTask
from agentflow_nodes.cli.history import _FileHistory
from agentflow_projections.cache import Refreshed, refresh
from agentflow_projections.query import Question, Reader
from tests.integration.test_archive import EVERYTHING_OLD, World, history
from tests.unit.given import elected, fold_all, given, says, submitted
from tests.unit.histories import History
from tests.unit.told import messages_of, trimmed_log

OPEN = "SELECT id, state FROM tasks WHERE state IN ('pending', 'ready', 'running') ORDER BY ALL"

KNOWN = "id, runs_kind, runs, client, priority, max_attempts, timeout_s, cpu, memory_mb, gpus, labels, state, workflow"


def asked(kept: Refreshed, sql: str) -> list[Any]:
    with Reader(kept.path) as reader, reader.ask(Question(sql)) as answer:
        return [row for batch in answer.rows() for row in batch]


def open_tasks(messages: Any) -> list[list[str]]:
    tasks = fold_all(messages).tasks.values()
    return sorted([task.id, str(task.state)] for task in tasks if not (task.node and task.node.end_seq))


async def test_of_a_trimmed_log_it_begins_with_the_snapshot_and_goes_on(tmp_path: Path) -> None:
    messages = History(5).run(300)
    async with trimmed_log(messages, 60, snapshot_seq=80) as (log, objects):
        kept = await refresh(log, objects, tmp_path)
        assert kept.known_from == 81
        assert asked(kept, OPEN) == open_tasks(messages)
        assert asked(kept, "SELECT first_seq, seq FROM checkpoint") == [[81, len(messages)]]
        assert await refresh(log, objects, tmp_path) == kept
        with Reader(kept.path) as reader:
            ours = _FileHistory(reader)
            assert await ours.position("80") == 80
            with pytest.raises(InvalidRequest, match="begins with position 81"):
                await ours.position("79")


async def test_what_the_snapshot_knows_of_a_task_is_what_was_submitted(tmp_path: Path) -> None:
    open_ones = "FROM tasks WHERE state IN ('pending', 'ready', 'running') ORDER BY id"
    sql = f"SELECT {KNOWN} {open_ones}"
    told = History(11)
    told.run(300)
    told.scene.given(submitted("p", argv=["count", 1, "a b"]), submitted("s", shell="make\n", timeout_s=5.0))
    messages = told.scene.messages
    async with trimmed_log(messages, len(messages)) as (log, objects):
        kept = await refresh(log, objects, tmp_path / "late")
    whole = World(tmp_path / "archive", messages_of(messages))
    whole.store(len(messages))
    expected = asked(await refresh(whole.log, whole.objects, tmp_path / "whole"), sql)
    assert {row[1] for row in expected} == {"function", "argv", "shell"}
    assert asked(kept, sql) == expected


async def test_names_are_read_where_the_submission_is_still_in_the_log(tmp_path: Path) -> None:
    work = [WorkflowTask(task_id="a", shell="make", title="Make")]
    flow = WorkflowSubmitted(id="f", name="Release", description="All", tasks=work)
    scene = given(elected(), submitted("gone", title="Old"), submitted("t", title="New"), says(flow))
    async with trimmed_log(scene.messages, 2, snapshot_seq=4) as (log, objects):
        kept = await refresh(log, objects, tmp_path)
    at = "TIMESTAMP_MS '2023-11-14 22:13:20'"
    assert asked(kept, f"SELECT id, title, submitted_at = {at} FROM tasks ORDER BY id") == [  # noqa: S608 - our own
        ["f/a", "Make", True],
        ["gone", None, True],
        ["t", "New", True],
    ]
    assert asked(kept, "SELECT id, name, description FROM workflows") == [["f", "Release", "All"]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "archive", history(7, 200))
    made.store(len(made.messages))
    return made


async def test_a_file_that_is_far_enough_goes_on_after_a_trim(world: World, tmp_path: Path) -> None:
    world.stream.truncate(150)
    before = await refresh(world.log, world.objects, tmp_path / "cache")
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    after = await refresh(world.log, world.objects, tmp_path / "cache")
    assert after == before == Refreshed(before.path, 1)
    assert asked(after, "SELECT count(*), max(seq) FROM frames") == [[200, 200]]


async def test_a_file_that_is_behind_the_trim_is_begun_anew(world: World, tmp_path: Path) -> None:
    world.stream.truncate(100)
    await refresh(world.log, world.objects, tmp_path / "cache")
    world.store(150)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    kept = await refresh(world.log, world.objects, tmp_path / "cache")
    assert kept.known_from == 151
    assert asked(kept, "SELECT count(*), min(seq), max(seq) FROM frames") == [[50, 151, 200]]


async def test_with_the_archive_it_has_all(world: World, tmp_path: Path) -> None:
    whole = await refresh(world.log, world.objects, tmp_path / "whole")
    expected = asked(whole, "FROM task_changes ORDER BY ALL")
    world.stream.truncate(150)
    await world.run(keep=EVERYTHING_OLD)
    world.store(200)
    late = await refresh(world.log, world.objects, tmp_path / "cache")
    assert late.known_from == 151
    kept = await refresh(world.log, world.objects, tmp_path / "cache", archive=world.folder)
    assert kept.known_from == 1
    assert asked(kept, "FROM task_changes ORDER BY ALL") == expected
    assert await refresh(world.log, world.objects, tmp_path / "cache") == kept


async def test_a_state_that_is_lost_is_fetched_again(tmp_path: Path) -> None:
    messages = History(5).run(300)
    async with trimmed_log(messages, 80) as (log, objects):
        kept = await refresh(log, objects, tmp_path)
        kept.path.with_suffix(".snapshot").unlink()
        assert await refresh(log, objects, tmp_path) == kept
        assert asked(kept, OPEN) == open_tasks(messages)
