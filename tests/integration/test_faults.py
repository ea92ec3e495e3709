"""Faults: servers and nodes killed, paused and cut off while tasks run.

Whatever happens, every task ends, with exactly one outcome recorded, and none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import frames, wire
from agentflow.bus import _PAUSE_S_MAX, Bus
from agentflow.client.operating import drain_worker
from agentflow.events import Policy, TaskSubmitted
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Fence, Frame, Reason, Refused
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests.app import add, add_in_thread, wait_for_file, whoami
from tests.cluster import Audit, Cluster, all_completed, audit
from tests.eventually import eventually
from tests.faultproxy import FaultProxy

SOON_S = 30.0
MANY = 5_000
HERD = 200
GROWN = 6
"""Attempts after which the pauses between them are the longest."""
TICK_S = 0.1


async def _all_end(client: agentflow.Client, handles: Sequence[agentflow.Handle[Any]]) -> Audit:
    """All end within time; what the log says of it."""
    found = await all_completed(client, handles, within_s=SOON_S)
    assert not found.state.tasks
    return found


async def _progress(client: agentflow.Client, count: int) -> None:
    """Wait until so many tasks have completed."""

    async def reached() -> bool:
        return len((await audit(client)).of_kind("task.completed")) >= count

    with contextlib.suppress(agentflow.Disconnected):
        await eventually(reached)


class TestServer:
    async def test_killed_and_started_again_while_tasks_run(self, cluster: Cluster) -> None:
        await cluster.leader()
        for name in ("w1", "w2"):
            await cluster.worker(name=name)
        client = await cluster.client()
        submitting = asyncio.create_task(client.submit_many(add_in_thread, [(n, 1) for n in range(MANY)]))
        for _ in range(3):
            await asyncio.sleep(random.uniform(0.05, 0.2))
            await cluster.server.restart()
        handles = await asyncio.wait_for(submitting, SOON_S)
        await _all_end(client, handles)
        assert await handles[-1].result() == MANY

    async def test_away_for_longer_than_every_lease(self, cluster: Cluster) -> None:
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(500)])
        await cluster.server.kill()
        late = asyncio.create_task(client.submit(add, 1, 2))
        await asyncio.sleep(2.5)  # the lease lives 1 s, workers 2 s
        assert not late.done()
        await cluster.server.start()
        handles.append(await asyncio.wait_for(late, SOON_S))
        found = await _all_end(client, handles)
        assert not found.of_kind("worker.lost"), "silence counts only while the leader itself could hear"

    @pytest.mark.parametrize(
        "kind", ["task.submitted", "task.assigned", "task.started", "task.completed", "worker.draining"]
    )
    async def test_killed_while_this_is_said(self, cluster: Cluster, kind: str) -> None:
        """Whatever was just being written, what was acknowledged comes to its end."""
        await cluster.leader()
        for name in ("leaving", "staying"):
            await cluster.worker(name=name)
        client = await cluster.client()
        killed = asyncio.create_task(_restart_at(cluster, kind))
        submitting = asyncio.create_task(client.submit_many(add_in_thread, [(n, 1) for n in range(MANY)]))
        slow = await asyncio.gather(*(client.shell("sleep 0.3") for _ in range(8)))
        await drain_worker(client, "leaving")
        handles = [*slow, *await asyncio.wait_for(submitting, SOON_S)]
        await asyncio.wait_for(killed, SOON_S)
        found = await _all_end(client, handles)
        assert [logged.actor for logged in found.of_kind("worker.draining")] == ["leaving"]


async def _restart_at(cluster: Cluster, kind: str) -> None:
    """Kill the server as soon as the first event of that kind is in the log, and start it again."""
    async with (
        Bus(cluster.url, name="watch") as bus,
        JetStreamLog(bus, "default") as log,
        contextlib.aclosing(log.follow(0, subjects=[wire.event("default", kind, "*")])) as said,
    ):
        await anext(said)
    await cluster.server.restart()


class TestHerd:
    async def test_all_who_lost_the_server_come_back_one_by_one(self, cluster: Cluster) -> None:
        """Each waits a random while of its own, so that a server that returns is not run over."""
        proxy = await cluster.proxy()
        back: list[float] = []
        async with AsyncExitStack() as stack:
            buses = [Bus(proxy.url, name=f"one of many {number}") for number in range(HERD)]
            await asyncio.gather(*map(stack.enter_async_context, buses))
            for bus in buses:
                bus.watch(lambda connected: back.append(time.monotonic()) if connected else None)
            await cluster.server.kill()
            await eventually(lambda: not any(bus.connected for bus in buses))
            knocks = proxy.connections
            await eventually(lambda: proxy.connections > knocks + GROWN * HERD)
            await cluster.server.start()
            await eventually(lambda: all(bus.connected for bus in buses))
        assert len(back) == HERD, "each came back once, and stayed"
        ticks = Counter(int((instant - back[0]) / TICK_S) for instant in back)
        assert max(ticks.values()) < HERD / 2, ticks
        tenth = HERD // 10
        assert back[-tenth] - back[tenth] > _PAUSE_S_MAX / 4, ticks


class TestConnections:
    @pytest.mark.parametrize("victim", ["worker", "client", "master"])
    async def test_cut_at_any_moment(self, cluster: Cluster, victim: str) -> None:
        proxy = await cluster.proxy()
        urls = dict.fromkeys(("worker", "client", "master"), cluster.url) | {victim: proxy.url}
        await cluster.leader(url=urls["master"])
        await cluster.worker(url=urls["worker"])
        client = await cluster.client(url=urls["client"])
        submitting = asyncio.create_task(client.submit_many(add_in_thread, [(n, 1) for n in range(MANY)]))
        for _ in range(6):
            await asyncio.sleep(random.uniform(0.02, 0.3))
            proxy.cut()
        await _all_end(client, await asyncio.wait_for(submitting, SOON_S))

    @pytest.mark.parametrize("victim", ["worker", "client", "master"])
    async def test_acknowledgements_lost(self, cluster: Cluster, victim: str) -> None:
        """What was written arrived; the writer never hears of it, and writes it again."""
        proxy = await cluster.proxy()
        urls = dict.fromkeys(("worker", "client", "master"), cluster.url) | {victim: proxy.url}
        await cluster.leader(url=urls["master"])
        await cluster.worker(url=urls["worker"])
        client = await cluster.client(url=urls["client"])
        submitting = asyncio.create_task(client.submit_many(add_in_thread, [(n, 1) for n in range(2_000)]))
        for _ in range(3):
            await asyncio.sleep(random.uniform(0.02, 0.1))
            proxy.drop_answers()
            await _some_dropped(proxy)
            proxy.heal()
        found = await _all_end(client, await asyncio.wait_for(submitting, SOON_S))
        assert len(found.of_kind("task.submitted")) == 2_000, "nothing was stored twice"

    async def test_a_worker_cut_off_is_lost_and_what_it_says_later_does_not_count(
        self, cluster: Cluster, tmp_path: Path
    ) -> None:
        await cluster.leader(worker_ttl_s=0.6)
        proxy = await cluster.proxy()
        isolated = await cluster.worker(name="isolated", url=proxy.url)
        client = await cluster.client()
        handle = await client.submit(wait_for_file, str(tmp_path / "go"))
        await _said(client, "task.started")
        proxy.refuse()
        await cluster.worker(name="other")
        await _said(client, "worker.lost")
        (tmp_path / "go").touch()
        assert await handle.result(SOON_S) == "seen"
        proxy.heal()
        before = isolated._incarnation
        await eventually(lambda: isolated._incarnation != before)
        await eventually(isolated._writer._idle.is_set)
        found = await audit(client)
        assert found.outcomes()[handle.id] == ["task.completed"]
        assert found.state.superseded >= 1


async def _some_dropped(proxy: FaultProxy) -> None:
    """Until an answer was swallowed, or all is done and nothing is said any more."""
    before = proxy.dropped_bytes
    with contextlib.suppress(AssertionError):
        await eventually(lambda: proxy.dropped_bytes > before, within_s=0.5)


async def _said(client: agentflow.Client, kind: str, times: int = 1) -> None:
    async def said() -> bool:
        return len((await audit(client)).of_kind(kind)) >= times

    await eventually(said)


class TestMasters:
    async def test_another_takes_over_from_one_that_was_killed(self, cluster: Cluster) -> None:
        first = await cluster.process("master", "--name", "first", "--lease-ttl-s", "1")
        client = await cluster.client()
        await _said(client, "leader.elected")
        second = await cluster.master(name="second")
        await cluster.worker()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(MANY)])
        await _progress(client, 200)
        await first.kill()
        await eventually(lambda: second.leading)
        found = await _all_end(client, handles)
        elections: list[Any] = [logged.event for logged in found.of_kind("leader.elected")]
        assert [event.master for event in elections] == ["first", "second"]

    async def test_killed_again_and_again(self, cluster: Cluster) -> None:
        await cluster.worker()
        client = await cluster.client()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(MANY)])
        for number in range(3):
            master = await cluster.process("master", "--name", f"m{number}", "--lease-ttl-s", "1")
            await _said(client, "leader.elected", number + 1)
            await asyncio.sleep(random.uniform(0.0, 0.2))
            await master.kill()
        await cluster.leader()
        await _all_end(client, handles)

    async def test_one_that_was_paused_finds_itself_deposed(self, cluster: Cluster) -> None:
        paused = await cluster.process("master", "--name", "paused", "--lease-ttl-s", "1")
        client = await cluster.client()
        await _said(client, "leader.elected")
        await cluster.worker()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(1_000)])
        await _progress(client, 100)
        paused.send(signal.SIGSTOP)
        second = await cluster.master(name="second")
        await eventually(lambda: second.leading)
        handles += await client.submit_many(add_in_thread, [(n, 1) for n in range(1_000)])
        paused.send(signal.SIGCONT)
        found = await _all_end(client, handles)
        assert found.state.leader == "second"
        assert paused.running
        epochs = [logged.decision.epoch for logged in found.events if logged.decision is not None]
        assert epochs == sorted(epochs), "no write of a deposed leader was stored"
        # It follows, and leads again when it is its turn.
        await second.__aexit__(None, None, None)
        await _said(client, "leader.elected", 3)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert (await audit(client)).state.leader == "paused"

    async def test_the_fence_refuses_who_was_deposed(self, cluster: Cluster) -> None:
        first = await cluster.leader(name="first")
        client = await cluster.client()
        leader = first.seats["default"]._leader
        assert leader is not None
        fence = Fence(wire.elected("default"), leader.elected_seq)
        subject = wire.event("default", "worker.lost", "first")
        headers = {wire.DECISION: "1 1 1 1"}
        data = b'[{"worker":"nobody","incarnation":1}]'
        assert isinstance(await client.log.append(Frame(subject, data, "a.1", headers), fence=fence), Done)
        noise = Frame(wire.elected("default"), b"noise", "noise.1")
        assert isinstance(await client.log.append(noise), Done)
        refused = await client.log.append(Frame(subject, data, "a.2", headers), fence=fence)
        assert isinstance(refused, Refused)
        assert refused.reason is Reason.FENCED

    async def test_two_that_fight_decide_nothing_twice(self, cluster: Cluster) -> None:
        """The lease is taken away from under whoever has it, time and again."""
        await cluster.master(name="one")
        await cluster.master(name="two")
        await cluster.worker()
        client = await cluster.client()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(2_000)])
        for number in range(8):
            await client.bus.js_api("STREAM.PURGE.KV_AF_LEASES", b"", 5.0)
            await asyncio.sleep(random.uniform(0.05, 0.3))
            data = b"noise %d" % number
            await client.log.append(Frame(wire.elected("default"), data, f"noise.{number}"))
        found = await _all_end(client, handles)
        assigned = [
            (event.id, event.attempt)
            for logged in found.of_kind("task.assigned")
            if (event := _applied(found, logged)) is not None
        ]
        assert len(assigned) == len(set(assigned))


def _applied(found: Audit, logged: Any) -> Any:
    applied = str(found.verdicts[logged.seq, logged.index].kind) == "applied"
    return logged.event if applied else None


class TestWorkers:
    @pytest.mark.parametrize(("losses_max", "suspect"), [(3, 0), (2, 2)], ids=["with_lives_left", "at_stake"])
    async def test_killed_with_running_scripts(
        self, cluster: Cluster, tmp_path: Path, losses_max: int, suspect: int
    ) -> None:
        """What had begun starts again; apart from others only if the next loss would be its last."""
        await cluster.leader(worker_ttl_s=1.0, policy=Policy(losses_max=losses_max))
        process = await cluster.process("worker", "--name", "victim", "--slots", "2", "--ahead", "0")
        client = await cluster.client()
        script = (
            f"test -e {tmp_path}/go && exit 0; echo $$ > {tmp_path}/$AGENTFLOW_TASK_ID.sh; "
            f"sleep 300 & echo $! > {tmp_path}/$AGENTFLOW_TASK_ID.child; wait"
        )
        handles = [await client.shell(script) for _ in range(4)]
        await _said(client, "task.started", 2)
        await eventually(lambda: len(list(tmp_path.glob("*.child"))) == 2)
        await process.kill()
        pids = [int(path.read_text()) for path in tmp_path.iterdir()]
        (tmp_path / "go").touch()
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        await cluster.worker(name="survivor")
        found = await _all_end(client, handles)
        lost: Any = found.of_kind("worker.lost")[0].event
        assert lost.worker == "victim"
        again = [logged.event for logged in found.of_kind("task.assigned") if logged.actor == "survivor"]
        assert sorted(event.attempt for event in again) == [1, 1, 2, 2]  # type: ignore[union-attr]
        suspects = [event for event in again if event.suspect]  # type: ignore[union-attr]
        assert len(suspects) == suspect
        for event in suspects:
            kinds = found.about(event.id)  # type: ignore[union-attr]
            assert kinds.index("task.started") < kinds.index("task.completed")

    async def test_killed_again_and_again_with_many_short_tasks(self, cluster: Cluster) -> None:
        await cluster.leader(worker_ttl_s=0.8)
        client = await cluster.client()
        handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(3_000)])
        for number in range(2):
            process = await cluster.process("worker", "--app", "tests.app", "--name", f"v{number}")
            await _progress(client, 100 * (number + 1))
            await process.kill()
        await cluster.worker(name="survivor")
        await _all_end(client, handles)

    async def test_a_task_that_kills_its_worker_is_quarantined_and_the_others_are_not(
        self, cluster: Cluster
    ) -> None:
        await cluster.leader(worker_ttl_s=0.5, policy=Policy(losses_max=2))
        client = await cluster.client()
        # The worker is the parent of the script's process group leader.
        killer = await client.shell("kill -9 $PPID; sleep 5", priority="urgent")
        others = await client.submit_many(whoami, [()] * 50)
        for number in range(8):
            worker = await cluster.process(
                "worker", "--app", "tests.app", "--name", f"v{number}", "--slots", "2"
            )
            ends: list[asyncio.Task[Any]] = [
                asyncio.create_task(worker.ended()),
                asyncio.create_task(killer.outcome()),
            ]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            over = killer.done
            for each in ends:
                each.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
            if over:
                break
        with pytest.raises(agentflow.TaskFailed, match="quarantined: losses"):
            await killer.result(SOON_S)
        for handle in others:
            assert (await handle.outcome(SOON_S)).state == "completed"


class TestAlone:
    async def test_everything_restarts_and_the_log_is_all_there_is(self, cluster: Cluster) -> None:
        async with (
            Master(MasterConfig(url=cluster.url, lease_ttl_s=1)),
            Worker(WorkerConfig(url=cluster.url, drain_s=0.1)),
            agentflow.Client(cluster.url) as client,
        ):
            flow = agentflow.Workflow(id="long")
            first = flow.add(add, 1, 2)
            slow = flow.shell(
                "slow", 'test "$AGENTFLOW_ATTEMPT" -gt 1 || sleep 60; echo $X', env={"X": first}
            )
            flow.add(whoami)
            flow.shell("last", "echo $X", env={"X": slow})
            handle = await client.submit_workflow(flow)
            assert await handle.task("add").result(SOON_S) == 3
            await _said(client, "task.started")
            await client.submit_task(TaskSubmitted(id="waiting", shell="echo $X", env={"X": "y" * 5_000}))
        await cluster.server.restart()
        await cluster.leader()
        await cluster.worker(name="w2")
        client = await cluster.client()
        outcome = await client.task("long").outcome(SOON_S)
        assert outcome.state == "completed"
        assert await client.task("long/last").result(SOON_S) == "3"
        assert len(await client.task("waiting").result(SOON_S)) == 5_000
        assert frames.decode_any(outcome.result) is None
