"""Workers as processes: held up, paused, killed, cut off; what becomes of them and of their tasks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import agentflow
from agentflow.events import Policy, TaskSubmitted
from agentflow.limits import LEVEL
from agentflow_nodes.worker.keeper import goes_on
from tests.acceptance.test_cli import Up
from tests.app import add, wait_for_file, whoami
from tests.cluster import Audit, Cluster, Process, audit
from tests.eventually import eventually
from tests.hard import hold_async, hold_in_thread, journal, kill_worker, match_wildly

pytestmark = pytest.mark.timeout(120)

SOON_S = 40.0
TTL_S = 4.0
"""How long a worker may be silent here."""


async def _worker(cluster: Cluster, name: str, *options: str, url: str = "") -> Process:
    apps = ("--app", "tests.app", "--app", "tests.hard")
    return await cluster.process("worker", "--name", name, "--slots", "2", *apps, *options, url=url)


async def _said(client: agentflow.Client, kind: str, **fields: Any) -> Audit:
    """Wait until the log holds an event of a kind with such fields; the log then."""

    async def there() -> Audit | None:
        found = await audit(client)
        events = [logged.event for logged in found.of_kind(kind)]
        wanted = fields.items()
        return (
            found
            if any(all(getattr(event, *pair[:1]) == pair[1] for pair in wanted) for event in events)
            else None
        )

    return await eventually(there, within_s=SOON_S)


def _verdicts(found: Audit, worker: str, kinds: tuple[str, ...]) -> list[str]:
    """What the fold made of what a worker said."""
    said = [logged for logged in found.of_kind(*kinds) if logged.actor == worker]
    return [str(found.verdicts[logged.seq, logged.index].kind) for logged in said]


class TestHeldUp:
    """A task that keeps the interpreter to itself stops the event loop of its worker, not its life."""

    @pytest.mark.parametrize("function", [hold_in_thread, hold_async, match_wildly])
    async def test_it_costs_the_worker_nothing(
        self, cluster: Cluster, function: agentflow.Function[[float], int]
    ) -> None:
        await cluster.leader(worker_ttl_s=TTL_S)
        await _worker(cluster, "held")
        client = await cluster.client()
        handle = await client.submit(function, 2.25 * TTL_S)
        assert await handle.result(SOON_S) == 1
        assert await (await client.submit(whoami)).result(SOON_S)
        found = await audit(client)
        assert len(found.of_kind("worker.joined")) == 1
        assert not found.of_kind("worker.lost")
        assert found.outcomes()[handle.id] == ["task.completed"]

    async def test_one_that_is_stopped_is_not_spoken_for(self, cluster: Cluster, tmp_path: Path) -> None:
        await cluster.leader(worker_ttl_s=1.5)
        client = await cluster.client()
        stopped = await _worker(cluster, "stopped")
        handle = await client.submit(journal, str(tmp_path / "journal"), str(tmp_path / "go"))
        await _said(client, "task.started", id=handle.id)
        stopped.send(signal.SIGSTOP)
        await _said(client, "worker.lost", worker="stopped")

    async def test_its_keeper_ends_with_it(self, cluster: Cluster) -> None:
        worker = await _worker(cluster, "w1")
        (keeper,) = await eventually(lambda: _keepers(worker))
        await worker.kill()
        await eventually(lambda: not goes_on(keeper.pid))

    async def test_it_gets_another_keeper_should_one_die(self, cluster: Cluster) -> None:
        worker = await _worker(cluster, "w1")
        (first,) = await eventually(lambda: _keepers(worker))
        first.kill()
        await eventually(lambda: [each for each in _keepers(worker) if each.pid != first.pid])


def _keepers(worker: Process) -> list[psutil.Process]:
    return [child for child in psutil.Process(worker.pid).children() if _is_keeper(child)]


def _is_keeper(child: psutil.Process) -> bool:
    try:
        return any("keeper" in word for word in child.cmdline())
    except psutil.NoSuchProcess:  # it has just ended; a zombie is one of those
        return False


class TestPaused:
    async def test_what_it_says_afterwards_does_not_count_and_it_works_on(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        await cluster.leader(worker_ttl_s=1.5)
        client = await cluster.client()
        paused = await _worker(cluster, "paused")
        go, lines = tmp_path / "go", tmp_path / "journal"
        called = await client.submit(journal, str(lines), str(go))
        script = f"echo $$ $AGENTFLOW_ATTEMPT >> {tmp_path}/pids; until test -e {go}; do sleep 0.05; done"
        shell = await client.shell(f"{script}; echo $AGENTFLOW_ATTEMPT")
        for task in (called, shell):
            await _said(client, "task.started", id=task.id)
        paused.send(signal.SIGSTOP)
        await _said(client, "worker.lost", worker="paused")
        other = await _worker(cluster, "other")
        await _said(client, "task.started", id=shell.id, attempt=2)
        await _said(client, "task.started", id=called.id, attempt=2)
        paused.send(signal.SIGCONT)
        await _rejoined(client, "paused")
        # Programs of the first attempt are dead although nobody let them go.
        pids = await eventually(lambda: _pids_by_attempt(tmp_path / "pids", 2))
        await eventually(lambda: not goes_on(pids["1"]))
        assert goes_on(pids["2"])
        go.touch()
        assert await called.result(SOON_S) == "other"
        assert await shell.result(SOON_S) == "2"
        assert lines.read_text().splitlines() == ["1 paused", "2 other"]
        found = await audit(client)
        late = _verdicts(found, "paused", ("task.completed", "task.failed"))
        assert late == ["superseded", "superseded"]
        assert found.outcomes()[called.id] == found.outcomes()[shell.id] == ["task.completed"]
        await other.kill()
        await _said(client, "worker.lost", worker="other")
        assert (await (await client.submit(whoami)).result(SOON_S))["worker"] == "paused"


def _pids_by_attempt(path: Path, attempts: int) -> dict[str, int] | None:
    """Once the programs of so many attempts have said who they are."""
    said = [line.split() for line in path.read_text().splitlines()]
    return {attempt: int(pid) for pid, attempt in said} if len(said) == attempts else None


async def _rejoined(client: agentflow.Client, name: str) -> None:
    async def twice() -> bool:
        joined = (await audit(client)).of_kind("worker.joined")
        return len([logged for logged in joined if logged.actor == name]) == 2

    await eventually(twice, within_s=SOON_S)


class TestKilled:
    async def test_its_programs_die_and_its_tasks_run_elsewhere(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        await cluster.leader(worker_ttl_s=1.5)
        client = await cluster.client()
        victim = await _worker(cluster, "victim")
        script = (
            f"echo $$ $AGENTFLOW_ATTEMPT >> {tmp_path}/pids; (setsid sleep 300 & echo $! >> {tmp_path}/far)"
        )
        handle = await client.shell(f"{script}; until test -e {tmp_path}/go; do sleep 0.05; done")
        await _said(client, "task.started", id=handle.id)
        await eventually((tmp_path / "far").exists)
        await victim.kill()
        first = int((tmp_path / "pids").read_text().split()[0])
        far = int((tmp_path / "far").read_text().split()[0])
        await eventually(lambda: not goes_on(first) and not goes_on(far))
        await _worker(cluster, "heir")
        await _said(client, "task.started", id=handle.id, attempt=2)
        (tmp_path / "go").touch()
        await handle.outcome(SOON_S)
        found = await audit(client)
        assert found.outcomes()[handle.id] == ["task.completed"]
        starts = [logged.actor for logged in found.of_kind("task.started")]
        assert starts == ["victim", "heir"]


class TestDeaf:
    async def test_one_that_speaks_and_hears_nothing_is_lost(self, cluster: Cluster, tmp_path: Path) -> None:
        await cluster.leader(worker_ttl_s=1.5)
        client = await cluster.client()
        proxy = await cluster.proxy()
        await _worker(cluster, "deaf", url=proxy.url)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        proxy.blackhole(to_client=True)
        handle = await client.submit(whoami)
        await _worker(cluster, "hears")
        assert (await handle.result(SOON_S))["worker"] == "hears"
        lost = [logged.event for logged in (await audit(client)).of_kind("worker.lost")]
        assert [event.worker for event in lost if event is not None] == ["deaf"]  # type: ignore[union-attr]
        proxy.heal()
        await _rejoined(client, "deaf")


class Cli:
    """The command line against a cluster."""

    def __init__(self, url: str) -> None:
        self._env = {**os.environ, "AGENTFLOW_NATS_URL": url}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "agentflow_nodes", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )

    async def run(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Its output and its complaints."""
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(), SOON_S)
        assert process.returncode == status, (out, err)
        return out.decode(), err.decode()

    async def json(self, *arguments: str) -> list[dict[str, Any]]:
        out, _ = await self.run(*arguments, "--json")
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def cli(cluster: Cluster) -> Cli:
    return Cli(cluster.url)


class TestSeen:
    """What `agentflow workers` says of them."""

    async def test_each_state_a_worker_can_be_in(self, cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
        await cluster.leader(worker_ttl_s=TTL_S)
        client = await cluster.client()
        worker = await _worker(cluster, "w1")

        async def seen(*states: str) -> dict[str, Any]:
            async def now() -> dict[str, Any] | None:
                (row,) = await cli.json("workers")
                return row if row["state"] in states else None

            return await eventually(now, within_s=SOON_S)

        row = await seen("active")
        assert (row["slots"], row["running"], row["queued"], row["level"]) == (2, 0, 0, LEVEL)
        assert 0 <= row["heartbeat_age_ms"] < 1_000 * TTL_S
        slow = [await client.submit(wait_for_file, str(tmp_path / "go")) for _ in range(2)]
        row = await seen("busy")
        assert (row["running"], row["queued"], row["ended"]) == (2, 0, None)
        (tmp_path / "go").touch()
        for each in slow:
            await each.result(SOON_S)
        held = await client.submit(hold_in_thread, 2 * TTL_S)
        row = await seen("stalled")
        assert row["stalled"]
        await held.result(SOON_S)
        again = await client.submit(wait_for_file, str(tmp_path / "again"))
        await _said(client, "task.started", id=again.id)
        await cli.run("drain", "w1")
        await seen("draining")
        (tmp_path / "again").touch()
        assert await worker.ended() == 0
        row = await seen("offline")
        assert row["ended"] == "left"
        text, _ = await cli.run("workers")
        assert "offline (left)" in text

    async def test_one_that_was_lost_is_offline(self, cluster: Cluster, cli: Cli) -> None:
        await cluster.leader(worker_ttl_s=1.5)
        client = await cluster.client()
        worker = await _worker(cluster, "w1")
        await worker.kill()
        await _said(client, "worker.lost", worker="w1")
        (row,) = await cli.json("workers")
        assert (row["state"], row["ended"]) == ("offline", "lost")
        assert row["reason"].startswith("no heartbeat")


class TestDrained:
    async def test_it_finishes_hands_back_and_ends(self, cluster: Cluster, cli: Cli, tmp_path: Path) -> None:
        await cluster.leader(worker_ttl_s=TTL_S)
        client = await cluster.client()
        drained = await _worker(cluster, "drained", "--drain-s", "0.1")
        running = [await client.submit(wait_for_file, str(tmp_path / "go")) for _ in range(2)]
        for each in running:
            await _said(client, "task.started", id=each.id)
        draining = await cli.start("drain", "drained", "--wait", "--reason", "new kernel")
        await _said(client, "worker.draining")
        await _worker(cluster, "stays")
        assert (await (await client.submit(whoami)).result(SOON_S))["worker"] == "stays"
        assert draining.stderr is not None
        async with asyncio.timeout(SOON_S):
            while await draining.stderr.readline() != b"drained still runs 2\n":
                assert not draining.stderr.at_eof(), "it never said so"
        waits = draining.returncode is None
        assert drained.running
        assert waits
        (tmp_path / "go").touch()
        out, _ = await asyncio.wait_for(draining.communicate(), SOON_S)
        assert (draining.returncode, out.decode()) == (0, "drained has left\n")
        assert await drained.ended() == 0
        found = await audit(client)
        for each in running:
            assert found.about(each.id).count("task.assigned") == 1, "it had the time it took"
            assert await each.result(SOON_S) == "seen"
        asked: Any = found.of_kind("worker.drain_requested")[0].event
        assert (asked.worker, asked.reason) == ("drained", "new kernel")
        assert not found.of_kind("worker.lost")

    async def test_who_is_not_there_cannot_be_drained(self, cluster: Cluster, cli: Cli) -> None:
        await cluster.leader()
        client = await cluster.client()
        worker = await _worker(cluster, "w1")
        _, err = await cli.run("drain", "nobody", status=3)
        assert "no worker is called 'nobody'; 'agentflow workers' lists them" in err
        await cli.run("drain", "w1", "--wait")
        assert await worker.ended() == 0
        _, err = await cli.run("drain", "w1", status=3)
        assert "it left" in err
        await _worker(cluster, "old", "--level", "1")
        _, err = await cli.run("drain", "old", status=5)
        assert "the worker knows 1" in err
        assert len((await audit(client)).of_kind("worker.drain_requested")) == 1

    def test_the_one_who_started_it_does_not_start_it_again(self, tmp_path: Path) -> None:
        up = Up(tmp_path, "--workers", "2")
        try:
            up.run("drain", "worker-1", "--wait")
            said = up.process.stderr
            assert said is not None
            assert "worker-1 was drained: it is not started again" in said.readline()
            states = {row["name"]: row["state"] for row in up.lines("workers")}
            assert states == {"worker-1": "offline", "worker-2": "active"}
        finally:
            assert up.stop() == 0


async def test_a_task_is_handed_over_with_the_lock_it_wants(cluster: Cluster, cli: Cli) -> None:
    await cluster.leader()
    await cluster.worker()
    out, _ = await cli.run("submit", "--lock", "stock", "--shell", "echo under $AGENTFLOW_LOCK", "--wait")
    assert out == "under stock\n"


class TestQuarantine:
    async def _kill_until_given_up(
        self, cluster: Cluster, client: agentflow.Client, task_id: str, folder: Path, lives: int
    ) -> None:
        for attempt in range(1, lives + 1):
            worker = await _worker(cluster, f"w{attempt}")
            await _said(client, "task.started", id=task_id, attempt=attempt)
            (folder / f"kill.{attempt}").touch()
            await worker.ended()
            await _said(client, "worker.lost", worker=f"w{attempt}")
        await _said(client, "task.quarantined", id=task_id)

    async def test_a_task_that_kills_is_given_up_and_can_be_handed_over_again(
        self, cluster: Cluster, cli: Cli, tmp_path: Path
    ) -> None:
        await cluster.leader(worker_ttl_s=1.5, policy=Policy(losses_max=2))
        client = await cluster.client()
        killer = await client.submit_task(
            TaskSubmitted(function="kill_worker", args=[str(tmp_path), 2], title="Deadly")
        )
        harmless = await client.shell("true", id="harmless")
        await self._kill_until_given_up(cluster, client, killer.id, tmp_path, 2)
        (listed,) = await cli.json("quarantine")
        assert (listed["id"], listed["workers_lost"]) == (killer.id, ["w1", "w2"])
        assert listed["runs"] == {"kind": "function", "what": "kill_worker"}
        (shown,) = await cli.json("quarantine", "show", killer.id)
        assert shown["submission"]["args"] == [str(tmp_path), 2]
        assert [each["outcome"] for each in shown["attempts"]] == ["lost", "lost"]
        text, _ = await cli.run("quarantine", "show", killer.id)
        assert "2 workers were lost while they ran it" in text
        await _worker(cluster, "w3")
        await harmless.outcome(SOON_S)
        _, err = await cli.run("quarantine", "requeue", killer.id, "harmless", status=5)
        assert "harmless is completed, not quarantined" in err
        await cli.run("quarantine", "requeue", "nobody", status=3)
        (requeued,) = await cli.json("quarantine", "requeue", "--all")
        assert requeued["id"] == killer.id
        assert await client.task(requeued["requeued_as"]).result(SOON_S) == "w3"
        (task,) = await cli.json("task", requeued["requeued_as"])
        assert task["title"] == f"Deadly (requeued from {killer.id})"
        assert (await cli.json("quarantine"))[0]["requeued_as"] == [requeued["requeued_as"]]
        assert await cli.json("quarantine", "requeue", "--all") == []

    async def test_a_workflows_task_takes_the_results_it_was_given_along(
        self, cluster: Cluster, cli: Cli, tmp_path: Path
    ) -> None:
        await cluster.leader(worker_ttl_s=1.5, policy=Policy(losses_max=1))
        client = await cluster.client()
        flow = agentflow.Workflow(id="flow")
        flow.add(kill_worker, flow.shell("where", f"echo {tmp_path}"), 1)
        await client.submit_workflow(flow)
        await self._kill_until_given_up(cluster, client, "flow/kill_worker", tmp_path, 1)
        await _worker(cluster, "heir")
        out, _ = await cli.run("quarantine", "requeue", "flow/kill_worker")
        old, _, new = out.split()
        assert old == "flow/kill_worker"
        assert await client.task(new).result(SOON_S) == "heir"
