"""Ending tasks and processes for certain."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import Process
from collections.abc import Coroutine
from typing import Any, Final

_AGAIN_S: Final = 1.0


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with.

    A cancellation can get lost: `asyncio.wait_for` swallows one that comes just when what it
    waits for is done (until Python 3.12), and so does nats-py in places. So it is repeated.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)


async def end_process(process: Process, patience_s: float) -> bool:
    """Ask a process to end (SIGTERM), wait, and kill it if it takes longer than that: True. Harmless twice."""
    if process.returncode is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), patience_s)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return True
    return False


async def together(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Run them until all are done, or until one fails: then the others are ended, and that is raised.

    Of several that failed the first in the order given is raised.
    """
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await end_tasks(*tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
