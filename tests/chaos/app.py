"""What the workers of a campaign run.

Every function's first argument is the number its client gave the task: with the client's name
it is the key under which the journals are compared. What `effect` and `nap` do is written to the
journal of side effects, by single writes with O_APPEND, before and after.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import agentflow
from agentflow import Retry

EFFECTS_VARIABLE = "CHAOS_EFFECTS"
"""Where the journal of side effects is."""
FLAKY = Retry(max_attempts=4, backoff_s=0.05, backoff_factor=2.0, backoff_s_max=0.4, jitter=0.5)
LARGE_BYTES = 300 * 1024
"""More than the log takes inline."""


class _Effects:
    """The journal, opened when first needed and kept open."""

    fd = -1

    @classmethod
    def write(cls, what: str, token: int = 0) -> None:
        """One line, in one write: the kernel keeps lines whole and in order."""
        if cls.fd < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            cls.fd = os.open(os.environ[EFFECTS_VARIABLE], flags, 0o644)
        task = agentflow.current()
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        line = f"{what}\t{task.task_id}\t{task.attempt}\t{task.worker}\t{os.getpid()}\t{now_ns}\t{token}\n"
        os.write(cls.fd, line.encode())


@agentflow.task(name="noop")
async def noop(number: int) -> int:
    return number


@agentflow.task(name="effect")
async def effect(number: int) -> int:
    _Effects.write("begin")
    _Effects.write("end")
    return number


@agentflow.task(name="nap", retry=Retry(max_attempts=3, backoff_s=0.05))
async def nap(number: int, seconds: float) -> int:
    _Effects.write("begin")
    try:
        await asyncio.sleep(seconds)
    finally:
        _Effects.write("end")
    return number


@agentflow.task(name="nap_in_thread")
def nap_in_thread(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number


@agentflow.task(name="flaky", retry=FLAKY)
async def flaky(number: int, good_at: int) -> int:
    """Fails until the attempt `good_at`; assignments that came to nothing count as attempts too."""
    attempt = agentflow.current().attempt
    if attempt < good_at:
        raise ConnectionError(f"attempt {attempt} of {number}")
    return attempt


@agentflow.task(name="hopeless")
async def hopeless(number: int) -> None:
    raise agentflow.NonRetryable(f"{number} cannot be done")


@agentflow.task(name="slow", timeout_s=0.3)
async def slow(number: int) -> None:
    await asyncio.sleep(60)


@agentflow.task(name="large")
async def large(number: int) -> str:
    return f"{number:010}" * (LARGE_BYTES // 10)


@agentflow.task(name="added")
async def added(number: int, *values: Any) -> int:
    """A task of a workflow: the sum of what it depends on, and one."""
    return 1 + sum(value for value in values if isinstance(value, int))
