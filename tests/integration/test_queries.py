"""Questions to a history's file: what they may be, as of when, and what the ready-made ones answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agentflow.domain.state import Namespace
from agentflow.errors import InvalidRequest
from agentflow.log.port import Message
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.queries import named, ready_made
from agentflow_projections.query import Answer, Question, Reader, Row
from agentflow_projections.rows import Recorder
from tests.golden.record import read_log
from tests.unit.given import NAMESPACE, Logged, fold_all
from tests.unit.histories import History

OPEN = ("pending", "ready", "running")
ABOUT = {"task": {"task": "flow/b"}, "workflow": {"workflow": "flow"}}


def written(path: Path, found: Sequence[Logged]) -> Path:
    """A history's file made of these messages."""
    messages = [Message(each.seq, each.time_ns, each.subject, each.data, each.headers) for each in found]
    with Database(path, NAMESPACE) as database:
        recorder, chain = Recorder(Namespace(NAMESPACE)), START
        for message in messages:
            recorder.apply(message)
            chain = chained(chain, message)
        checkpoint = Checkpoint("AF_test", 1, 1, recorder.state.seq, chain)
        database.commit(recorder.take(), checkpoint, at_ms=recorder.state.clock_ms)
    return path


@pytest.fixture(scope="module")
def messages() -> Sequence[Logged]:
    return History(3).run(400)


@pytest.fixture(scope="module")
def reader(messages: Sequence[Logged], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(written(tmp_path_factory.mktemp("queries") / "history.duckdb", messages)) as opened:
        yield opened


def rows_of(answer: Answer) -> list[Row]:
    return [row for batch in answer.rows() for row in batch]


def ask(reader: Reader, sql: str, as_of: int | None = None, **parameters: Any) -> list[Row]:
    with reader.ask(Question(sql, parameters, as_of)) as answer:
        return rows_of(answer)


def report(reader: Reader, name: str, as_of: int | None = None, **told: Any) -> list[dict[str, Any]]:
    with reader.ask(named(name).question(told, as_of)) as answer:
        names = [column.name for column in answer.columns]
        return [dict(zip(names, row, strict=True)) for row in rows_of(answer)]


def test_parameters_are_bound(reader: Reader) -> None:
    assert ask(reader, "SELECT $a, $b", a="'; DROP TABLE frames; --", b=5) == [
        ["'; DROP TABLE frames; --", 5]
    ]


def test_values_are_what_json_knows(reader: Reader) -> None:
    sql = r"""SELECT TIMESTAMP '2026-01-02 03:04:05.678', 1.5, 7::HUGEINT, '\x00a'::BLOB, {'a': [1]}, MAP {'k': 1},
        INTERVAL 90 SECOND, 'nan'::DOUBLE, NULL, true, [DATE '2026-01-02'], 'ready'::task_state"""
    assert ask(reader, sql) == [
        [
            *("2026-01-02 03:04:05.678", 1.5, 7, "\\x00a", {"a": [1]}, {"k": 1}),
            *("00:01:30", "nan", None, True, ["2026-01-02"], "ready"),
        ]
    ]


def test_what_json_has_no_word_for_is_text(reader: Reader) -> None:
    assert ask(reader, "SELECT ['nan'::DOUBLE, 1]") == [["[NaN,1.0]"]]


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("", "found 0"),
        ("SELECT 1; SELECT 2", "found 2"),
        ("DROP TABLE frames", "found DROP"),
        ("INSERT INTO policies SELECT 1, 2, now(), ''", "found INSERT"),
        ("SELEC 1", "syntax error"),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT $a", "Values were not provided"),
        ("SELECT 'x'::INTEGER", "Could not convert"),
    ],
)
def test_what_is_no_question_is_refused_with_a_reason(reader: Reader, sql: str, found: str) -> None:
    with pytest.raises(InvalidRequest, match=found):
        ask(reader, sql)


def test_every_view_answers_as_of_any_position(reader: Reader, messages: Sequence[Logged]) -> None:
    for seq in range(10, len(messages), 40):
        for view in ("tasks", "attempts", "workflows", "queue", "workers", "leaders", "locks"):
            assert ask(reader, f"FROM {view} ORDER BY ALL", seq) == ask(
                reader, f"FROM {view}_at({seq}) ORDER BY ALL"
            )
        for view in ("events", "quarantine", "decisions"):
            assert ask(reader, f"FROM {view} WHERE seq > $seq", seq, seq=seq) == []
            until = f"FROM {view} WHERE seq <= $seq ORDER BY ALL"
            assert ask(reader, until, seq, seq=seq) == ask(reader, until, seq=seq)


def test_a_position_that_is_not_there_yet_is_an_error(reader: Reader) -> None:
    with pytest.raises(InvalidRequest, match="reaches to position"):
        ask(reader, "FROM tasks", reader.position + 1)


def test_a_time_is_the_last_position_before_it(reader: Reader) -> None:
    for seq, moment in ask(reader, "SELECT max(seq), logged_at::VARCHAR FROM frames GROUP BY ALL ORDER BY 1"):
        assert reader.position_at(datetime.fromisoformat(moment).replace(tzinfo=UTC)) == seq


def test_rows_go_to_a_parquet_file_with_their_types(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "tasks.parquet"
    with reader.ask(Question("FROM tasks")) as answer:
        count = answer.write_parquet(path)
    assert ask(reader, "SELECT count(*) FROM read_parquet($path)", path=str(path)) == [[count]]
    assert ask(reader, "SELECT count(*) FROM tasks") == [[count]]
    described = "SELECT column_name, column_type FROM (DESCRIBE FROM query_table([$path]))"
    kinds = dict(ask(reader, described, path=str(path)))
    assert kinds["submitted_at"].startswith("TIMESTAMP")
    assert kinds["priority"] == "INTEGER"


@pytest.mark.parametrize("name", ready_made())
def test_each_ready_made_question_can_be_asked_at_any_time(name: str, tmp_path: Path) -> None:
    with Reader(written(tmp_path / "history.duckdb", read_log("workflow"))) as reader:
        for as_of in (None, 0, 1, 5):
            with reader.ask(named(name).question(ABOUT.get(name, {}), as_of)) as answer:
                rows_of(answer)


def test_the_ready_made_questions_say_what_they_answer() -> None:
    known = ready_made()
    assert len(known) >= 10
    assert [each.name for each in known.values() if not each.summary.endswith(".")] == []


def test_what_a_ready_made_question_is_not_told_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected a value for \\$task"):
        named("task").question({})
    with pytest.raises(InvalidRequest, match="expected \\$since, found \\$task"):
        named("workers").question({"task": "x"})
    with pytest.raises(InvalidRequest, match="there are durations, failures"):
        named("nothing")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("queue-depth", {"buckets": 0}),
        ("queue-depth", {"buckets": 10_001}),
        ("queue-depth", {"buckets": "60"}),
        ("throughput", {"since": -1}),
        ("open", {"limit": True}),
        ("task", {"task": 5}),
    ],
)
def test_a_ready_made_question_takes_no_more_than_it_is_worth(name: str, told: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name}: \$\w+: expected a"):
        named(name).question(told)


@pytest.mark.parametrize("seed", range(6))
def test_the_depth_of_the_queue_is_what_the_fold_says(seed: int, tmp_path: Path) -> None:
    messages = History(seed).run(150)
    with Reader(written(tmp_path / "history.duckdb", messages)) as reader:
        for end in range(20, len(messages), 25):
            state = fold_all(messages[:end])
            counted = Counter(str(task.state) for task in state.tasks.values())
            (*_, last) = report(reader, "queue-depth", end, buckets=3)
            assert {name: last[name] for name in OPEN} == {name: counted[name] for name in OPEN}


def test_throughput_adds_up_to_all_tasks(reader: Reader) -> None:
    counted = report(reader, "throughput", buckets=7)
    assert len(counted) == 7
    ((tasks, completed, failed),) = ask(
        reader,
        "SELECT count(*), count(*) FILTER (state = 'completed'), count(*) FILTER (state = 'failed') FROM tasks",
    )
    assert sum(each["submitted"] for each in counted) == tasks
    assert sum(each["completed"] for each in counted) == completed
    assert sum(each["failed"] for each in counted) == failed


def test_waits_count_every_stretch_of_every_open_state(reader: Reader) -> None:
    waits = {each["waits_for"]: each for each in report(reader, "waits")}
    ((open_now,),) = ask(reader, "SELECT count(*) FROM tasks WHERE state IN ('pending', 'ready', 'running')")
    assert sum(each["still"] for each in waits.values()) == open_now
    ((steps,),) = ask(
        reader, "SELECT count(*) FROM task_changes WHERE state IN ('pending', 'ready', 'running')"
    )
    assert sum(each["waits"] for each in waits.values()) == steps


def test_open_tasks_are_those_of_the_fold(reader: Reader, messages: Sequence[Logged]) -> None:
    for end in (100, 250, len(messages)):
        state = fold_all(messages[:end])
        known = {task.id: str(task.state) for task in state.tasks.values() if str(task.state) in OPEN}
        found = {
            each["id"]: each["state"] for each in report(reader, "open", messages[end - 1].seq, limit=10_000)
        }
        assert found == known


def test_the_work_of_workers_adds_up_to_all_attempts(reader: Reader) -> None:
    ((attempts,),) = ask(reader, "SELECT count(*) FROM attempts WHERE run_us IS NOT NULL")
    assert sum(each["attempts"] for each in report(reader, "workers")) == attempts


def test_failures_are_counted_by_cause(reader: Reader) -> None:
    ((failures,),) = ask(
        reader, "SELECT count(*) FROM task_changes WHERE error IS NOT NULL AND state != 'skipped'"
    )
    assert sum(each["failures"] for each in report(reader, "failures")) == failures > 0


def test_the_story_of_a_task_begins_with_its_submission_and_ends_with_its_state(reader: Reader) -> None:
    for task, state in ask(reader, "SELECT id, state FROM tasks LIMIT 50"):
        steps = [each for each in report(reader, "task", task=task) if each["state"]]
        assert steps[0]["since_ms"] == 0
        assert steps[-1]["state"] == state


def test_a_workflow_is_told_with_its_graph(tmp_path: Path) -> None:
    with Reader(written(tmp_path / "history.duckdb", read_log("workflow"))) as reader:
        ((workflow, tasks),) = ask(reader, "SELECT id, tasks FROM workflows ORDER BY tasks DESC LIMIT 1")
        found = report(reader, "workflow", workflow=workflow)
        edges = ask(reader, "SELECT depends_on, task FROM dependencies WHERE workflow = $w", w=workflow)
    assert len(found) == tasks
    assert sorted([needed, each["name"]] for each in found for needed in each["depends_on"] or ()) == sorted(
        edges
    )
