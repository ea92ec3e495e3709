"""What lies in the DuckDB file is what the fold says, at every position of any history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow.domain.fold import fold
from agentflow.domain.life import FINAL, State
from agentflow.domain.snapshot import restore, snapshot
from agentflow.domain.state import Kind, Namespace
from agentflow.frames import judge
from agentflow.limits import LEVEL
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Message
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.hydrate import StateFile
from agentflow_projections.projector import Projector
from agentflow_projections.rows import Recorder
from tests.golden.record import SCENES, read_log
from tests.rows import Rows, all_rows
from tests.unit import reference_fold
from tests.unit.given import NAMESPACE, Logged, fold_all
from tests.unit.histories import History
from tests.unit.reference_fold import Fold

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


def require_as_contracted(database: Database, reference: Fold) -> None:
    """The views as of a position say what the contract says."""
    seq = reference["seq"]
    assert table(database, "SELECT id, state, attempts, priority FROM tasks_at(?) ORDER BY id", seq) == [
        (name, task["state"], task["attempt"], task["priority"])
        for name, task in sorted(reference["tasks"].items())
    ]
    queue = {name for name, task in reference["tasks"].items() if task["state"] == State.READY}
    assert {name for (name,) in table(database, "SELECT id FROM queue_at(?)", seq)} == queue
    running = "SELECT task, worker, incarnation, attempt FROM attempts_at(?) WHERE outcome = 'running'"
    assert set(table(database, running, seq)) == {
        (name, task["worker"], task["incarnation"], task["attempt"])
        for name, task in reference["tasks"].items()
        if task["worker"]
    }
    flows = {name: flow["state"] for name, flow in reference["workflows"].items()}
    assert dict(table(database, "SELECT id, state FROM workflows_at(?)", seq)) == flows
    there = "SELECT name, incarnation, state = 'draining' FROM workers_at(?) WHERE state IN ('active', 'draining')"
    workers = reference["workers"].items()
    assert set(table(database, there, seq)) == {
        (name, worker["incarnation"], worker["draining"]) for name, worker in workers
    }
    leader = [(reference["epoch"], reference["leader"])] if reference["epoch"] else []
    assert table(database, "SELECT epoch, master FROM leaders_at(?) WHERE leads", seq) == leader
    held = "SELECT name, token, mode FROM locks_at(?) WHERE state = 'held'"
    assert sorted(table(database, held, seq)) == sorted(
        (name, token, mode) for name, holds in reference["locks"].items() for token, mode in holds.items()
    )


def read_by_contract(state: Fold, message: Logged) -> None:
    judged = judge(message.subject, message.data, message.headers)
    reference_fold.read(state, message.seq, message.time_ns, judged)


@pytest.mark.parametrize("name", SCENES)
def test_at_every_position_of_recorded_logs(name: str) -> None:
    messages = read_log(name)
    reference = reference_fold.empty()
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        for end, message in enumerate(messages, 1):
            read_by_contract(reference, message)
            require_same(database, fold_all(messages[:end]))
            require_as_contracted(database, reference)


@with_random(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_at_every_position_of_random_histories_it_is_what_the_contract_says(seed: int) -> None:
    messages = History(seed).run(60)
    reference = reference_fold.empty()
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        for message in messages:
            read_by_contract(reference, message)
            require_as_contracted(database, reference)


@with_random(seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_at_many_positions_of_random_histories(seed: int) -> None:
    messages = History(seed).run(120)
    with Database(None, NAMESPACE) as database:
        project(database, messages_of(messages))
        for end in range(1, len(messages), 7):
            require_same(database, fold_all(messages[:end]))


@with_random(seed=SEEDS)
@settings(max_examples=4, deadline=None)
def test_whatever_the_batches_the_rows_are_the_same(seed: int) -> None:
    messages = messages_of(History(seed).run(80))
    found = [rows_after(messages, batch) for batch in (1, 7, 1_000)]
    assert found[0] == found[1] == found[2]


def rows_after(messages: Sequence[Message], batch: int) -> Rows:
    with Database(None, NAMESPACE) as database:
        project(database, messages, batch=batch)
        return all_rows(database)


def begun_anew(database: Database, kept: bytes | None) -> Recorder:
    """A recorder that goes on where the file left off: from a snapshot, if there is one, and its frames."""
    state = restore(kept, knows=LEVEL) if kept is not None else Namespace(NAMESPACE)
    for message in database.messages(after=state.seq):
        fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))
        state.ended.clear()
    return Recorder(state)


@pytest.mark.parametrize("keep", [False, True], ids=["from the frames", "from a snapshot and the frames"])
def test_a_restart_at_every_position_changes_nothing(tmp_path: Path, keep: bool) -> None:
    messages, kept, chain = messages_of(History(11).run(35)), None, START
    for message in messages:
        with Database(tmp_path / "history.duckdb", NAMESPACE) as database:
            recorder = begun_anew(database, kept)
            recorder.apply(message)
            chain = chained(chain, message)
            checkpoint = Checkpoint("AF_test", 1, 1, message.seq, chain)
            database.commit(recorder.take(), checkpoint, at_ms=recorder.state.clock_ms)
        if keep and message.seq % 3 == 0:
            kept = snapshot(recorder.state)
    with Database(tmp_path / "history.duckdb", NAMESPACE) as database:
        assert all_rows(database) == rows_after(messages, len(messages))


async def project_on(log: MemoryLog, path: Path, until: int, *, keep: bool) -> Rows:
    """Open the file, take the log up where it left off, and close it again."""
    with Database(path, NAMESPACE) as database:
        projector = Projector(log, database, StateFile(path, NAMESPACE) if keep else None)
        try:
            await projector.open()
            await projector.run(until=until)
        finally:
            await projector.close()
        return all_rows(database)


@pytest.mark.parametrize("keep", [False, True], ids=["from the frames", "from the state beside it"])
async def test_a_projector_restarted_at_every_position_writes_the_same(tmp_path: Path, keep: bool) -> None:
    messages = messages_of(History(13).run(20))
    server = MemoryServer()
    stream = server.create(NAMESPACE)
    stream.messages.extend(messages)
    stream.last_seq = len(messages)
    async with MemoryLog(server, NAMESPACE) as log:
        at_once = await project_on(log, tmp_path / "at-once.duckdb", len(messages), keep=keep)
        for end in range(1, len(messages)):
            await project_on(log, tmp_path / "history.duckdb", end, keep=keep)
        assert await project_on(log, tmp_path / "history.duckdb", len(messages), keep=keep) == at_once
    assert {name: rows for name, rows in at_once.items() if name != "checkpoint"} == {
        name: rows for name, rows in rows_after(messages, 7).items() if name != "checkpoint"
    }


@with_random(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=4, deadline=None)
def test_what_is_delivered_again_leaves_no_row(seed: int, share: float) -> None:
    messages = messages_of(History(seed).run(80))
    recorder, again = Recorder(Namespace(NAMESPACE)), Recorder(Namespace(NAMESPACE))
    cut = int(len(messages) * share)
    for message in messages:
        recorder.apply(message)
    for message in [*messages, *messages[cut:]]:
        again.apply(message)
    assert again.take() == recorder.take()


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
