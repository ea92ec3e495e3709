"""Workers as processes: held up, paused, killed, cut off; what becomes of them and of their tasks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

import agentflow
from agentflow_nodes.worker.keeper import goes_on
from tests.app import add, whoami
from tests.cluster import Audit, Cluster, Process, audit
from tests.eventually import eventually
from tests.hard import hold_async, hold_in_thread, journal, match_wildly

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
    children = psutil.Process(worker.pid).children()
    return [child for child in children if any("keeper" in word for word in child.cmdline())]


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
        lines_of = (line.split() for line in (tmp_path / "pids").read_text().splitlines())
        pids = {attempt: int(pid) for pid, attempt in lines_of}
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
