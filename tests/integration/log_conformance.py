"""What every log promises: run against each adapter by test_log.py.

A class of tests without the prefix pytest collects; an adapter's test class inherits it and
provides the fixture `logs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

import pytest

from agentflow import wire
from agentflow.errors import InvalidRequest, LogGone, LogTrimmed
from agentflow.events import ObjectRef
from agentflow.limits import FRAME_BYTES_MAX
from agentflow.log.port import (
    BATCH_FRAMES_MAX,
    Done,
    Fence,
    Frame,
    Log,
    Message,
    Reason,
    Refused,
    Trim,
    TrimmableLog,
)

NAMESPACE = "conformance"
ELECTED = wire.elected(NAMESPACE)
SUBMITTED = wire.event(NAMESPACE, "task.submitted", "cli")
ASSIGNED = wire.event(NAMESPACE, "task.assigned", "w1")


class Logs(Protocol):
    """One namespace's log, and what only an operator (or a disaster) does to it."""

    log: TrimmableLog
    other: Log
    """A second handle on the same log."""

    async def recreate(self) -> None:
        """Delete the stream and create it again, empty."""
        ...

    async def purge(self, before: int) -> None:
        """Remove the messages before a sequence."""
        ...


def frame(number: int, subject: str = SUBMITTED) -> Frame:
    """A frame like no other with another number."""
    return Frame(subject, b'{"n":%d}' % number, f"cli.n0nce.{number}")


def trim_to(seq: int) -> Trim:
    """A record of trimming, with a snapshot of the same position."""
    return Trim(seq, seq, ObjectRef(name="n", size=1, sha256="n"), digest="d", chain="c", level=1)


def refusal(appended: object) -> Reason:
    """Why it was refused."""
    assert isinstance(appended, Refused), appended
    return appended.reason


def seq_of(appended: object) -> int:
    """Where it was stored."""
    assert isinstance(appended, Done), appended
    return appended.seq


async def take(log: Log, after: int, count: int, subjects: Sequence[str] = ()) -> list[Message]:
    """The next `count` messages."""
    taken: list[Message] = []
    follower = log.follow(after, subjects=subjects)
    async with asyncio.timeout(20), aclosing(follower):  # type: ignore[type-var]
        async for messages in follower:
            assert messages, "an empty list was yielded"
            taken += messages
            if len(taken) >= count:
                break
    return taken


class LogConformance:
    """The promises of `agentflow.log.port.Log`."""

    async def test_an_empty_log_begins_after_its_end(self, logs: Logs) -> None:
        identity = await logs.log.identity()
        assert (identity.name, identity.first_seq, identity.last_seq) == (wire.stream(NAMESPACE), 1, 0)
        assert identity.replicas == 1

    async def test_what_is_appended_is_read_back_as_it_was(self, logs: Logs) -> None:
        written = Frame(SUBMITTED, b'{"n":1}', "cli.n0nce.1", {wire.VERSION: "1"})
        seq = seq_of(await logs.log.append(written))
        message = await logs.other.read(seq)
        assert message is not None
        assert (message.seq, message.subject, message.data) == (seq, written.subject, written.data)
        assert message.headers == {wire.VERSION: "1", wire.MSG_ID: "cli.n0nce.1"}
        assert message == await logs.log.last(SUBMITTED)
        assert [message] == await take(logs.log, 0, 1)

    async def test_what_is_not_there_is_none(self, logs: Logs) -> None:
        assert await logs.log.read(1) is None
        assert await logs.log.last(SUBMITTED) is None
        assert await logs.log.find("cli.n0nce.1", after=0) is None

    async def test_sequences_are_gapless(self, logs: Logs) -> None:
        assert [seq_of(await logs.log.append(frame(n))) for n in range(1, 6)] == [1, 2, 3, 4, 5]

    async def test_a_repeated_write_is_stored_once(self, logs: Logs) -> None:
        assert await logs.log.append(frame(1)) == Done(1)
        assert await logs.other.append(frame(1)) == Done(1, duplicate=True)
        assert (await logs.log.identity()).last_seq == 1

    async def test_a_write_without_an_id_is_stored_each_time(self, logs: Logs) -> None:
        anonymous = Frame(SUBMITTED, b"{}")
        assert [await logs.log.append(anonymous) for _ in range(2)] == [Done(1), Done(2)]

    @pytest.mark.parametrize(
        "other", [Frame(SUBMITTED, b"other", "cli.n0nce.1"), Frame(ASSIGNED, b'{"n":1}', "cli.n0nce.1")]
    )
    async def test_a_message_id_used_by_another_message_is_refused(self, logs: Logs, other: Frame) -> None:
        await logs.log.append(frame(1))
        assert refusal(await logs.log.append(other)) is Reason.FOREIGN_ID

    async def test_compare_and_set_admits_one(self, logs: Logs) -> None:
        contenders = [frame(n, ELECTED) for n in range(8)]
        appended = await asyncio.gather(
            *(logs.log.append(each, fence=Fence(ELECTED, 0)) for each in contenders)
        )
        assert [isinstance(each, Done) for each in appended].count(True) == 1
        assert {refusal(each) for each in appended if not isinstance(each, Done)} == {Reason.FENCED}

    async def test_a_repeated_compare_and_set_is_not_refused_by_itself(self, logs: Logs) -> None:
        seq = seq_of(await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0)))
        again = await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0))
        assert again == Done(seq, duplicate=True)

    async def test_a_repeated_compare_and_set_is_found_below_later_ones(self, logs: Logs) -> None:
        seq = seq_of(await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0)))
        await logs.log.append(frame(2, ELECTED), fence=Fence(ELECTED, seq))
        again = await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0))
        assert again == Done(seq, duplicate=True)

    async def test_a_fence_on_another_subject_holds_until_somebody_writes_there(self, logs: Logs) -> None:
        seq = seq_of(await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0)))
        fence = Fence(ELECTED, seq)
        assert isinstance(await logs.log.append(frame(2, ASSIGNED), fence=fence), Done)
        assert isinstance(await logs.log.append(frame(3, ASSIGNED), fence=fence), Done)
        await logs.other.append(frame(4, ELECTED), fence=fence)
        assert refusal(await logs.log.append(frame(5, ASSIGNED), fence=fence)) is Reason.FENCED
        assert refusal(await logs.log.append_batch([frame(6), frame(7)], fence=fence)) is Reason.FENCED
        assert (await logs.log.identity()).last_seq == 4

    async def test_a_batch_lies_together(self, logs: Logs) -> None:
        await logs.log.append(frame(0))
        batch = [frame(n, ASSIGNED if n % 2 else SUBMITTED) for n in range(1, 101)]
        assert await logs.log.append_batch(batch) == Done(101)
        stored = await take(logs.log, 1, 100)
        assert [(each.seq, each.subject, each.data) for each in stored] == [
            (seq, each.subject, each.data) for seq, each in enumerate(batch, 2)
        ]

    async def test_the_largest_batch_fits_and_no_larger(self, logs: Logs) -> None:
        batch = [frame(n) for n in range(BATCH_FRAMES_MAX + 1)]
        assert refusal(await logs.log.append_batch(batch)) is Reason.TOO_LARGE
        assert await logs.log.append_batch(batch[1:]) == Done(BATCH_FRAMES_MAX)

    async def test_a_batch_of_one_is_an_append(self, logs: Logs) -> None:
        assert await logs.log.append_batch([frame(1)]) == Done(1)

    async def test_a_repeated_batch_is_stored_once(self, logs: Logs) -> None:
        batch = [frame(n) for n in range(3)]
        await logs.log.append(frame(99))
        assert await logs.log.append_batch(batch) == Done(4)
        await logs.log.append(frame(100))
        assert await logs.other.append_batch(batch) == Done(4, duplicate=True)

    async def test_a_batch_that_is_stored_in_part_is_refused(self, logs: Logs) -> None:
        await logs.log.append(frame(1))
        assert refusal(await logs.log.append_batch([frame(0), frame(1)])) is Reason.FOREIGN_ID
        assert refusal(await logs.log.append_batch([frame(1), frame(2)])) is Reason.FOREIGN_ID
        assert (await logs.log.identity()).last_seq == 1

    async def test_a_frame_has_a_largest_size(self, logs: Logs) -> None:
        assert isinstance(await logs.log.append(Frame(SUBMITTED, b"x" * FRAME_BYTES_MAX)), Done)
        too_large = Frame(SUBMITTED, b"x" * (FRAME_BYTES_MAX + 1))
        assert refusal(await logs.log.append(too_large)) is Reason.TOO_LARGE

    async def test_a_message_is_found_by_its_id(self, logs: Logs) -> None:
        for number in range(1, 6):
            await logs.log.append(frame(number))
        assert await logs.log.find("cli.n0nce.3", after=0) == 3
        assert await logs.log.find("cli.n0nce.3", after=3) is None

    async def test_following_goes_on_with_what_comes_later(self, logs: Logs) -> None:
        await logs.log.append(frame(1))
        reading = asyncio.create_task(take(logs.log, 0, 3))
        await logs.other.append(frame(2))
        await logs.other.append(frame(3))
        assert [each.seq for each in await reading] == [1, 2, 3]

    async def test_following_filters_subjects(self, logs: Logs) -> None:
        for number in range(6):
            await logs.log.append(frame(number, ASSIGNED if number % 2 else SUBMITTED))
        await logs.log.append(frame(6, ELECTED))
        assert [each.seq for each in await take(logs.log, 0, 3, [ASSIGNED])] == [2, 4, 6]
        wanted = [wire.event(NAMESPACE, "task.*", "*"), ELECTED]
        assert [each.seq for each in await take(logs.log, 2, 5, wanted)] == [3, 4, 5, 6, 7]

    async def test_following_everything_gets_everything_in_order(self, logs: Logs) -> None:
        for start in range(0, 5000, 500):
            await logs.log.append_batch([frame(n) for n in range(start, start + 500)])
        stored = await take(logs.log, 0, 5000)
        assert [each.seq for each in stored] == list(range(1, 5001))
        assert [each.data for each in stored] == [frame(n).data for n in range(5000)]

    async def test_time_does_not_go_back(self, logs: Logs) -> None:
        for number in range(5):
            await logs.log.append(frame(number))
        times = [each.time_ns for each in await take(logs.log, 0, 5)]
        assert times == sorted(times)
        assert times[0] >= (await logs.log.identity()).created_ns

    async def test_a_recreated_log_is_gone(self, logs: Logs) -> None:
        await logs.log.append(frame(1))
        async with asyncio.timeout(30):
            follower = logs.log.follow(0)
            assert await anext(follower)
            await logs.recreate()
            with pytest.raises(LogGone):
                await anext(follower)

    async def test_a_log_that_ends_before_the_position_is_gone(self, logs: Logs) -> None:
        await logs.log.append(frame(1))
        with pytest.raises(LogGone):
            await take(logs.log, 2, 1)

    async def test_a_log_that_no_longer_holds_the_position_is_gone(self, logs: Logs) -> None:
        for number in range(1, 6):
            await logs.log.append(frame(number))
        await logs.purge(before=4)
        with pytest.raises(LogGone):
            await take(logs.log, 1, 1)
        assert [each.seq for each in await take(logs.log, 3, 2)] == [4, 5]
        assert [each.seq for each in await take(logs.log, 0, 2, [SUBMITTED])] == [4, 5]
        identity = await logs.log.identity()
        assert (identity.first_seq, identity.last_seq) == (4, 5)
        assert await logs.log.read(3) is None

    async def test_an_emptied_log_goes_on_where_it_was(self, logs: Logs) -> None:
        for number in range(1, 4):
            await logs.log.append(frame(number))
        await logs.purge(before=4)
        identity = await logs.log.identity()
        assert (identity.first_seq, identity.last_seq) == (4, 3)
        with pytest.raises(LogGone):
            await take(logs.log, 2, 1)
        reading = asyncio.create_task(take(logs.log, 3, 1))
        assert await logs.log.append(frame(4)) == Done(4)
        assert [each.seq for each in await reading] == [4]

    async def test_a_write_in_doubt_is_looked_for_when_another_fence_has_fallen(self, logs: Logs) -> None:
        elected = await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0))
        assert elected == Done(1)
        fence = Fence(ELECTED, 1)
        assert await logs.log.append(frame(2), fence=fence) == Done(2)
        assert await logs.other.append(frame(3, ELECTED), fence=fence) == Done(3)
        # Its caller heard nothing of the first call, and repeats it behind the successor's election.
        again = await logs.log.append(frame(2), fence=fence, in_doubt_after=1)
        assert again == Done(2, duplicate=True)
        never = await logs.log.append(frame(4), fence=fence, in_doubt_after=1)
        assert refusal(never) is Reason.FENCED

    async def test_a_batch_in_doubt_is_looked_for_too(self, logs: Logs) -> None:
        assert await logs.log.append(frame(1, ELECTED), fence=Fence(ELECTED, 0)) == Done(1)
        fence, batch = Fence(ELECTED, 1), [frame(2), frame(3)]
        assert await logs.log.append_batch(batch, fence=fence) == Done(3)
        assert await logs.other.append(frame(4, ELECTED), fence=fence) == Done(4)
        assert await logs.log.append_batch(batch, fence=fence, in_doubt_after=1) == Done(3, duplicate=True)
        never = await logs.log.append_batch([frame(5), frame(6)], fence=fence, in_doubt_after=1)
        assert refusal(never) is Reason.FENCED

    async def test_what_is_trimmed_is_gone_and_who_wants_it_is_told(self, logs: Logs) -> None:
        for number in range(1, 7):
            await logs.log.append(frame(number, ASSIGNED if number % 2 else SUBMITTED))
        assert await logs.log.trim(trim_to(4)) == 4
        identity = await logs.other.identity()
        assert (identity.first_seq, identity.last_seq, identity.trim) == (5, 6, trim_to(4))
        assert [each.seq for each in await take(logs.other, 4, 2)] == [5, 6]
        with pytest.raises(LogTrimmed, match=r"trimmed up to 4, 4 is wanted.*snapshot of 4"):
            await take(logs.other, 3, 1)
        assert [each.seq for each in await take(logs.other, 0, 1, [SUBMITTED])] == [6]
        assert await logs.other.read(4) is None

    async def test_the_last_election_and_the_generations_of_locks_stay(self, logs: Logs) -> None:
        opened = wire.locks_opened(NAMESPACE)
        for number, subject in enumerate((ELECTED, opened, SUBMITTED, ELECTED, opened, ASSIGNED), 1):
            await logs.log.append(frame(number, subject))
        assert await logs.log.trim(trim_to(6)) == 3
        found = await logs.other.last(ELECTED)
        assert found is not None
        assert found.seq == 4
        assert [each.seq for each in await take(logs.other, 0, 2, [opened])] == [2, 5]
        # Decisions of who was elected then are still taken, and those of nobody refused.
        assert await logs.other.append(frame(7), fence=Fence(ELECTED, 4)) == Done(7)
        assert refusal(await logs.other.append(frame(8), fence=Fence(ELECTED, 0))) is Reason.FENCED
        with pytest.raises(LogTrimmed):
            await take(logs.other, 0, 1)
        assert [each.seq for each in await take(logs.other, 6, 1)] == [7]

    async def test_trimming_again_goes_on_where_it_was(self, logs: Logs) -> None:
        for number, subject in enumerate((SUBMITTED, ELECTED, SUBMITTED, SUBMITTED, ELECTED, SUBMITTED), 1):
            await logs.log.append(frame(number, subject))
        assert await logs.log.trim(trim_to(3)) == 3
        assert await logs.log.trim(trim_to(3)) == 0
        assert await logs.log.trim(trim_to(5)) == 1
        assert [each.seq for each in await take(logs.other, 5, 1)] == [6]
        with pytest.raises(InvalidRequest, match="trimmed up to 5"):
            await logs.log.trim(trim_to(4))

    async def test_a_readers_log_is_trimmed_behind_it(self, logs: Logs) -> None:
        for number in range(1, 5):
            await logs.log.append(frame(number))
        reading = logs.other.follow(0)
        async with asyncio.timeout(30), aclosing(reading):  # type: ignore[type-var]
            assert (await anext(reading))[-1].seq <= 4
            await logs.log.append(frame(5))
            while (await anext(reading))[-1].seq < 5:
                pass
            await logs.log.trim(trim_to(5))
            await logs.log.append(frame(6))
            assert [each.seq for each in await anext(reading)] == [6]
