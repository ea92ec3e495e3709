"""The promises of the README, one test each, in its order and under its words.

`tests/unit/test_guarantees.py` sees that every promise has its test here and every test its
promise. Whatever is killed here is a process and is killed with SIGKILL; the servers are real.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any, Final

import pytest

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.events import EventRejected, LeaderElected, TaskSubmitted
from agentflow.log.port import Done, Frame, Refused, Unknown
from agentflow_nodes.cli.errors import Exit
from agentflow_nodes.worker.keeper import goes_on
from tests.acceptance.test_locks import LOCK, history, holder, one_waits, tokens
from tests.acceptance.test_replicas import PART, Site
from tests.app import add, add_in_thread, whoami
from tests.cluster import Audit, Cluster, Process, all_completed, audit
from tests.eventually import eventually
from tests.hard import journal
from tests.integration import test_faults
from tests.servers import NatsCluster, NatsServer

pytestmark = pytest.mark.timeout(180)

SOON_S: Final = 60.0


async def _worker(cluster: Cluster, name: str, *options: str) -> Process:
    apps = ("--app", "tests.app", "--app", "tests.hard")
    return await cluster.process("worker", "--name", name, "--slots", "2", *apps, *options)


async def _said(client: agentflow.Client, kind: str, **fields: Any) -> Audit:
    """Wait until the log holds an event of a kind with such fields; the log then."""

    async def there() -> Audit | None:
        found = await audit(client)
        for logged in found.of_kind(kind):
            if all(getattr(logged.event, name) == value for name, value in fields.items()):
                return found
        return None

    return await eventually(there, within_s=SOON_S)


async def _rejoined(client: agentflow.Client, name: str) -> None:
    """Wait until a worker of that name has joined a second time."""

    async def twice() -> bool:
        joined = (await audit(client)).of_kind("worker.joined")
        return len([logged for logged in joined if logged.actor == name]) > 1

    await eventually(twice, within_s=SOON_S)


# Tasks -----------------------------------------------------------------------------------


async def test_an_acknowledged_submission_is_never_lost(cluster: Cluster) -> None:
    client = await cluster.client()
    handles: list[agentflow.Handle[Any]] = []
    for number in range(3):
        handles += await client.submit_many(add, [(each, number) for each in range(200)])
        await cluster.server.kill()  # in the instant after the acknowledgement
        await cluster.server.start()
    await cluster.leader()
    await _worker(cluster, "w1")
    await all_completed(client, handles, within_s=SOON_S)
    assert await handles[-1].result() == 199 + 2


async def test_a_task_may_start_more_than_once_exactly_one_outcome_is_recorded(
    cluster: Cluster, tmp_path: Path
) -> None:
    await cluster.leader(worker_ttl_s=1.5)
    client = await cluster.client()
    lines, go = tmp_path / "journal", tmp_path / "go"
    victim = await _worker(cluster, "victim")
    handle = await client.submit(journal, str(lines), str(go))
    await _said(client, "task.started", id=handle.id, attempt=1)
    await victim.kill()
    await _worker(cluster, "heir")
    await _said(client, "task.started", id=handle.id, attempt=2)
    go.touch()
    found = await all_completed(client, [handle], within_s=SOON_S)
    assert lines.read_text().splitlines() == ["1 victim", "2 heir"]
    assert found.about(handle.id).count("task.completed") == 1


async def test_a_superseded_attempt_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader(worker_ttl_s=1.5)
    client = await cluster.client()
    lines, go = tmp_path / "journal", tmp_path / "go"
    paused = await _worker(cluster, "paused")
    handle = await client.submit(journal, str(lines), str(go))
    await _said(client, "task.started", id=handle.id, attempt=1)
    paused.send(signal.SIGSTOP)
    await _said(client, "worker.lost", worker="paused")
    await _worker(cluster, "other")
    await _said(client, "task.started", id=handle.id, attempt=2)
    go.touch()
    assert await handle.result(SOON_S) == "other"
    paused.send(signal.SIGCONT)
    await _rejoined(client, "paused")
    found = await audit(client)
    late = [logged for logged in found.of_kind("task.completed", "task.failed") if logged.actor == "paused"]
    assert [str(found.verdicts[each.seq, each.index].kind) for each in late] == ["superseded"]
    assert found.outcomes()[handle.id] == ["task.completed"]
    assert await client.task(handle.id).result(SOON_S) == "other"


async def test_an_acknowledged_cancel_is_never_lost(cluster: Cluster, tmp_path: Path) -> None:
    client = await cluster.client()
    unwanted = await client.shell(f"touch {tmp_path}/ran")
    await unwanted.cancel("not needed")
    await cluster.server.kill()
    await cluster.server.start()
    await cluster.leader()
    await _worker(cluster, "w1")
    assert (await unwanted.outcome(SOON_S)).state == "cancelled"
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
    assert not (tmp_path / "ran").exists()


async def test_a_stopped_task_leaves_no_process_behind(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.leader()
    await _worker(cluster, "w1")
    client = await cluster.client()
    pids = tmp_path / "pids"
    handle = await client.shell(f"for run in '' setsid; do $run sleep 300 & echo $! >> {pids}; done; wait")
    await eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(map(goes_on, started))
    await handle.cancel()
    assert (await handle.outcome(SOON_S)).state == "cancelled"
    await eventually(lambda: not any(map(goes_on, started)))


async def test_a_task_that_kills_its_workers_is_given_up_those_beside_it_are_not(cluster: Cluster) -> None:
    killing = test_faults.TestWorkers()
    await killing.test_a_task_that_kills_its_worker_is_quarantined_and_the_others_are_not(cluster)


async def test_inside_one_priority_tasks_of_equal_demand_are_assigned_first_in_first_out(
    cluster: Cluster,
) -> None:
    client = await cluster.client()
    handles = [await client.submit(whoami) for _ in range(3)]
    handles += await client.submit_many(whoami, [()] * 50)
    await cluster.leader()
    await _worker(cluster, "w1")
    found = await all_completed(client, handles, within_s=SOON_S)
    assigned = [getattr(logged.event, "id", "") for logged in found.of_kind("task.assigned")]
    assert assigned == [handle.id for handle in handles]


# Masters and the log ---------------------------------------------------------------------


async def test_at_most_one_master_decides(cluster: Cluster) -> None:
    client = await cluster.client()
    paused = await cluster.process("master", "--name", "paused", "--lease-ttl-s", "1")
    await _said(client, "leader.elected", master="paused")
    await _worker(cluster, "w1")
    handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(1_000)])
    await _said(client, "task.assigned")
    paused.send(signal.SIGSTOP)
    await cluster.process("master", "--name", "second", "--lease-ttl-s", "1")
    await _said(client, "leader.elected", master="second")
    handles += await client.submit_many(add_in_thread, [(n, 1) for n in range(1_000)])
    paused.send(signal.SIGCONT)
    found = await all_completed(client, handles, within_s=SOON_S)
    elected = [logged.event for logged in found.of_kind("leader.elected")]
    epochs = [event.epoch for event in elected if isinstance(event, LeaderElected)]
    assert epochs == list(range(1, len(epochs) + 1)), "every epoch has one master"
    decided = [logged.decision.epoch for logged in found.events if logged.decision is not None]
    assert decided == sorted(decided), "nothing of a deposed leader is in the log"
    assert len(set(decided)) > 1


async def test_another_master_goes_on_where_a_dead_one_stopped(cluster: Cluster) -> None:
    client = await cluster.client()
    first = await cluster.process("master", "--name", "first", "--lease-ttl-s", "1")
    await _said(client, "leader.elected", master="first")
    second = await cluster.master(name="second")
    handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(2_000)])
    await _worker(cluster, "w1")
    await _said(client, "task.completed")
    await first.kill()
    await eventually(lambda: second.leading)
    handles += await client.submit_many(add_in_thread, [(n, 1) for n in range(100)])
    found = await all_completed(client, handles, within_s=SOON_S)
    assert [getattr(each.event, "master", "") for each in found.of_kind("leader.elected")] == [
        "first",
        "second",
    ]


async def test_what_one_actor_says_enters_the_log_in_the_order_said(cluster: Cluster) -> None:
    proxy = await cluster.proxy()
    client = await cluster.client(url=proxy.url)
    saying: list[asyncio.Task[Any]] = []
    for number in range(100):
        task = TaskSubmitted(id=f"task-{number}", shell="true")
        saying.append(asyncio.create_task(client.submit_task(task)))
        await asyncio.sleep(0)
        saying.append(asyncio.create_task(client.cancel(task.id)))
        if number % 30 == 15:
            await eventually(saying[number].done)
            proxy.cut()
    await asyncio.wait_for(asyncio.gather(*saying), SOON_S)
    found = await audit(client)
    in_log = [(each.kind, getattr(each.event, "id", "")) for each in found.events]
    assert in_log == [
        (kind, f"task-{number}")
        for number in range(100)
        for kind in ("task.submitted", "task.cancel_requested")
    ]


async def test_bad_input_stops_nothing_and_a_client_is_answered(cluster: Cluster) -> None:
    await cluster.leader()
    await _worker(cluster, "w1")
    client = await cluster.client()
    bad = [
        (wire.event("default", "task.submitted", "me"), b"\xff not JSON"),
        (wire.event("default", "task.submitted", "me"), b'[{"shell": 5}, {"shell": "true"}]'),
        (wire.event("default", "task.completed", "nobody"), b'{"id": "x"}'),
        (wire.event("default", "leader.elected", "epoch"), b'{"master": "me", "epoch": 9}'),
    ]
    for number, (subject, data) in enumerate(bad):
        assert isinstance(await client.log.append(Frame(subject, data, f"bad.{number}")), Done)
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3

    async def answered() -> bool:
        rejected = [each.event for each in (await audit(client)).of_kind("event.rejected")]
        return len([event for event in rejected if isinstance(event, EventRejected)]) == 2

    await eventually(answered, within_s=SOON_S)
    good = [ended for ended in (await audit(client)).outcomes().values() if ended == ["task.completed"]]
    assert len(good) == 2, "the good one in a bad frame ran, too"


async def test_a_lost_notice_costs_time_only(cluster: Cluster) -> None:
    await cluster.leader()
    await _worker(cluster, "w1")
    client = await cluster.client()
    notices = [each for each in client.bus._subscriptions.values() if each.subject.startswith("afn.")]
    assert notices
    for subscription in notices:
        subscription.end()
    handles = await client.submit_many(add, [(n, 1) for n in range(200)])
    assert [await handle.result(SOON_S) for handle in handles] == [n + 1 for n in range(200)]


async def test_a_log_that_is_not_the_one_it_was_halts_everything(cluster: Cluster) -> None:
    master = await cluster.process("master", "--name", "m1")
    worker = await _worker(cluster, "w1", "--drain-s", "0")
    client = await cluster.client()
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
    waiting = await client.shell("sleep 300")
    async with Bus(cluster.url, name="vandal") as vandal:
        await vandal.js_api(f"STREAM.DELETE.{wire.stream('default')}", b"", 5.0)
        assert await master.ended() == Exit.LOG_GONE
        assert await worker.ended() == Exit.LOG_GONE
        with pytest.raises(agentflow.LogGone):
            await waiting.outcome(SOON_S)
        info = await vandal.js_api(f"STREAM.INFO.{wire.stream('default')}", b"", 5.0)
        assert b"stream not found" in info, "nobody has made another in its place"


async def test_the_death_of_one_server_of_three_loses_nothing() -> None:
    async with NatsCluster() as servers, Site(servers, "one_of_three_dies") as site:
        await site.submit()
        leader = await site.leader()
        submitting = asyncio.create_task(site.submit())
        await leader.kill()
        await submitting
        await site.submit()
        await site.all_done()
        assert len(site.handles) == 3 * PART, "all of it was acknowledged"


async def test_a_minority_of_the_servers_acknowledges_nothing() -> None:
    async with NatsCluster() as servers, Site(servers, "minority") as site:
        await site.submit()
        first, second, _ = servers.servers
        await asyncio.gather(first.kill(), second.kill())
        subject = wire.event(site.namespace, "task.submitted", "cli")
        appended = await site.client.log.append(Frame(subject, b"[]", "alone.1"), timeout_s=2.0)
        assert isinstance(appended, Refused | Unknown)
        late = asyncio.create_task(site.submit())
        await asyncio.gather(first.start(), second.start())
        await late
        await site.all_done()


# Locks -----------------------------------------------------------------------------------


async def test_a_dead_holders_lock_goes_to_who_came_first(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        agentflow.Client(nats_server.url, name="next") as client,
        holder(nats_server, tmp_path / "journal") as killed,
    ):
        token = await killed.told("held")
        first = asyncio.create_task(client.lock(LOCK).acquire())
        await eventually(lambda: one_waits(client))
        second = asyncio.create_task(client.lock(LOCK).acquire())
        await eventually(lambda: _waiters(client, 2))
        killed.send(signal.SIGKILL)
        held = await asyncio.wait_for(first, SOON_S)
        assert not second.done()
        await held.release()
        last = await asyncio.wait_for(second, SOON_S)
        # Each of those who waited may say that it is lost.
        said = list(dict.fromkeys((event.kind, event.token) for event in await history(client)))
        assert said[:3] == [("lock.acquired", token), ("lock.lost", token), ("lock.acquired", held.token)]
        assert token < held.token < last.token


async def _waiters(client: agentflow.Client, count: int) -> bool:
    info = await client.lock_info(LOCK)
    return info is not None and len(info.waiters) == count


async def test_tokens_of_a_lock_rise_for_ever(nats_server: NatsServer, tmp_path: Path) -> None:
    found = []
    async with agentflow.Client(nats_server.url) as client:
        async with client.lock(LOCK, ttl_s=1) as held:
            found.append(held.token)
        async with holder(nats_server, tmp_path / "journal") as killed:
            found.append(await killed.told("held"))
        bucket = wire.bucket_stream(wire.lock_bucket("default"))
        await client.bus.js_api(f"STREAM.DELETE.{bucket}", b"", 5.0)
        for _ in range(2):
            async with client.lock(LOCK, ttl_s=1, wait_s=SOON_S) as held:
                found.append(held.token)
            await nats_server.restart()
    assert found == sorted(set(found))


async def test_what_refuses_lower_tokens_is_never_changed_by_an_earlier_holder(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    resource = tmp_path / "journal"
    async with (
        agentflow.Client(nats_server.url) as client,
        holder(nats_server, resource) as paused,
    ):
        first = await paused.told("wrote")
        async with holder(nats_server, resource, rounds=1) as later:
            await eventually(lambda: one_waits(client))
            paused.send(signal.SIGSTOP)
            second = await later.told("wrote")
            await later.told("released")
        paused.send(signal.SIGCONT)
        assert await paused.told("lost-refused") == first
    assert tokens(resource) == sorted(tokens(resource))
    assert set(tokens(resource)) == {first, second}


async def test_who_loses_a_lock_is_told(cluster: Cluster) -> None:
    proxy = await cluster.proxy()
    client = await cluster.client(url=proxy.url)
    told: list[agentflow.Held] = []

    async def work() -> None:
        async with client.lock(LOCK, ttl_s=1) as held:
            proxy.refuse()
            try:
                await asyncio.Event().wait()
            finally:
                told.append(held)

    with pytest.raises(agentflow.LockLost):
        await asyncio.wait_for(work(), SOON_S)
    (lost,) = told
    assert lost.lost.is_set()
    assert not lost.is_held()
    proxy.heal()
    other = await cluster.client(name="other")
    async with other.lock(LOCK, wait_s=SOON_S) as held:
        assert held.token > lost.token
