"""Task functions for tests; importable, so that worker processes and their children find them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import agentflow


@dataclass
class Point:
    x: int
    y: int = 0


class Refused(Exception):
    """A failure that another attempt cannot help."""


@agentflow.task(name="add")
async def add(a: int, b: int) -> int:
    return a + b


@agentflow.task(name="add_in_thread")
def add_in_thread(a: int, b: int) -> int:
    return a + b


@agentflow.task(name="add_in_process", process=True)
def add_in_process(a: int, b: int) -> int:
    return a + b


@agentflow.task(name="moved")
async def moved(point: Point, by: tuple[int, int], scale: float = 1.0) -> Point:
    assert isinstance(point, Point)
    return Point(int((point.x + by[0]) * scale), int((point.y + by[1]) * scale))


@agentflow.task(name="moved_in_process", process=True)
def moved_in_process(point: Point, by: tuple[int, int]) -> Point:
    assert isinstance(point, Point)
    return Point(point.x + by[0], point.y + by[1])


@agentflow.task(name="day_after")
def day_after(when: datetime) -> datetime:
    assert isinstance(when, datetime)
    return when.astimezone(UTC) + timedelta(days=1)


@agentflow.task(name="size_of")
async def size_of(value: Any) -> int:
    return len(value)


@agentflow.task(name="text_of")
async def text_of(size: int) -> str:
    return "x" * size


@agentflow.task(name="broken")
async def broken(message: str) -> None:
    raise ValueError(message)


@agentflow.task(name="attempts")
def attempts(folder: str, wanted: int, error: str = "ValueError") -> int:
    """Fail until it was tried `wanted` times; the number of attempts."""
    task = agentflow.current()
    (Path(folder) / f"{task.task_id.rpartition('/')[2]}.{task.attempt}").touch()
    if task.attempt < wanted:
        raise {"ValueError": ValueError, "Refused": Refused, "NonRetryable": agentflow.NonRetryable}[error](
            "no"
        )
    return task.attempt


@agentflow.task(name="sleep_async")
async def sleep_async(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "awake"


@agentflow.task(name="sleep_in_thread")
def sleep_in_thread(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


@agentflow.task(name="sleep_in_process", process=True)
def sleep_in_process(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


@agentflow.task(name="stubborn")
async def stubborn(seconds: float) -> str:
    """Heed no cancellation."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(left)
    return "awake"


@agentflow.task(name="cancels_itself")
async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@agentflow.task(name="wait_for_file")
def wait_for_file(path: str) -> str:
    while not Path(path).exists():
        time.sleep(0.01)
    return "seen"


@agentflow.task(name="mark")
async def mark(folder: str, name: str) -> str:
    """Leave a trace of each run."""
    (Path(folder) / f"{name}.{time.monotonic_ns()}").touch()
    return name


@agentflow.task(name="whoami")
def whoami() -> dict[str, Any]:
    task = agentflow.current()
    return {
        "task": task.task_id,
        "attempt": task.attempt,
        "worker": task.worker,
        "pid": os.getpid(),
        "lock": task.lock,
        "lock_token": task.lock_token,
    }


@agentflow.task(name="chosen")
async def chosen() -> dict[str, Any]:
    return {"shards": [{"n": 3}, {"n": 4}], "a/b": 5}
