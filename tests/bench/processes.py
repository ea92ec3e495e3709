"""What a bare asyncio loop reaches in running shells: `python -m tests.bench.processes COUNT AT_ONCE`.

In a process of its own: starting a child takes longer the more memory its parent has.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop


async def measure(count: int, at_once: int) -> float:
    """Shells a second, `at_once` at a time."""
    numbers = iter(range(count))

    async def loop() -> None:
        for _ in numbers:
            process = await asyncio.create_subprocess_exec("/bin/sh", "-ec", "true")
            await process.wait()

    before = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(at_once)))
    return count / (time.perf_counter() - before)


if __name__ == "__main__":
    print(uvloop.run(measure(int(sys.argv[1]), int(sys.argv[2]))))
