"""The writer, on the log in memory: order, fairness, doubt, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from agentflow import frames
from agentflow.errors import AppendRefused, AppendUnknown, InvalidRequest
from agentflow.events import Event, TaskCompleted, TaskDeclined, TaskFailed, TaskStarted, TaskSubmitted
from agentflow.log.memory import Fault, MemoryLog, MemoryServer
from agentflow.log.port import Reason, Refused
from agentflow.writer import FRAME_EVENTS_GOOD, Writer


class Desk:
    """A server, a log on it, and writers that end with the test."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.server = MemoryServer()
        self.server.create("default")
        self._stack = stack

    async def writer(self, *, grouped: bool = False, patience_s: float | None = None) -> Writer:
        log = await self._stack.enter_async_context(MemoryLog(self.server, "default"))
        writer = Writer(log, "w1", grouped=grouped, patience_s=patience_s)
        return await self._stack.enter_async_context(writer)

    async def written(self) -> list[tuple[str, list[str]]]:
        """Each message: its kind, and the ids in it."""
        log = await self._stack.enter_async_context(MemoryLog(self.server, "default"))
        found = []
        for seq in range(1, (await log.identity()).last_seq + 1):
            message = await log.read(seq)
            assert message is not None
            judged = frames.judge(message.subject, message.data, message.headers)
            found.append((judged.kind, [getattr(item, "id", "") for item in judged.items]))
        return found


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        yield Desk(stack)


def _completed(name: str) -> TaskCompleted:
    return TaskCompleted(id=name, attempt=1, incarnation=1)


def _started(name: str) -> TaskStarted:
    return TaskStarted(id=name, attempt=1, incarnation=1, started_at_ms=0)


def _submitted(name: str) -> TaskSubmitted:
    return TaskSubmitted(id=name, shell="true")


async def test_what_is_said_meanwhile_goes_into_one_frame(desk: Desk) -> None:
    writer = await desk.writer()
    await asyncio.gather(*(writer.write([_submitted(f"t{n}")]) for n in range(50)))
    assert [len(ids) for _, ids in await desk.written()] == [50]


async def test_frames_stay_small_enough_to_be_read_at_once(desk: Desk) -> None:
    writer = await desk.writer()
    await writer.write([_submitted(f"t{n}") for n in range(2 * FRAME_EVENTS_GOOD + 1)])
    assert [len(ids) for _, ids in await desk.written()] == [FRAME_EVENTS_GOOD, FRAME_EVENTS_GOOD, 1]


async def test_a_client_s_events_keep_their_order(desk: Desk) -> None:
    writer = await desk.writer()
    events: list[Event] = [
        _submitted("a"),
        _completed("x"),
        _submitted("b"),
        _submitted("c"),
        _completed("y"),
    ]
    await asyncio.gather(*(writer.write([event]) for event in events))
    kinds = [(kind.partition(".")[2], ids) for kind, ids in await desk.written()]
    assert kinds == [
        ("submitted", ["a"]),
        ("completed", ["x"]),
        ("submitted", ["b", "c"]),
        ("completed", ["y"]),
    ]


class TestGrouped:
    async def test_kinds_are_gathered_and_starts_come_before_their_outcomes(self, desk: Desk) -> None:
        writer = await desk.writer(grouped=True)
        for event in (_completed("a"), _started("b"), _completed("b"), _started("c"), _completed("d")):
            writer.say(event)
        await writer.settled()
        assert await desk.written() == [("task.started", ["b", "c"]), ("task.completed", ["a", "b", "d"])]

    async def test_no_kind_waits_for_ever(self, desk: Desk) -> None:
        """However many complete, what was said first comes first."""
        writer = await desk.writer(grouped=True)
        desk.server.hold()
        writer.say(_completed("first"))
        await asyncio.sleep(0)
        writer.say(TaskFailed(id="failed", attempt=1, incarnation=1, error="error"))
        writer.say(TaskDeclined(id="declined", attempt=1, incarnation=1))
        for number in range(3 * FRAME_EVENTS_GOOD):
            writer.say(_completed(f"t{number}"))
        desk.server.release()
        await writer.settled()
        kinds = [kind for kind, _ in await desk.written()]
        assert kinds.index("task.failed") <= 2
        assert kinds.index("task.declined") <= 3


class TestFaults:
    async def test_one_that_cannot_be_written_fails_alone(self, desk: Desk) -> None:
        writer = await desk.writer(patience_s=5.0)
        large = TaskSubmitted(id="large", argv=["x" * 600_000])
        odd = TaskSubmitted(id="odd", argv=[object()])
        given = [writer.write([event]) for event in (_submitted("a"), large, odd, _submitted("b"))]
        a, too_large, no_json, b = await asyncio.gather(*given, return_exceptions=True)
        assert isinstance(too_large, InvalidRequest)
        assert isinstance(no_json, InvalidRequest)
        assert {a, b} == {1, 2}

    async def test_of_many_at_once_none_is_written_if_one_cannot_be(self, desk: Desk) -> None:
        writer = await desk.writer()
        events = [_submitted(f"t{n}") for n in range(FRAME_EVENTS_GOOD + 5)]
        events[-1] = TaskSubmitted(argv=["x" * 600_000])
        with pytest.raises(InvalidRequest):
            await writer.write(events)
        assert await desk.written() == []

    async def test_doubt_is_resolved_by_the_same_bytes(self, desk: Desk) -> None:
        writer = await desk.writer(patience_s=5.0)
        desk.server.inject(Fault.STORED_UNKNOWN, Fault.LOST_UNKNOWN)
        await writer.write([_submitted("a")])
        await writer.write([_submitted("b")])
        assert await desk.written() == [("task.submitted", ["a"]), ("task.submitted", ["b"])]

    async def test_after_doubt_a_refusal_is_not_believed(self, desk: Desk) -> None:
        writer = await desk.writer(patience_s=5.0)
        desk.server.inject(Fault.STORED_UNKNOWN, Refused(Reason.FULL, 10077, "full"))
        with pytest.raises(AppendUnknown, match="earlier attempt"):
            await writer.write([_submitted("a")])

    async def test_a_client_is_told_of_a_full_log_and_a_worker_waits(self, desk: Desk) -> None:
        full = Refused(Reason.FULL, 10077, "maximum bytes exceeded")
        client = await desk.writer(patience_s=5.0)
        desk.server.inject(full)
        with pytest.raises(AppendRefused, match="full"):
            await client.write([_submitted("a")])
        worker = await desk.writer(grouped=True)
        desk.server.inject(full, full)
        assert await worker.write([_completed("a")]) == 1


async def test_one_that_needs_a_higher_level_does_not_lift_the_others(desk: Desk) -> None:
    """Below its level a frame is refused as a whole: plain events must not be in it."""
    writer = await desk.writer()
    locked = TaskSubmitted(id="locked", shell="true", lock="one")
    await asyncio.gather(
        *(writer.write([event]) for event in (_submitted("a"), _submitted("b"), locked, _submitted("c")))
    )
    assert [ids for _, ids in await desk.written()] == [["a", "b"], ["locked"], ["c"]]


async def test_its_end_is_told_to_all_who_wait(desk: Desk) -> None:
    writer = await desk.writer()
    desk.server.hold()
    waiting = [asyncio.create_task(writer.write([_submitted("a")]))]
    await asyncio.sleep(0)
    waiting += [asyncio.create_task(writer.write([_completed(name)])) for name in "bc"]
    await asyncio.sleep(0)
    await writer.__aexit__(None, None, None)
    for each in waiting:
        with pytest.raises(AppendUnknown):
            await each
    with pytest.raises(AppendUnknown):
        await writer.write([_submitted("d")])
    desk.server.release()
