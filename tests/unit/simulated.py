"""Tests in simulated time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from tests.sim.loop import new_loop

W = TypeVar("W")


def in_simulated_time(
    world: Callable[[], AbstractAsyncContextManager[W]],
) -> Callable[[Callable[[W], Awaitable[None]]], Callable[[], None]]:
    """What makes a test of a scenario: it gets a world of its own, on an event loop whose time is simulated."""

    def decorate(scenario: Callable[[W], Awaitable[None]]) -> Callable[[], None]:
        async def run() -> None:
            async with world() as opened:
                await scenario(opened)

        def test() -> None:
            loop = new_loop(random.Random(1))
            loop.run(run())
            assert not loop.errors

        test.__doc__ = scenario.__doc__
        return test

    return decorate
