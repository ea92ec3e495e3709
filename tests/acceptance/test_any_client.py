"""Clients that know nothing of this project: a bare TCP socket, and another NATS library.

And what such clients may get wrong: all of it is quarantined with position and reason,
answered where it was a client's, and nothing stops.
"""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

import natsrpy
import pytest

import agentflow
from agentflow import frames, wire
from agentflow.events import TaskSubmitted, WorkflowTask
from agentflow.limits import FRAME_BYTES_MAX, FRAME_EVENTS_MAX, LEVEL
from agentflow.log.port import Done, Frame
from tests.app import add
from tests.cluster import Audit, Cluster, audit
from tests.eventually import eventually

SOON_S = 15.0


@pytest.fixture
async def running(cluster: Cluster) -> Cluster:
    """A cluster at work."""
    await cluster.leader()
    await cluster.worker()
    return cluster


class Socket:
    """The NATS protocol by hand: https://docs.nats.io/reference/reference-protocols/nats-protocol."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.received: list[tuple[str, Any]] = []

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        assert (await self._reader.readline()).startswith(b"INFO ")
        self._writer.write(b'CONNECT {"verbose":false,"pedantic":false}\r\nPING\r\n')
        assert await self._reader.readline() == b"PONG\r\n"
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.cancel()
        self._writer.close()

    def subscribe(self, subject: str, sid: int) -> None:
        self._writer.write(f"SUB {subject} {sid}\r\n".encode())

    def publish(self, subject: str | bytes, data: bytes, reply: str = "") -> None:
        named = subject.encode() if isinstance(subject, str) else subject
        self._writer.write(b"PUB " + named + f" {reply} {len(data)}\r\n".encode() + data + b"\r\n")

    async def heard(self, part: str) -> Any:
        """The first message whose subject holds a part."""
        return await eventually(
            lambda: next((data for subject, data in self.received if part in subject), None)
        )

    async def _read(self) -> None:
        while line := await self._reader.readline():
            if line.startswith(b"MSG "):
                _, subject, *_, size = line.split()
                data = (await self._reader.readexactly(int(size) + 2))[:-2]
                self.received.append((subject.decode(), json.loads(data)))
            elif line == b"PING\r\n":
                self._writer.write(b"PONG\r\n")


class TestSocket:
    async def test_it_submits_watches_and_learns_the_id(self, running: Cluster) -> None:
        async with Socket(running.server.port) as socket:
            socket.subscribe("af.default.>", 1)
            socket.subscribe("answers.*", 2)
            socket.publish("af.default.task.submitted.cli", b'{"shell": "echo hi"}', "answers.1")
            ack = await socket.heard("answers.1")
            completed = await socket.heard("task.completed")
        event = completed[0] if isinstance(completed, list) else completed
        assert event["id"] == f"at-{ack['seq']}-0"
        assert event["result"] == "hi"

    async def test_a_publish_without_a_reply_is_enough(self, running: Cluster) -> None:
        async with Socket(running.server.port) as socket:
            socket.subscribe("af.default.task.completed.*", 1)
            socket.publish("af.default.task.submitted.cli", b'[{"shell":"echo one"},{"argv":["echo","two"]}]')
            await socket.heard("task.completed")
        client = await running.client()

        async def both() -> bool:
            return len((await audit(client)).of_kind("task.completed")) == 2

        await eventually(both)
        found = await audit(client)
        results = {
            event.id: bytes(event.result)
            for logged in found.of_kind("task.completed")
            if (event := _any(logged.event))
        }
        seq = found.of_kind("task.submitted")[0].seq
        assert results == {f"at-{seq}-0": b'"one"', f"at-{seq}-1": b'"two"'}
        assert await client.task(f"at-{seq}-1").result(SOON_S) == "two"

    async def test_it_cancels(self, running: Cluster) -> None:
        async with Socket(running.server.port) as socket:
            socket.subscribe("af.default.>", 1)
            socket.subscribe("answers.*", 2)
            socket.publish("af.default.task.submitted.cli", b'{"id": "mine", "shell": "sleep 60"}')
            await socket.heard("task.started")
            socket.publish("af.default.task.cancel_requested.cli", b'{"id": "mine"}')
            cancelled = await socket.heard("task.cancelled")
            assert _first(cancelled)["id"] == "mine"
            socket.publish("af.default.task.cancel_requested.cli", b'{"id": "other"}')
            rejected = _first(await socket.heard("event.rejected"))
        assert (rejected["id"], rejected["client"], rejected["reason"]) == ("other", "cli", "unknown_id")

    async def test_a_workflow(self, running: Cluster) -> None:
        flow = {
            "id": "w1",
            "tasks": [
                {"task_id": "a", "shell": "echo 1"},
                {"task_id": "b", "shell": "echo $A", "env": {"A": {"$result": "a"}}, "dependencies": ["a"]},
            ],
        }
        async with Socket(running.server.port) as socket:
            socket.subscribe("af.default.workflow.completed.*", 1)
            socket.publish("af.default.workflow.submitted.cli", json.dumps(flow).encode())
            announced = _first(await socket.heard("workflow.completed"))
        assert announced == {"id": "w1", "state": "completed", "completed": 2}

    async def test_it_asks(self, running: Cluster) -> None:
        async with Socket(running.server.port) as socket:
            socket.subscribe("answers.*", 1)
            socket.publish("afq.default.status", b'{"ids": ["nothing"]}', "answers.1")
            assert (await socket.heard("answers.1"))["statuses"] == [{"id": "nothing", "state": "unknown"}]
            socket.publish("afq.default.queue", b"", "answers.2")
            assert (await socket.heard("answers.2"))["open"] == 0


def _first(data: Any) -> Any:
    return data[0] if isinstance(data, list) else data


def _any(event: Any) -> Any:
    return event


class TestAnotherLibrary:
    async def test_it_submits_watches_and_cancels(self, running: Cluster) -> None:
        nats = natsrpy.Nats(addrs=[running.url])
        await nats.startup()
        try:
            async with nats.subscribe("af.default.task.*.*") as events:
                kinds: list[str] = []

                async def until(kind: str) -> Any:
                    async for message in events:
                        kinds.append(message.subject.split(".")[3])
                        if kinds[-1] == kind:
                            return _first(json.loads(message.payload))
                    raise AssertionError("the subscription ended")

                answer = await nats.request("af.default.task.submitted.other", b'{"shell": "echo $((6*7))"}')
                wanted = f"at-{json.loads(answer.payload)['seq']}-0"
                completed = await asyncio.wait_for(until("completed"), SOON_S)
                assert (completed["id"], completed["result"]) == (wanted, "42")
                assert kinds == ["submitted", "assigned", "completed"]
                await nats.publish("af.default.task.submitted.other", b'{"id": "long", "shell": "sleep 60"}')
                await asyncio.wait_for(until("started"), SOON_S)
                await nats.publish("af.default.task.cancel_requested.other", b'{"id": "long"}')
                assert (await asyncio.wait_for(until("cancelled"), SOON_S))["id"] == "long"
        finally:
            await nats.shutdown()


# Bad input ---------------------------------------------------------------------------

SUBMIT = "task.submitted"
DEEP = b'{"function":"add","args":' + b"[" * 40 + b"]" * 40 + b"}"
BOTTOMLESS = b"[" * 100_000
GOOD = b'{"id":"good-%d","shell":"true"}'


def _dag(tasks: list[tuple[str, list[str]]]) -> bytes:
    made = [WorkflowTask(task_id=name, shell="true", dependencies=needs) for name, needs in tasks]
    return b'{"id":"dag","tasks":' + frames.encode(made) + b"}"


# What a client may send to the subject of a kind; what the whole message or its event is called then.
FROM_CLIENTS: list[tuple[str, str, bytes, str]] = [
    ("not JSON", SUBMIT, b"hello", "not_json"),
    ("nothing", SUBMIT, b"", "not_json"),
    ("cut off", SUBMIT, b'{"shell":"true"', "not_json"),
    ("not UTF-8", SUBMIT, b'{"shell":"\xff"}', "not_json"),
    ("NaN", SUBMIT, b'{"function":"add","args":[NaN]}', "not_json"),
    ("a number", SUBMIT, b"7", "not_a_frame"),
    ("an empty array", SUBMIT, b"[]", "not_a_frame"),
    ("wrong types", SUBMIT, b'{"shell":7}', "bad_type"),
    ("an infinite number", SUBMIT, b'{"function":"add","args":[1e400]}', "bad_number"),
    ("a huge integer", SUBMIT, b'{"function":"add","args":[9223372036854775808]}', "bad_number"),
    ("a lone surrogate", SUBMIT, b'{"shell":"\\ud800"}', "bad_text"),
    ("NUL", SUBMIT, b'{"shell":"a\\u0000b"}', "bad_text"),
    ("a key twice", SUBMIT, b'{"shell":"true","shell":"false"}', "duplicate_key"),
    ("deeply nested", SUBMIT, DEEP, "too_deep"),
    ("nested without end", SUBMIT, BOTTOMLESS, "too_deep"),
    ("too large", SUBMIT, b'{"shell":"' + b"x" * FRAME_BYTES_MAX + b'"}', "too_large"),
    ("too many", SUBMIT, b"[" + b",".join([b"{}"] * (FRAME_EVENTS_MAX + 1)) + b"]", "too_large"),
    ("nothing to run", SUBMIT, b"{}", "bad_value"),
    ("two things to run", SUBMIT, b'{"shell":"true","argv":["true"]}', "bad_value"),
    ("an unknown priority", SUBMIT, b'{"shell":"true","priority":"at once"}', "bad_value"),
    ("an id with a dot", SUBMIT, b'{"id":"a.b","shell":"true"}', "bad_id"),
    ("an id with a space", SUBMIT, b'{"id":"a b","shell":"true"}', "bad_id"),
    ("a wildcard as id", SUBMIT, b'{"id":"*","shell":"true"}', "bad_id"),
    ("a long id", SUBMIT, b'{"id":"' + b"x" * 300 + b'","shell":"true"}', "bad_id"),
    ("a derived id", SUBMIT, b'{"id":"at-1-0","shell":"true"}', "bad_id"),
    ("an acknowledgement", SUBMIT, b'{"stream":"AF_default","seq":7}', "bad_value"),
    ("a cycle", "workflow.submitted", _dag([("a", ["b"]), ("b", ["a"])]), "bad_dag"),
    ("a self-dependency", "workflow.submitted", _dag([("a", ["a"])]), "bad_dag"),
    ("an unknown dependency", "workflow.submitted", _dag([("a", ["z"])]), "bad_dag"),
    ("a task twice", "workflow.submitted", _dag([("a", []), ("a", [])]), "bad_dag"),
    ("no task", "workflow.submitted", _dag([]), "bad_dag"),
    ("parts that never came", "workflow.submitted", b'{"id":"w","parts":3}', "bad_value"),
    ("a part out of order", "workflow.part", b'{"workflow":"w","part":5,"tasks":[]}', "bad_value"),
    ("a cancel of nothing", "task.cancel_requested", b'{"id":"nothing"}', "unknown_id"),
    ("a cancel without an id", "task.cancel_requested", b"{}", "bad_type"),
    ("a cancel of a bad id", "task.cancel_requested", b'{"id":"a.b"}', "bad_id"),
    ("a workflow cancelled that is none", "workflow.cancel_requested", b'{"id":"nothing"}', "unknown_id"),
    ("another priority for nothing", "task.reprioritized", b'{"id":"nothing","priority":1}', "unknown_id"),
]


async def _publish(
    client: agentflow.Client, subject: str, data: bytes, headers: dict[str, str] | None = None
) -> int:
    done = await client.log.append(Frame(subject, data, headers=headers) if headers else Frame(subject, data))
    assert isinstance(done, Done), done
    return done.seq


async def _answered(client: agentflow.Client, *seqs: int) -> Audit:
    """Wait until what lies there is answered."""

    async def answers() -> Audit | None:
        found = await audit(client)
        there = {_any(logged.event).seq for logged in found.of_kind("event.rejected")}
        return found if there.issuperset(seqs) else None

    return await eventually(answers)


async def _still_works(client: agentflow.Client) -> None:
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3


class TestBadInput:
    async def test_a_subject_that_is_no_text_stops_nothing(self, running: Cluster) -> None:
        client = await running.client()
        async with Socket(running.server.port) as socket:
            socket.publish(b"af.default.task.submitted.\xff\xfe", b'{"shell":"true"}')
            socket.publish(b"af.default.task.submitted.cli", b'{"id":"after","shell":"true"}')
            assert await client.task("after").result(SOON_S) is None
        found = await audit(client)
        assert [logged.bad.reason for logged in found.events if logged.bad] == ["bad_subject"]

    async def test_of_clients_is_answered_with_position_and_reason(self, running: Cluster) -> None:
        client = await running.client()
        sent: dict[int, tuple[str, str]] = {}
        for name, kind, data, reason in FROM_CLIENTS:
            subject = wire.event("default", kind, "stranger")
            if len(data) > FRAME_BYTES_MAX:  # our own log would not send it
                sent[await _ask(client, subject, data)] = (name, reason)
            else:
                sent[await _publish(client, subject, data)] = (name, reason)
            await _publish(client, wire.event("default", SUBMIT, "stranger"), GOOD % len(sent))
        found = await _answered(client, *sent)
        answers = {_any(logged.event).seq: _any(logged.event) for logged in found.of_kind("event.rejected")}
        told = {sent[seq][0]: answers[seq].reason for seq in sent}
        assert told == dict(sent.values())
        for seq, answer in answers.items():
            verdict = found.verdicts[seq, answer.index]
            assert (str(verdict.kind), str(verdict.reason)) == ("rejected", answer.reason)
            assert answer.detail
            assert answer.client == "stranger"
        for number in range(1, len(sent) + 1):
            assert (await client.task(f"good-{number}").outcome(SOON_S)).state == "completed"

    async def test_one_bad_event_among_many_good_ones(self, running: Cluster) -> None:
        client = await running.client()
        events = [GOOD % number for number in range(1_000)]
        events[500] = b'{"id":"bad","shell":7}'
        seq = await _publish(
            client, wire.event("default", SUBMIT, "stranger"), b"[" + b",".join(events) + b"]"
        )
        found = await _answered(client, seq)
        answer = _any(found.of_kind("event.rejected")[0].event)
        assert (answer.seq, answer.index, answer.id, answer.reason) == (seq, 500, "bad", "bad_type")
        outcomes = await asyncio.wait_for(
            client.outcomes([f"good-{n}" for n in range(1_000) if n != 500]), 30.0
        )
        assert {outcome.state for outcome in outcomes} == {"completed"}
        assert found.state.rejected == 1

    async def test_an_unknown_version(self, running: Cluster) -> None:
        client = await running.client()
        subject = wire.event("default", SUBMIT, "stranger")
        seq = await _publish(client, subject, GOOD % 1, {wire.VERSION: str(LEVEL + 1)})
        answer = _any((await _answered(client, seq)).of_kind("event.rejected")[0].event)
        assert (answer.index, answer.reason) == (-1, "unknown_version")
        await _still_works(client)

    async def test_what_is_nobodys_is_quarantined(self, running: Cluster) -> None:
        client = await running.client()
        incarnation = (await audit(client)).of_kind("worker.joined")[0].seq
        done = await client.submit(add, 1, 2)
        await done.result(SOON_S)
        decision = {wire.DECISION: "1 1 1 1"}
        outcome = {"attempt": 1, "incarnation": incarnation}
        cases: list[tuple[str, bytes, dict[str, str] | None, str]] = [
            ("af.default.task.exploded.cli", b"{}", None, "unknown_kind"),
            ("af.default.task.submitted", b"{}", None, "bad_subject"),
            ("af.default.task.submitted.cli.more", b"{}", None, "bad_subject"),
            ("af.default.task.submitted.c!i", b"{}", None, "bad_subject"),
            ("af.default.task.cancelled.cli", b'{"id":"x"}', None, "unfenced"),
            ("af.default.task.cancelled.cli", b'{"id":"x"}', {wire.DECISION: "nonsense"}, "unfenced"),
            ("af.default.task.cancelled.cli", b"{}", decision, "bad_type"),
            ("af.default.leader.elected.cli", b'{"epoch":9,"master":"x"}', None, "conflict"),
            (
                "af.default.task.completed.cli",
                frames.encode({"id": "nothing", **outcome}),
                None,
                "unknown_id",
            ),
            ("af.default.task.completed.cli", b'{"id":"x"}', None, "bad_type"),
            ("af.default.worker.joined.cli", b'{"instance":"x","slots":0}', None, "bad_value"),
        ]
        seqs = [await _publish(client, subject, data, headers) for subject, data, headers, _ in cases]
        await _still_works(client)
        found = await audit(client)
        reasons = []
        for seq in seqs:
            verdict = found.verdicts.get((seq, -1)) or found.verdicts[seq, 0]
            reasons.append(str(verdict.reason))
            assert str(verdict.kind) in {"quarantined", "rejected"}
            assert verdict.detail
        assert reasons == [reason for *_, reason in cases]

    async def test_an_outcome_that_comes_too_late_or_from_the_wrong_one(self, running: Cluster) -> None:
        client = await running.client()
        incarnation = (await audit(client)).of_kind("worker.joined")[0].seq
        handle = await client.shell("sleep 0.3; echo right")
        await eventually(lambda: _is(handle, "running"))
        for actor, event in (
            ("cli", {"id": handle.id, "attempt": 1, "incarnation": incarnation, "result": "wrong"}),
            ("worker", {"id": handle.id, "attempt": 1, "incarnation": incarnation + 1, "result": "wrong"}),
            ("worker", {"id": handle.id, "attempt": 7, "incarnation": incarnation, "result": "wrong"}),
        ):
            await _publish(client, wire.event("default", "task.completed", actor), frames.encode(event))
        assert await handle.result(SOON_S) == "right"
        late = {"id": handle.id, "attempt": 1, "incarnation": incarnation, "result": "late"}
        await _publish(client, wire.event("default", "task.completed", "worker"), frames.encode(late))
        found = await audit(client)
        assert found.state.superseded == 4
        assert found.outcomes()[handle.id] == ["task.completed"]
        assert await client.task(handle.id).result(SOON_S) == "right"

    async def test_acknowledgements_injected_by_reply_subjects(self, running: Cluster) -> None:
        """The server stores them as messages: events of nobody, which must not stop anything."""
        client = await running.client()
        targets = [
            wire.event("default", kind, "worker") for kind in ("task.submitted", "task.assigned", "task.stop")
        ]
        targets += [
            wire.event("default", "task.completed", "worker"),
            wire.elected("default"),
            "af.default.x",
        ]
        async with Socket(running.server.port) as socket:
            for target in targets:
                socket.publish(wire.event("default", SUBMIT, "intruder"), b'{"shell":"true"}', target)
            await _still_works(client)
        await eventually(lambda: _counts(client, quarantined=5, rejected=1, epoch=2))
        await _still_works(client)

    async def test_a_pull_request_cannot_be_made_an_event(self, running: Cluster) -> None:
        client = await running.client()
        async with Socket(running.server.port) as socket:
            for _ in range(5):
                socket.publish("$JS.API.STREAM.INFO.AF_default", b"", wire.elected("default"))
                await _still_works(client)

    async def test_duplicates(self, running: Cluster) -> None:
        client = await running.client()
        subject = wire.event("default", SUBMIT, "stranger")
        seqs = [await _publish(client, subject, b'{"id":"one","shell":"echo 1"}') for _ in range(3)]
        other = await _publish(client, subject, b'{"id":"one","shell":"echo 2"}')
        found = await _answered(client, other)
        verdicts = [str(found.verdicts[seq, 0].kind) for seq in (*seqs, other)]
        assert verdicts == ["applied", "duplicate", "duplicate", "rejected"]
        assert await client.task("one").result(SOON_S) == "1"

    async def test_a_workflow_of_100_000_tasks(self, running: Cluster) -> None:
        """The limit of the contract: it is taken, and can be cancelled. One more is refused."""
        client = await running.client()

        class Given(agentflow.Workflow):
            def event(self, workflow_id: str, notify: str) -> Any:
                made = super().event(workflow_id, notify)
                tasks = [
                    WorkflowTask(task_id=f"t{n}", shell="true", dependencies=["t0"] if n else [])
                    for n in range(size)
                ]
                return type(made)(id=workflow_id, tasks=tasks, notify=notify)

        size = 100_001
        with pytest.raises(agentflow.InvalidRequest, match="100000"):
            await client.submit_workflow(Given())
        size = 100_000
        handle = await client.submit_workflow(Given())
        await handle.cancel()
        assert (await handle.outcome(40.0)).state == "cancelled"
        await _still_works(client)


async def _is(handle: agentflow.Handle[Any], state: str) -> bool:
    return await handle.status() == state


async def _counts(client: agentflow.Client, **wanted: int) -> bool:
    state = (await audit(client)).state
    return {name: getattr(state, name) for name in wanted} == wanted


async def _ask(client: agentflow.Client, subject: str, data: bytes) -> int:
    """Publish what the SDK would not, and learn its position."""
    answer = json.loads(await client.bus.request(subject, data, 5.0))
    seq: int = answer["seq"]
    return seq


def test_the_examples_are_submissions() -> None:
    """The fields used above are the contract's."""
    assert {"id", "shell", "argv", "function", "args"} <= set(TaskSubmitted.__struct_fields__)
