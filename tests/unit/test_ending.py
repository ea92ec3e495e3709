from __future__ import annotations

import asyncio

import pytest

from agentflow import ending
from agentflow.ending import end_tasks


async def test_a_task_that_swallows_its_first_cancellation_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_AGAIN_S", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 2:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end_tasks(task)
    assert task.cancelled()
    assert swallowed == 3


async def test_what_a_task_ended_with_is_nobody_s_concern() -> None:
    async def broken() -> None:
        raise ValueError

    task = asyncio.create_task(broken())
    await asyncio.sleep(0)
    await end_tasks(task)
    await end_tasks()
    assert task.done()
    assert isinstance(task.exception(), ValueError)
