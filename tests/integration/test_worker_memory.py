"""A worker that starts again knows what it had, whatever ended it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import agentflow
from agentflow.log.port import Identity, Message
from agentflow_nodes.worker.node import Worker
from agentflow_projections import worker_view
from agentflow_projections.database import Checkpoint
from agentflow_projections.worker_view import Unreported, WorkerView
from tests.app import add, wait_for_file
from tests.cluster import Cluster
from tests.eventually import eventually
from tests.unit.given import NAMESPACE, assigned, completed, elected, given, joined, submitted


async def _told(worker: Worker) -> list[Unreported]:
    assert worker.memory is not None
    await eventually(worker.memory.told.is_set)
    return worker.memory.left


async def test_killed_it_says_what_it_was_running(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.leader(worker_ttl_s=30.0)
    client = await cluster.client()
    first = await cluster.process(
        "worker", "--app", "tests.app", "--name", "w1", "--data", str(tmp_path), "--slots", "2"
    )
    assert await (await client.submit(add, 1, 2)) == 3
    held = await client.submit(wait_for_file, str(tmp_path / "never"))
    await eventually(lambda: _running(client, held.id))
    await first.kill()
    second = await cluster.worker(name="w1", data=tmp_path)
    (left,) = await _told(second)
    assert (left.task, left.attempt, left.runs) == (held.id, 1, "wait_for_file")
    assert "attempts of before were not reported" in caplog.text


async def _running(client: agentflow.Client, task_id: str) -> bool:
    return (await client.status([task_id])).statuses[0].state == "running"


async def test_ended_in_good_order_it_left_nothing(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader()
    client = await cluster.client()
    first = await cluster.process(
        "worker", "--app", "tests.app", "--name", "w1", "--data", str(tmp_path), "--drain-s", "0"
    )
    held = await client.submit(wait_for_file, str(tmp_path / "never"))
    await eventually(lambda: _running(client, held.id))
    first.send(signal.SIGTERM)
    assert await first.ended() == 0
    assert await _told(await cluster.worker(name="w1", data=tmp_path)) == []


@pytest.mark.parametrize("damage", ["damaged", "of another log"])
async def test_its_file_is_made_again_from_the_log(cluster: Cluster, tmp_path: Path, damage: str) -> None:
    await cluster.leader(worker_ttl_s=30.0)
    client = await cluster.client()
    path = tmp_path / "default.w1.duckdb"
    if damage == "of another log":
        with WorkerView(path, "default").database as database:
            database.commit({}, Checkpoint("AF_default", 7, 1, 10**6, b""), at_ms=0)
    first = await cluster.process("worker", "--app", "tests.app", "--name", "w1", "--slots", "2")
    held = await client.submit(wait_for_file, str(tmp_path / "never"))
    await eventually(lambda: _running(client, held.id))
    await first.kill()
    if damage == "damaged":
        path.write_bytes(b"no database")
    (left,) = await _told(await cluster.worker(name="w1", data=tmp_path))
    assert left.task == held.id


def test_what_was_reported_is_forgotten_and_what_was_not_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_view, "KEPT_ROWS", 20)
    scene = given(elected(), joined("w1", slots=200))
    for number in range(100):
        scene.given(submitted(f"t{number}"), assigned(f"t{number}", "w1"))
        if number % 25:
            scene.given(completed(f"t{number}", "w1"))
    view = WorkerView(tmp_path / "it.duckdb", NAMESPACE)
    with view.database:
        view.open(Identity("AF_test", 1, 1, 10**9, 1, 0, -1))
        for each in scene.messages:
            if each.subject in worker_view.subjects(NAMESPACE, "w1"):
                view.read(Message(each.seq, each.time_ns, each.subject, each.data, each.headers))
                view.commit(view.take())
        assert [each.task for each in view.unreported(10**9)] == ["t0", "t25", "t50", "t75"]
        assert 0 < _count(view) <= 4 + 3 * worker_view.KEPT_ROWS


def _count(view: WorkerView) -> int:
    query = "SELECT (SELECT count(*) FROM assigned) + (SELECT count(*) FROM reported)"
    ((count,),) = view.database.ask(query).fetchall()
    return int(count)
