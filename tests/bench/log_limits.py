"""How fast the log is, by hand: publish cost, append latency alone, follow rate.

    python tests/bench/log_limits.py [messages]

Starts its own nats-server, which syncs every write to disk.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from statistics import median

import uvloop

sys.path.insert(0, str(Path(__file__).parents[2]))

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame
from tests.servers import NatsServer

_SUBJECT = "af.bench.task.submitted.cli"


def report(what: str, count: int, before: float, cpu: float) -> None:
    """Print the rate since `before` and what each message cost this process since `cpu`."""
    rate = count / (time.perf_counter() - before)
    print(f"{what}: {rate:,.0f}/s, {(time.process_time() - cpu) / count * 1e6:.1f} us of CPU each")


async def append_alone(log: JetStreamLog, count: int) -> None:
    """One append in flight: what a person waits for."""
    taken_s: list[float] = []
    for number in range(count):
        before = time.perf_counter()
        assert isinstance(await log.append(Frame(_SUBJECT, b"x" * 500, f"alone-{number}")), Done)
        taken_s.append(time.perf_counter() - before)
    taken_s.sort()
    print(f"append alone: p50 {median(taken_s) * 1e3:.2f} ms, p99 {taken_s[count * 99 // 100] * 1e3:.2f} ms")


async def append_parallel(log: JetStreamLog, count: int, writers: int) -> None:
    """Many appends in flight: what one costs this process."""

    async def write(writer: int) -> None:
        for number in range(count // writers):
            frame = Frame(_SUBJECT, b"x" * 500, f"p{writers}-{writer}-{number}")
            assert isinstance(await log.append(frame), Done)

    before, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(write(writer) for writer in range(writers)))
    report(f"append, {writers} in flight", count, before, cpu)


async def append_batches(log: JetStreamLog, count: int, size: int) -> None:
    """Atomic batches, one at a time."""
    before, cpu = time.perf_counter(), time.process_time()
    for batch in range(count // size):
        frames = [Frame(_SUBJECT, b"x" * 500, f"b{batch}-{number}") for number in range(size)]
        assert isinstance(await log.append_batch(frames), Done)
    report(f"append in batches of {size}", count, before, cpu)


async def follow(log: JetStreamLog) -> None:
    """Read the whole log."""
    last = (await log.identity()).last_seq
    before, cpu, read = time.perf_counter(), time.process_time(), 0
    async for messages in log.follow(0):
        read += len(messages)
        if messages[-1].seq >= last:
            break
    report("follow", read, before, cpu)


async def main(count: int) -> None:
    """Run all of it."""
    async with (
        NatsServer() as server,
        Bus(server.url, name="bench") as bus,
        JetStreamLog(bus, "bench") as log,
    ):
        await append_alone(log, 500)
        await append_parallel(log, 5000, 16)
        await append_parallel(log, 20000, 200)
        await append_batches(log, count, 500)
        await follow(log)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000))
