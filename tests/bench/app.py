"""The functions that the benches run."""

from __future__ import annotations

import asyncio

import agentflow


@agentflow.task(name="bench.noop")
async def noop(number: int) -> int:
    """Give back what it was given."""
    return number


@agentflow.task(name="bench.total")
async def total(*numbers: int) -> int:
    """What a fan-in does."""
    return sum(numbers)


@agentflow.task(name="bench.sleep")
async def sleep(seconds: float) -> float:
    """Take a while."""
    await asyncio.sleep(seconds)
    return seconds
