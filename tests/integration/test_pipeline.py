"""What a second process helps to judge is judged as it would be here, in order, whatever becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import psutil
import pytest

from agentflow.errors import LogGone
from agentflow.frames import Judged, is_canonical, judge
from agentflow.log.port import Message
from agentflow_projections.pipeline import Spoken, spoken
from tests.unit.histories import History


def some_messages() -> list[Message]:
    """Good and bad ones, numbered through."""
    found = [each for seed in range(4) for each in History(seed).run(150)]
    return [
        Message(seq, each.time_ns, each.subject, each.data, each.headers) for seq, each in enumerate(found, 1)
    ]


async def in_lists(messages: Sequence[Message], size: int = 5) -> AsyncGenerator[list[Message], None]:
    for start in range(0, len(messages), size):
        yield list(messages[start : start + size])


class Noted:
    """What `judge` is told of each message, and a log that goes on until the second process has said enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.canonical: list[bool] = []
        self.given: list[Message] = []
        monkeypatch.setattr("agentflow_projections.pipeline.judge", self.judge)

    def judge(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None, *, canonical: bool = False
    ) -> Judged:
        self.canonical.append(canonical)
        return judge(subject, data, headers, canonical=canonical)

    async def log(self, enough: Callable[[], bool]) -> AsyncGenerator[list[Message], None]:
        async with asyncio.timeout(30):
            while not enough():
                async for some in in_lists(some_messages()):
                    self.given += some
                    yield some


def as_here(messages: Sequence[Message]) -> Spoken:
    return [(each, judge(each.subject, each.data, each.headers)) for each in messages]


async def read_into(found: Spoken, following: AsyncGenerator[list[Message], None]) -> None:
    async for some in spoken(following, ahead_max=1):
        found += some


def judging() -> list[psutil.Process]:
    """The second processes of this one."""
    return [each for each in psutil.Process().children() if "agentflow_projections.judging" in each.cmdline()]


async def test_with_and_without_a_second_process_the_verdicts_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = Noted(monkeypatch)
    found: Spoken = []
    processes: set[int] = set()
    async for some in spoken(noted.log(lambda: sum(noted.canonical) > 500), ahead_max=1):
        found += some
        processes.update(each.pid for each in judging())
    assert found == as_here(noted.given)
    assert len(processes) == 1
    assert not judging()


async def test_what_it_found_canonical_is_only_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(monkeypatch)
    await read_into([], noted.log(lambda: sum(noted.canonical) > 500))
    asked = noted.canonical.index(True)
    expected = [is_canonical(each.subject, each.data) for each in noted.given]
    assert noted.canonical[asked:] == expected[asked:]
    assert not all(expected[asked:])


async def test_nobody_else_is_asked_while_few_messages_wait() -> None:
    messages = some_messages()
    found: Spoken = []
    async for some in spoken(in_lists(messages[:40])):
        found += some
        assert not judging()
    assert found == as_here(messages[:40])


@pytest.mark.parametrize("wanted", ["kill", "suspend"])
async def test_a_second_process_that_is_gone_or_silent_costs_nothing_but_time(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow_projections.pipeline.ANSWER_S_MAX", 0.2)
    noted = Noted(monkeypatch)
    found: Spoken = []
    hit_after = 0

    def enough() -> bool:
        return hit_after > 0 and len(noted.canonical) > hit_after + 2_000

    async for some in spoken(noted.log(enough), ahead_max=2):
        found += some
        if not hit_after and any(noted.canonical):
            (second,) = judging()
            getattr(second, wanted)()
            hit_after = len(noted.canonical)
    assert found == as_here(noted.given)
    assert not any(noted.canonical[-1_000:])
    assert not judging()


async def test_an_error_comes_after_all_that_was_read_before_it() -> None:
    messages = some_messages()[:30]

    async def cut_off() -> AsyncGenerator[list[Message], None]:
        async for some in in_lists(messages):
            yield some
        raise LogGone("it was deleted")

    found: Spoken = []
    with pytest.raises(LogGone, match="it was deleted"):
        await read_into(found, cut_off())
    assert found == as_here(messages)
    assert not judging()


async def test_who_leaves_early_leaves_nothing_behind() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[list[Message], None]:
        try:
            while True:
                async for some in in_lists(some_messages()):
                    yield some
        finally:
            closed.set()

    reading = spoken(endless(), ahead_max=1)
    async for _ in reading:
        if judging():
            break
    await reading.aclose()
    assert closed.is_set()
    assert not judging()


async def test_a_second_process_that_stands_still_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentflow_projections.pipeline.ANSWER_S_MAX", 0.2)
    noted = Noted(monkeypatch)
    reading = spoken(noted.log(lambda: False), ahead_max=1)
    async for _ in reading:
        if any(noted.canonical):
            break
    (second,) = judging()
    second.suspend()
    await reading.aclose()
    assert not second.is_running()
