"""What lies in the DuckDB file is what the fold says, at every position of any history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as with_random
from hypothesis import strategies as st

from agentflow.domain.life import FINAL, State
from agentflow.domain.state import Kind, Namespace
from agentflow.log.port import Message
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.rows import Recorder
from tests.golden.record import SCENES, read_log
from tests.unit.given import NAMESPACE, Logged, fold_all
from tests.unit.histories import History

SEEDS = st.integers(0, 2**32)


def messages_of(found: Sequence[Logged]) -> list[Message]:
    return [Message(each.seq, each.time_ns, each.subject, each.data, each.headers) for each in found]


def project(database: Database, messages: Sequence[Message], *, batch: int = 1_000) -> Namespace:
    """Write messages into a database, `batch` at a time."""
    recorder, chain = Recorder(Namespace(NAMESPACE)), START
    for start in range(0, len(messages), batch):
        for message in messages[start : start + batch]:
            recorder.apply(message)
            chain = chained(chain, message)
        checkpoint = Checkpoint("AF_test", 1, 1, recorder.state.seq, chain)
        database.commit(recorder.take(), checkpoint, at_ms=recorder.state.clock_ms)
    return recorder.state


def table(database: Database, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    return list(database.ask(query, list(parameters)).fetchall())


def tasks_of(state: Namespace) -> dict[str, tuple[str, int, int]]:
    """Open tasks and ended tasks of open workflows, as the fold knows them."""
    return {task.id: (str(task.state), task.attempt, task.priority) for task in state.tasks.values()}


def require_same(database: Database, state: Namespace) -> None:
    """The views as of the state's position say what the state says."""
    seq = state.seq
    rows = {
        id_: (found, attempts, priority)
        for id_, found, attempts, priority in table(
            database, "SELECT id, state, attempts, priority FROM tasks_at(?)", seq
        )
    }
    known = tasks_of(state)
    assert {id_: rows[id_] for id_ in known} == known
    for id_, (found, _, _) in rows.items():
        if id_ not in known:
            closed = state.closed.get(id_)
            assert closed is not None
            assert (found, closed.state in FINAL) == (str(closed.state), True)
    queue = {id_ for (id_,) in table(database, "SELECT id FROM queue_at(?)", seq)}
    assert queue == {task.id for task in state.tasks.values() if task.state is State.READY}
    require_same_workers(database, state)
    leaders = table(database, "SELECT epoch, master FROM leaders_at(?) WHERE leads", seq)
    assert leaders == ([(state.epoch, state.leader)] if state.epoch else [])
    open_flows = {
        id_ for (id_,) in table(database, "SELECT id FROM workflows_at(?) WHERE state = 'running'", seq)
    }
    assert open_flows == set(state.workflows)


def require_same_workers(database: Database, state: Namespace) -> None:
    query = "SELECT name, incarnation, state FROM workers_at(?) WHERE state IN ('active', 'draining')"
    rows = set(table(database, query, state.seq))
    assert rows == {
        (worker.name, worker.incarnation, "draining" if worker.draining else "active")
        for worker in state.workers.values()
    }
    running = table(
        database, "SELECT task, incarnation, attempt FROM attempts_at(?) WHERE outcome = 'running'", state.seq
    )
    assert set(running) == {
        (task.id, task.worker.incarnation, task.attempt)
        for task in state.tasks.values()
        if task.worker is not None
    }


@pytest.mark.parametrize("name", SCENES)
def test_at_every_position_of_recorded_logs(name: str) -> None:
    messages = read_log(name)
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        for end in range(1, len(messages) + 1):
            require_same(database, fold_all(messages[:end]))


@with_random(seed=SEEDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_at_many_positions_of_random_histories(seed: int) -> None:
    messages = History(seed).run(120)
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        for end in range(1, len(messages), 7):
            require_same(database, fold_all(messages[:end]))


@with_random(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_whatever_the_batches_the_rows_are_the_same(seed: int) -> None:
    messages = messages_of(History(seed).run(80))
    found = [rows_after(messages, batch) for batch in (1, 7, 1_000)]
    assert found[0] == found[1] == found[2]


def rows_after(messages: Sequence[Message], batch: int) -> dict[str, list[tuple[Any, ...]]]:
    with Database(None, NAMESPACE) as database:
        project(database, messages, batch=batch)
        names = [name for (name,) in table(database, "SELECT table_name FROM duckdb_tables() ORDER BY 1")]
        return {name: table(database, f'FROM "{name}"') for name in names}


def test_every_event_has_its_verdict() -> None:
    messages = History(0).run(200)
    state = Namespace(NAMESPACE)
    recorder = Recorder(state)
    said = [
        (message.seq, index, str(verdict.kind))
        for message in messages_of(messages)
        for index, verdict in enumerate(recorder.apply(message))
    ]
    assert {kind for _, _, kind in said} == {str(kind) for kind in Kind}
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        assert table(database, 'SELECT seq, "index", verdict FROM events ORDER BY ALL') == said


def test_the_file_holds_the_log_byte_by_byte(tmp_path: Path) -> None:
    messages = messages_of(History(5).run(200))
    with Database(tmp_path / "history.duckdb", NAMESPACE) as database:
        project(database, messages)
    with Database(tmp_path / "history.duckdb", NAMESPACE) as database:
        assert list(database.messages(after=0)) == messages
