"""How fast a history is made from a log on a live JetStream: `python -m tests.bench.history_replay TASKS`.

In a process of its own, as a projector is. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import uvloop

from agentflow.bus import Bus
from agentflow.domain.fold import fold
from agentflow.domain.state import Namespace
from agentflow.frames import judge
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import BATCH_FRAMES_MAX, Done, Frame, Log, Message
from agentflow_nodes.namespaces import collect_garbage_seldom
from agentflow_projections.database import Database
from agentflow_projections.projector import Projector
from tests.bench.history_log import Writer
from tests.servers import NatsServer

NAMESPACE: Final = "default"
_BATCH: Final = BATCH_FRAMES_MAX // 4


async def write(log: Log, tasks: int, *, mixed: bool = False) -> Writer:
    """Fill a log with the events of so many tasks."""
    state = Namespace(NAMESPACE)

    def folded(message: Message) -> None:
        fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))

    writer = Writer(state, folded, mixed=mixed)
    await _append(log, writer.begin())
    await _append(log, writer.work(tasks))
    return writer


async def _append(log: Log, messages: Iterable[Message]) -> None:
    frames: list[Frame] = []
    for message in messages:
        frames.append(Frame(message.subject, message.data, headers=message.headers))
        if len(frames) == _BATCH:
            assert isinstance(await log.append_batch(frames), Done)
            frames = []
    if frames:
        assert isinstance(await log.append_batch(frames), Done)


async def replay(log: Log, path: Path, until: int) -> tuple[float, float]:
    """Seconds and CPU seconds that a fresh file takes."""
    begun, used = time.perf_counter(), cpu_s()
    with Database(path, NAMESPACE) as database:
        projector = Projector(log, database)
        await projector.open()
        await projector.run(until=until)
        took = time.perf_counter() - begun, cpu_s() - used
        await projector.close()
    return took


async def measure(tasks: int) -> dict[str, float]:
    """Write a log, and replay it."""
    with tempfile.TemporaryDirectory(prefix="af-history-") as folder:
        async with (
            NatsServer(sync="2m") as server,
            Bus(server.url, name="bench") as bus,
            JetStreamLog(bus, NAMESPACE) as log,
        ):
            begun = time.perf_counter()
            writer = await write(log, tasks)
            written_s = time.perf_counter() - begun
            path = Path(folder) / "history.duckdb"
            took, used = await replay(log, path, writer.state.seq)
            size = path.stat().st_size
    return {
        "replay_events": writer.events,
        "replay_events_per_s": writer.events / took,
        "replay_cpu_us_per_event": used / writer.events * 1e6,
        "replay_file_bytes_per_event": size / writer.events,
        "log_written_events_per_s": writer.events / written_s,
    }


def cpu_s() -> float:
    """CPU seconds of this process, and of those it started that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Print the figures as JSON."""
    collect_garbage_seldom()
    print(json.dumps(uvloop.run(measure(int(sys.argv[1])))))


if __name__ == "__main__":
    main()
