"""The floor under a task's latency: three processes, three fsynced messages, and nothing else.

A client appends a message, a second process answers it with another, a third with a third,
and the second tells the client: the way of a task without judging, folding, planning, fences
or running. What a task takes beyond this is AgentFlow's own; what this takes is the
machine's, its disk's and NATS'.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Final

import uvloop

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Frame
from tests.bench.stack import ROOT
from tests.servers import NatsServer

_NAMESPACE: Final = "relay"
_SUBJECT: Final = f"af.{_NAMESPACE}.task.{{}}.x"
_TOLD: Final = "relay.told"
_DATA: Final = b'[{"id":"019a0000-0000-7000-8000-000000000000","function":"bench.noop","args":[1]}]'


async def measure(messages: int, rate: float) -> list[float]:
    """How long each of `messages` took on its way, begun at a steady rate, seconds."""
    async with (
        NatsServer() as server,
        Bus(server.url, name="relay client") as bus,
        JetStreamLog(bus, _NAMESPACE) as log,
    ):
        stations = [await _start(role, server.url) for role in ("decide", "run")]
        told = asyncio.Event()
        await bus.subscribe(_TOLD, lambda *_: told.set())
        times: list[float] = []
        begin = time.perf_counter()
        for number in range(messages):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            before = time.perf_counter()
            told.clear()
            await log.append(Frame(_SUBJECT.format("submitted"), _DATA, f"client.{number}"))
            await told.wait()
            times.append(time.perf_counter() - before)
        for station in stations:
            station.terminate()
            await station.wait()
    return times


async def _start(role: str, url: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.relay",
        role,
        url,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 60) == b"ready\n"
    return process


async def _station(url: str, hears: str, answer: Callable[[Bus, JetStreamLog, str, bytes], None]) -> None:
    """Answer every message of some kinds."""
    async with Bus(url, name=f"relay {hears}") as bus, JetStreamLog(bus, _NAMESPACE) as log:
        print("ready", flush=True)
        subjects = [_SUBJECT.format("assigned")] if hears == "assigned" else []
        async for messages in log.follow(0, subjects=subjects):
            for message in messages:
                answer(bus, log, message.subject, message.data)


def _decides() -> Callable[[Bus, JetStreamLog, str, bytes], None]:
    append = _appends("assigned")

    def answer(bus: Bus, log: JetStreamLog, subject: str, data: bytes) -> None:
        if ".submitted." in subject:
            append(bus, log, subject, data)
        elif ".completed." in subject:
            bus.publish(_TOLD, data)

    return answer


def _appends(kind: str) -> Callable[[Bus, JetStreamLog, str, bytes], None]:
    numbers = itertools.count()
    under_way: set[asyncio.Task[object]] = set()

    def answer(_bus: Bus, log: JetStreamLog, _subject: str, data: bytes) -> None:
        frame = Frame(_SUBJECT.format(kind), data, f"{kind}.{next(numbers)}")
        task: asyncio.Task[object] = asyncio.create_task(log.append(frame))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    return answer


if __name__ == "__main__":
    role, url = sys.argv[1:3]
    uvloop.run(
        _station(url, "everything", _decides())
        if role == "decide"
        else _station(url, "assigned", _appends("completed"))
    )
