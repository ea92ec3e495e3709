"""Masters against a real server: leading, standing by, being disturbed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import agentflow
from agentflow import frames, wire
from agentflow.ending import end_tasks
from agentflow.errors import LogGone
from agentflow.events import LeaderElected, Policy
from agentflow.limits import FRAME_BYTES_MAX
from agentflow.log.port import Done, Frame
from agentflow_nodes.master import leader as leading
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from tests.app import add, sleep_async
from tests.cluster import Cluster, audit
from tests.eventually import eventually

SOON_S = 15.0


async def test_it_catches_up_before_it_is_ready(cluster: Cluster) -> None:
    client = await cluster.client()
    handles = await client.submit_many(add, [(n, n) for n in range(3_000)])
    master = await cluster.master()
    assert len(master.seats["default"].follower.state.tasks) == 3_000
    await cluster.worker()
    assert [await handle.result(SOON_S) for handle in handles] == [2 * n for n in range(3_000)]
    assert not master.seats["default"].follower._own, "nothing is remembered of frames that were read back"


async def test_one_leads_and_another_takes_over_when_it_leaves(cluster: Cluster) -> None:
    async with Master(MasterConfig(url=cluster.url, name="first", lease_ttl_s=1)) as first:
        await eventually(lambda: first.leading)
        second = await cluster.master(name="second")
        client = await cluster.client()
        await cluster.worker()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert not second.leading
    await eventually(lambda: second.leading)
    assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
    elections: list[Any] = [logged.event for logged in (await audit(client)).of_kind("leader.elected")]
    assert [(event.epoch, event.master) for event in elections] == [(1, "first"), (2, "second")]


async def test_its_policy_holds(cluster: Cluster) -> None:
    await cluster.leader(policy=Policy(strategy="round_robin", ahead_ms=5))
    client = await cluster.client()

    async def changed() -> bool:
        return (await audit(client)).state.policy.strategy == "round_robin"

    await eventually(changed)
    assert (await audit(client)).state.policy.version == 2


async def test_it_stops_when_its_log_is_gone(cluster: Cluster) -> None:
    master = await cluster.leader()
    client = await cluster.client()
    await client.bus.js_api("STREAM.DELETE.AF_default", b"", 5.0)
    await cluster.client(name="second")  # creates it anew
    with pytest.raises(LogGone):
        await asyncio.wait_for(master.ended(), SOON_S)


async def test_of_a_namespace_that_is_gone_nothing_is_left_and_it_may_come_again(cluster: Cluster) -> None:
    master = await cluster.master(namespaces=("default",), discover=True)
    client = await cluster.client()
    listens: list[int] = []
    ended = asyncio.create_task(master.ended())
    for name in ("first", "second"):
        await cluster.client(namespace="shop", name=name)  # creates the log
        await eventually(lambda: "shop" in master.seats and master.seats["shop"].leading)
        listens.append(len(master.bus._subscriptions))
        await client.bus.js_api("STREAM.DELETE.AF_shop", b"", 5.0)
        await eventually(lambda: "shop" not in master.seats)
    assert listens[0] == listens[1]
    await eventually(lambda: not any("shop" in task.get_name() for task in master._tasks.running))
    assert not ended.done()
    await end_tasks(ended)


async def test_a_nearly_full_log_takes_outcomes_but_no_submissions(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "HOUSEKEEPING_S", 0.05)
    master = await cluster.leader()
    await cluster.worker()
    client = await cluster.client()
    running = await client.submit(sleep_async, 1.0)
    used = (await client.log.identity()).bytes
    await _limit(client, int(used * 1.1) + 50_000)
    ballast = [
        await client.shell("true", title="x" * 4_000, needs=agentflow.Needs(gpus=9)) for _ in range(11)
    ]
    await eventually(lambda: not master.seats["default"].follower.state.policy.accepting)
    refused = await client.submit(add, 1, 2)
    with pytest.raises(agentflow.SubmissionRejected) as raised:
        await refused.result(SOON_S)
    assert raised.value.reason == "overloaded"
    assert await running.result(SOON_S) == "awake"
    await ballast[0].cancel()
    with pytest.raises(agentflow.TaskCancelled):
        await ballast[0].result(SOON_S)
    await _limit(client, -1)
    await _limit(client, used * 100 + 1_000_000)
    await eventually(lambda: master.seats["default"].follower.state.policy.accepting)
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3


async def _limit(client: agentflow.Client, bytes_max: int) -> None:
    info = frames.decode_any(await client.bus.js_api("STREAM.INFO.AF_default", b"", 5.0))
    config = info["config"] | {"max_bytes": bytes_max}
    answer = frames.decode_any(
        await client.bus.js_api("STREAM.UPDATE.AF_default", frames.encode(config), 5.0)
    )
    assert "error" not in answer, answer


class TestServices:
    async def test_only_the_leader_answers(self, cluster: Cluster) -> None:
        await cluster.master(name="one")
        await cluster.master(name="two")
        await cluster.worker()
        client = await cluster.client()
        answers: list[bytes] = []
        await client.bus.subscribe("answers", lambda _subject, data, _reply, _headers: answers.append(data))
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        client.bus._open().publish(wire.service("default", "status"), b'{"ids": ["x"]}', "answers")
        client.bus._open().publish(wire.service("default", "status"), b"nonsense", "answers")
        client.bus._open().publish(wire.service("default", "status"), b'{"ids": ["y"]}')
        await eventually(lambda: len(answers) == 2)
        status, error = map(json.loads, answers)
        assert status["statuses"] == [{"id": "x", "state": "unknown"}]
        assert "expected" in error["error"]

    async def test_the_state_of_tasks_and_workflows(self, cluster: Cluster) -> None:
        await cluster.leader()
        client = await cluster.client()
        flow = agentflow.Workflow("f")
        flow.add(add, flow.add(add, 1, 1), 1)
        handle = await client.submit_workflow(flow)

        async def state(*wanted: str) -> list[tuple[str, bool]]:
            return [(status.state, status.workflow) for status in (await client.status(wanted)).statuses]

        tasks = [f"{handle.id}/add", f"{handle.id}/add-2"]

        async def folded() -> bool:
            return await state(handle.id) == [("running", True)]

        await eventually(folded)
        assert await state(*tasks, "other") == [("ready", False), ("pending", False), ("unknown", False)]
        await cluster.worker()
        await handle.result(SOON_S)
        assert await state(handle.id, *tasks) == [
            ("completed", True),
            ("completed", False),
            ("completed", False),
        ]
        assert len((await client.status([f"no-{n}" for n in range(3_500)])).statuses) == 3_500

    async def test_the_queue(self, cluster: Cluster) -> None:
        await cluster.leader()
        client = await cluster.client()
        await client.submit_many(add.options(priority="high"), [(1, 1)] * 5)
        await client.shell("true", needs=agentflow.Needs(gpus=1), priority=7)

        async def queue() -> Any:
            found = json.loads(await client.bus.request(wire.service("default", "queue"), b"", 5.0))
            return found if found["open"] == 6 else None

        found: Any = await eventually(queue)
        assert (found["ready"], found["running"]) == (6, 0)
        assert found["by_priority"] == {"750": 5, "7": 1}


class TestDisturbances:
    """What others may put onto the subject that fences the leader."""

    async def test_noise_on_the_elected_subject(self, cluster: Cluster) -> None:
        master = await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        for number, data in enumerate((b"noise", b'{"epoch": 9, "master": "x"}', b'[{"epoch": "2"}]')):
            done = await client.log.append(Frame(wire.elected("default"), data, f"noise.{number}"))
            assert isinstance(done, Done)
            assert await (await client.submit(add, number, 2)).result(SOON_S) == number + 2
        assert master.leading
        found = await audit(client)
        assert found.state.epoch == 4
        assert found.state.quarantined == 3

    async def test_an_acknowledgement_sent_there_by_a_reply_subject(self, cluster: Cluster) -> None:
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        subject = wire.event("default", "task.submitted", "intruder")
        client.bus._open().publish(subject, b'{"shell": "true"}', wire.elected("default"))
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7

        async def again() -> bool:
            return (await audit(client)).state.epoch == 2

        assert await (await client.submit(add, 5, 6)).result(SOON_S) == 11
        await eventually(again)

    async def test_an_election_by_a_stranger(self, cluster: Cluster) -> None:
        master = await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        data = frames.encode([LeaderElected(epoch=2, master="stranger")])
        assert isinstance(await client.log.append(Frame(wire.elected("default"), data, "stranger.1")), Done)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        await eventually(lambda: master.leading)
        assert (await audit(client)).state.leader == "master"

    async def test_decisions_of_an_earlier_epoch_count_nothing(self, cluster: Cluster) -> None:
        await cluster.leader()
        client = await cluster.client()
        handle = await client.submit(add, 1, 2)
        subject = wire.event("default", "task.cancelled", "master")
        data = frames.encode([{"id": handle.id}])
        for number, headers in enumerate((None, {wire.DECISION: "0 1 1 1"}, {wire.DECISION: "x"})):
            done = await client.log.append(Frame(subject, data, f"late.{number}", headers))
            assert isinstance(done, Done)
        await cluster.worker()
        assert await handle.result(SOON_S) == 3
        found = await audit(client)
        assert (found.state.superseded, found.state.quarantined) == (1, 2)

    async def test_a_decision_too_large_for_a_frame_fails_its_task_once(self, cluster: Cluster) -> None:
        """The assignment adds to what was submitted, which fills its frame to the last byte."""
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        data = b'{"shell":"' + "\N{GRINNING FACE}".encode() * 131_069 + b'"}'
        assert len(data) == FRAME_BYTES_MAX
        done = await client.log.append(Frame(wire.event("default", "task.submitted", "cli"), data, "large.1"))
        assert isinstance(done, Done)
        with pytest.raises(agentflow.TaskFailed, match="too_large"):
            await client.task(f"at-{done.seq}-0").result(SOON_S)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
