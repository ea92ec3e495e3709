"""Workers against a real server and a master: joining, running, leaving, being given up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import wire
from agentflow.errors import LogGone
from agentflow.events import TaskSubmitted
from agentflow.log.port import Done, Frame
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import NameTaken, Worker
from tests.app import add, sleep_async, sleep_in_thread, stubborn, wait_for_file, whoami
from tests.cluster import Cluster, audit
from tests.eventually import eventually

SOON_S = 15.0


async def _started(client: agentflow.Client, *tasks: agentflow.Handle[Any]) -> None:
    """Wait until the log says of each that it has started."""
    wanted = {task.id for task in tasks}

    async def said() -> bool:
        events = (await audit(client)).of_kind("task.started")
        return wanted <= {getattr(logged.event, "id", "") for logged in events}

    await eventually(said)


async def test_it_says_what_it_offers(cluster: Cluster) -> None:
    worker = await cluster.worker(name="w1", slots=3, group="g", labels={"zone": "a"}, gpus=2)
    client = await cluster.client()
    joined: Any = (await audit(client)).of_kind("worker.joined")[0]
    assert joined.actor == "w1"
    assert (joined.event.slots, joined.event.group, joined.event.labels) == (3, "g", {"zone": "a"})
    assert "add" in joined.event.functions
    assert joined.event.pid == os.getpid()
    assert joined.seq == worker._incarnation


async def test_tasks_go_where_they_fit(cluster: Cluster) -> None:
    await cluster.leader()
    await cluster.worker(name="plain")
    await cluster.worker(name="gpu", gpus=1, group="ml", labels={"zone": "b"}, cpu=2.0, memory_mb=1_000)
    client = await cluster.client()
    for needs in (
        agentflow.Needs(gpus=1),
        agentflow.Needs(group="ml"),
        agentflow.Needs(labels={"zone": "b"}),
        agentflow.Needs(cpu=1.5, memory_mb=500),
    ):
        handle = await client.submit(whoami.options(needs=needs))
        assert (await handle.result(SOON_S))["worker"] == "gpu"


async def test_no_more_run_at_once_than_there_are_slots(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader()
    await cluster.worker(slots=2)
    client = await cluster.client()
    script = f"touch {tmp_path}/$$; ls {tmp_path} | wc -l; sleep 0.05; rm {tmp_path}/$$"
    handles = [await client.shell(script) for _ in range(12)]
    assert max([int(await handle.result(SOON_S)) for handle in handles]) <= 2


async def test_only_what_takes_a_while_is_announced(cluster: Cluster) -> None:
    await cluster.leader()
    await cluster.worker()
    client = await cluster.client()
    short = await client.submit(add, 1, 2)
    long = await client.submit(sleep_async, 0.4)
    await short.result(SOON_S)
    await long.result(SOON_S)
    found = await audit(client)
    assert found.about(short.id) == ["task.submitted", "task.assigned", "task.completed"]
    assert found.about(long.id) == ["task.submitted", "task.assigned", "task.started", "task.completed"]


async def test_the_second_of_a_name_replaces_the_first(cluster: Cluster) -> None:
    await cluster.leader()
    client = await cluster.client()
    async with Worker(WorkerConfig(url=cluster.url, name="twin", drain_s=30.0)) as first:
        handle = await client.submit(sleep_async, 3.0)
        await _started(client, handle)
        await cluster.worker(name="twin")
        with pytest.raises(NameTaken, match="twin"):
            await asyncio.wait_for(first.ended(), SOON_S)
        leaving_since = time.monotonic()
    assert time.monotonic() - leaving_since < 2.5, "it did not wait for what does not count any more"
    assert await handle.result(SOON_S) == "awake"
    assert (await audit(client)).outcomes()[handle.id] == ["task.completed"]


class TestLeaving:
    async def test_what_runs_ends_and_what_waits_goes_to_others(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        await cluster.leader()
        client = await cluster.client()
        go = tmp_path / "go"
        worker = Worker(WorkerConfig(url=cluster.url, name="leaver", slots=1, heartbeat_s=0.2))
        async with worker:
            running = await client.submit(wait_for_file, str(go))
            await _started(client, running)
            waiting = await client.submit_many(whoami, [()] * 5)
            await cluster.worker(name="stayer")
            leaving = asyncio.create_task(worker.__aexit__(None, None, None))
            # The others do not wait until the leaver has left.
            for handle in waiting:
                assert (await handle.result(SOON_S))["worker"] == "stayer"
            go.touch()
            await leaving
        assert await running.result(SOON_S) == "seen"
        found = await audit(client)
        assert found.about(running.id).count("task.assigned") == 1
        assert [logged.kind for logged in found.events if logged.actor == "leaver"][-1] == "worker.left"
        assert not found.of_kind("worker.lost")

    async def test_what_takes_too_long_is_stopped_and_runs_elsewhere(self, cluster: Cluster) -> None:
        await cluster.leader()
        client = await cluster.client()
        async with Worker(WorkerConfig(url=cluster.url, name="leaver", drain_s=0.2)):
            handle = await client.shell('test "$AGENTFLOW_ATTEMPT" = 2 || sleep 60')
            await _started(client, handle)
        await cluster.worker(name="stayer")
        assert await handle.result(SOON_S) is None
        found = await audit(client)
        assert not found.state.tasks
        assert found.outcomes()[handle.id] == ["task.completed"]

    @pytest.mark.parametrize("function", [stubborn, sleep_in_thread])
    async def test_nothing_keeps_it_for_ever(
        self, cluster: Cluster, function: agentflow.Function[[float], str]
    ) -> None:
        await cluster.leader()
        client = await cluster.client()
        async with Worker(WorkerConfig(url=cluster.url, drain_s=0.1)):
            handle = await client.submit(function, 8.0)
            await _started(client, handle)
            since = time.monotonic()
        assert time.monotonic() - since < 7.5
        assert not (await audit(client)).state.workers

    async def test_it_leaves_while_the_server_is_down(self, cluster: Cluster) -> None:
        await cluster.leader()
        client = await cluster.client()
        async with Worker(WorkerConfig(url=cluster.url, drain_s=0.1)):
            handle = await client.shell("sleep 60")
            await _started(client, handle)
            await cluster.server.kill()
            since = time.monotonic()
        assert time.monotonic() - since < 12.0
        await cluster.server.start()
        await cluster.worker(name="other")
        await handle.cancel()
        with pytest.raises(agentflow.TaskCancelled):
            await handle.result(SOON_S)

    async def test_sigterm_drains_the_process(self, cluster: Cluster, tmp_path: Path) -> None:
        await cluster.leader()
        client = await cluster.client()
        process = await cluster.process("worker", "--app", "tests.app", "--name", "w1", "--slots", "2")
        handle = await client.shell(f"until test -e {tmp_path}/go; do sleep 0.02; done; echo done")
        await _started(client, handle)
        process.send(signal.SIGTERM)

        async def draining() -> bool:
            return bool((await audit(client)).of_kind("worker.draining"))

        await eventually(draining)
        (tmp_path / "go").touch()
        assert await process.ended() == 0
        assert await handle.result(SOON_S) == "done"
        assert (await audit(client)).of_kind("worker.left")


class TestBeingGivenUp:
    async def test_a_silent_worker_is_given_up_and_joins_anew(self, cluster: Cluster) -> None:
        await cluster.leader(worker_ttl_s=0.6)
        worker = await cluster.worker(name="w1")
        client = await cluster.client()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        before = worker._incarnation
        beating = next(task for task in worker._tasks if task.get_name() == "worker heartbeat")
        beating.cancel()
        await eventually(lambda: worker._incarnation != before)
        worker._tasks.append(asyncio.create_task(worker._beat()))
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
        lost: Any = (await audit(client)).of_kind("worker.lost")[0].event
        assert (lost.worker, lost.incarnation) == ("w1", before)

    async def test_a_worker_that_lives_but_does_not_read_is_given_up(self, cluster: Cluster) -> None:
        await cluster.leader(worker_ttl_s=0.6)
        deaf = await cluster.worker(name="deaf")
        client = await cluster.client()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        reading = next(task for task in deaf._tasks if task.get_name() == "worker reader")
        reading.cancel()
        await asyncio.wait([reading])
        handle = await client.submit(whoami)
        await cluster.worker(name="hears")
        assert (await handle.result(SOON_S))["worker"] == "hears"
        lost: Any = (await audit(client)).of_kind("worker.lost")[0].event
        assert (lost.worker, lost.reason) == ("deaf", "it has not read its assignments for 0.6 s")

    async def test_it_ends_when_its_log_is_gone(self, cluster: Cluster) -> None:
        worker = await cluster.worker(name="w1")
        client = await cluster.client()
        await client.bus.js_api("STREAM.DELETE.AF_default", b"", 5.0)
        await cluster.client(name="second")  # creates it anew
        with pytest.raises(LogGone):
            await asyncio.wait_for(worker.ended(), SOON_S)


async def test_an_assignment_stored_twice_is_run_once(cluster: Cluster, tmp_path: Path) -> None:
    """A leader repeats a write in doubt; after a step of the server's clock it may be stored again."""
    await cluster.leader()
    await cluster.worker(name="w1", slots=1)
    client = await cluster.client()
    journal = tmp_path / "journal"
    handle = await client.submit_task(TaskSubmitted(shell=f"echo run >> {journal}"))
    await handle.result(SOON_S)
    subject = wire.event("default", "task.assigned", "w1")
    stored = await client.log.last(subject)
    assert stored is not None
    assert stored.headers is not None
    headers = {wire.DECISION: stored.headers[wire.DECISION]}
    assert isinstance(await client.log.append(Frame(subject, stored.data, "again.1", headers)), Done)
    # In the one slot there is, this comes after it.
    await (await client.submit_task(TaskSubmitted(shell="true"))).result(SOON_S)
    assert journal.read_text() == "run\n"
