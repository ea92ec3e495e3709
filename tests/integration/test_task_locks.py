"""Tasks that name a lock: held while they run, given back afterwards, and what happens when it is not to be had."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow.client.files import load_workflow
from agentflow.events import Policy, TaskSubmitted
from tests.app import whoami
from tests.cluster import Audit, Cluster, audit
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(120)

SOON_S = 40.0


async def _said(client: agentflow.Client, kind: str, *, count: int = 1) -> Audit:
    """Wait until the log holds so many events of a kind; the log then."""

    async def there() -> Audit | None:
        found = await audit(client)
        return found if len(found.of_kind(kind)) >= count else None

    return await eventually(there, within_s=SOON_S)


def _tokens(found: Audit, name: str) -> list[int]:
    events: list[Any] = [logged.event for logged in found.of_kind("lock.acquired")]
    return [event.token for event in events if event.name == name]


async def test_a_function_and_a_program_run_under_it_and_know_its_token(cluster: Cluster) -> None:
    await cluster.leader()
    await cluster.worker(name="w1")
    client = await cluster.client()
    called = await client.submit(whoami.options(lock="stock"))
    seen = await called.result(SOON_S)
    shell = await client.shell('echo "$AGENTFLOW_LOCK $AGENTFLOW_LOCK_TOKEN"', lock="stock")
    name, token = (await shell.result(SOON_S)).split()
    found = await _said(client, "lock.released", count=2)
    assert _tokens(found, "stock") == sorted([seen["lock_token"], int(token)])
    assert (seen["lock"], name) == ("stock", "stock")
    assert (await (await client.submit(whoami)).result(SOON_S))["lock_token"] is None
    kinds = [logged.kind for logged in found.events if logged.kind in _ORDER]
    assert kinds == [*_ORDER, *_ORDER], "acquired before the attempt, given back after its outcome"


_ORDER = ["task.assigned", "lock.acquired", "task.completed", "lock.released"]


async def test_those_who_name_the_same_lock_run_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader()
    for name in ("w1", "w2"):
        await cluster.worker(name=name)
    client = await cluster.client()
    script = f"mkdir {tmp_path}/busy && sleep 0.05 && rmdir {tmp_path}/busy"
    handles = [await client.shell(script, lock="stock") for _ in range(6)]
    for handle in handles:
        assert (await handle.outcome(SOON_S)).state == "completed"
    tokens = _tokens(await _said(client, "lock.released", count=6), "stock")
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 6


async def test_it_is_declined_while_somebody_else_holds_it(cluster: Cluster) -> None:
    await cluster.leader(policy=Policy(decline_ms=500))
    await cluster.worker(name="w1")
    client = await cluster.client()
    async with client.lock("stock", holder="an accountant"):
        handle = await client.submit(whoami.options(lock="stock"))
        found = await _said(client, "task.declined")
        assert not found.of_kind("task.started", "task.completed"), "waiting for a lock is no attempt"
    declined: Any = found.of_kind("task.declined")[0].event
    assert declined.reason == "lock 'stock' is held by an accountant"
    assert (await handle.result(SOON_S))["lock"] == "stock"
    assert (await audit(client)).outcomes()[handle.id] == ["task.completed"]


async def test_one_that_is_cancelled_gives_it_back(cluster: Cluster) -> None:
    await cluster.leader()
    await cluster.worker(name="w1")
    client = await cluster.client()
    handle = await client.shell("sleep 300", lock="stock")
    await _said(client, "task.started")
    await handle.cancel()
    with pytest.raises(agentflow.TaskCancelled):
        await handle.result(SOON_S)
    async with client.lock("stock", wait_s=SOON_S) as held:
        assert held.token > _tokens(await audit(client), "stock")[0]
    assert not (await audit(client)).of_kind("lock.lost")


async def test_a_worker_that_leaves_gives_it_back(cluster: Cluster) -> None:
    await cluster.leader()
    client = await cluster.client()
    leaver = await cluster.worker(name="leaver", drain_s=0.1)
    handle = await client.shell('test "$AGENTFLOW_ATTEMPT" = 2 || sleep 300', lock="stock")
    await _said(client, "task.started")
    await leaver.__aexit__(None, None, None)
    found = await audit(client)
    assert [logged.kind for logged in found.events][-1] == "worker.left"
    assert found.of_kind("lock.released")
    await cluster.worker(name="stays")
    assert await handle.result(SOON_S) is None


async def test_whoever_loses_it_is_stopped_and_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader(worker_ttl_s=60.0)
    client = await cluster.client()
    paused = await cluster.process("worker", "--name", "paused", "--slots", "2")
    script = f'test "$AGENTFLOW_ATTEMPT" = 2 || (echo $$ > {tmp_path}/pid; sleep 300)'
    retry = agentflow.Retry(max_attempts=2, backoff_s=0.1)
    handle = await client.shell(script, lock="stock", retry=retry)
    await _said(client, "task.started")
    paused.send(signal.SIGSTOP)
    async with client.lock("stock", wait_s=SOON_S):
        paused.send(signal.SIGCONT)
        found = await _said(client, "task.failed")
    failed: Any = found.of_kind("task.failed")[0].event
    assert (failed.error, failed.retryable) == ("lock_lost", True)
    assert await handle.result(SOON_S) is None
    assert (await audit(client)).outcomes()[handle.id] == ["task.completed"]


def test_a_workflow_file_can_name_it(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text(
        "workflow:\n"
        "  tasks:\n"
        "    - {task_id: one, shell: 'true'}\n"
        "    - {task_id: two, shell: 'true', lock: other}\n"
        "defaults: {lock: stock}\n"
    )
    assert [task.lock for task in load_workflow(path).tasks] == ["stock", "other"]
    path.write_text(f"workflow: {{tasks: [{{task_id: one, shell: 'true', lock: {'x' * 201}}}]}}\n")
    with pytest.raises(agentflow.InvalidRequest, match="lock"):
        load_workflow(path)


async def test_a_workflow_built_in_python_can_name_it(cluster: Cluster) -> None:
    await cluster.leader()
    await cluster.worker(name="w1")
    client = await cluster.client()
    flow = agentflow.Workflow()
    flow.shell("program", "echo $AGENTFLOW_LOCK", lock="stock")
    flow.add(whoami.options(lock="till"))
    results = await (await client.submit_workflow(flow)).result(SOON_S)
    assert (results["program"], results["whoami"]["lock"]) == ("stock", "till")


async def test_a_name_that_is_too_long_is_refused(cluster: Cluster) -> None:
    client = await cluster.client()
    with pytest.raises(agentflow.InvalidRequest, match="lock"):
        await asyncio.wait_for(client.submit_task(TaskSubmitted(shell="true", lock="x" * 201)), SOON_S)
