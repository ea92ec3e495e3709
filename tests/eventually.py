"""Waiting in tests: for a condition, with a limit, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

_LOOK_EVERY_S = 0.01


@overload
async def eventually(condition: Callable[[], Awaitable[T | None]], *, within_s: float = ...) -> T: ...


@overload
async def eventually(condition: Callable[[], T | None], *, within_s: float = ...) -> T: ...


async def eventually(condition: Callable[[], object], *, within_s: float = 20.0) -> object:
    """Wait until `condition()` is true, and return it; fail when it is not `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within_s} s: {condition}"
        await asyncio.sleep(_LOOK_EVERY_S)
