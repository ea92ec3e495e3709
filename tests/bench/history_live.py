"""A projector beside a cluster at full load: how far behind it is, what it costs, how it answers meanwhile.

python -m tests.bench.history_live URL FOLDER     the projector's process; the bench starts it
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Final

import uvloop

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Message
from agentflow_nodes.namespaces import collect_garbage_seldom
from agentflow_projections.database import Database
from agentflow_projections.hydrate import StateFile, history_path
from agentflow_projections.projector import Projector
from tests.bench.figures import Figures, percentile
from tests.bench.history_replay import NAMESPACE, cpu_s
from tests.bench.noop import measure
from tests.bench.stack import ROOT, Stack

_POINT_QUERY: Final = """
SELECT c.state, c.logged_at, c.attempt
FROM task_submissions AS s JOIN task_changes AS c USING (task)
WHERE s.id = $id AND c.task = $number
ORDER BY c.pos
"""
_RECENT: Final = (
    "SELECT id, task FROM task_submissions WHERE task = (SELECT max(task) - 500 FROM task_submissions)"
)
_QUERY_PAUSE_S: Final = 0.02


class TimedLog(JetStreamLog):
    """A log that remembers when each message that was read had been stored."""

    def __init__(self, bus: Bus, namespace: str) -> None:
        super().__init__(bus, namespace)
        self.read_of: deque[tuple[int, int]] = deque()

    async def follow(self, after: int, *, subjects: Any = ()) -> AsyncGenerator[list[Message], None]:
        following: AsyncIterator[list[Message]] = super().follow(after, subjects=subjects)
        async for messages in following:
            self.read_of.extend((each.seq, each.time_ns) for each in messages)
            yield messages


class Following:
    """What the projector's process measures between the signals of the bench."""

    def __init__(self, log: TimedLog, database: Database) -> None:
        self.log = log
        self.database = database
        self.lags_ms: list[float] = []
        self.asked_ms: list[float] = []
        self._cpu_s = cpu_s()

    def committed(self, seq: int) -> None:
        """How old each message was when it could be asked about."""
        now_ns = time.time_ns()
        while self.log.read_of and self.log.read_of[0][0] <= seq:
            self.lags_ms.append((now_ns - self.log.read_of.popleft()[1]) / 1e6)

    async def ask(self) -> None:
        """Ask about a task that ended lately, again and again, beside the writer."""
        while True:
            await asyncio.sleep(_QUERY_PAUSE_S)
            self.asked_ms.append(await asyncio.to_thread(self._ask_once))

    def _ask_once(self) -> float:
        # A task's number is its place in the table: neither question reads more than a block.
        found = self.database.ask(_RECENT).fetchone()
        if found is None:
            return 0.0
        begun = time.perf_counter()
        rows = self.database.ask(_POINT_QUERY, {"id": found[0], "number": found[1]}).fetchall()
        assert rows
        return (time.perf_counter() - begun) * 1000

    def reset(self) -> None:
        """From here on it counts."""
        self.lags_ms.clear()
        self.asked_ms.clear()
        self._cpu_s = cpu_s()

    def figures(self) -> dict[str, float]:
        """Lags and times of answers since `reset`."""
        asked = [each for each in self.asked_ms if each]
        return {
            "lag_p50_ms": percentile(self.lags_ms, 0.5),
            "lag_p99_ms": percentile(self.lags_ms, 0.99),
            "lag_max_ms": max(self.lags_ms),
            "point_query_p50_ms": percentile(asked, 0.5),
            "point_query_p99_ms": percentile(asked, 0.99),
            "point_queries": len(asked),
            "projector_cpu_s": cpu_s() - self._cpu_s,
        }


async def follow(url: str, folder: Path) -> None:
    """Be a projector until SIGTERM; on SIGUSR1 begin to count, at the end print what was counted."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    path = history_path(folder, NAMESPACE)
    with Database(path, NAMESPACE) as database:
        async with Bus(url, name="projector") as bus, TimedLog(bus, NAMESPACE) as log:
            projector = Projector(log, database, StateFile(path, NAMESPACE))
            await projector.open()
            following = Following(log, database)
            loop.add_signal_handler(signal.SIGUSR1, following.reset)
            running = asyncio.create_task(projector.run(progress=following.committed))
            asking = asyncio.create_task(following.ask())
            print("ready", flush=True)
            await stop.wait()
            last = (await log.identity()).last_seq
            while projector.seq < last and not running.done():
                await asyncio.sleep(0.01)
            for task in (asking, running):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await projector.close()
    print(json.dumps(following.figures()), flush=True)


async def beside_noop(tasks: int, runs: int) -> Figures:
    """The no-op benchmark of part one, with a projector on the same machine."""
    with tempfile.TemporaryDirectory(prefix="af-history-") as folder:
        async with Stack(workers=1, slots=8) as stack:
            alone = await measure(stack, min(tasks, 20_000))
            projector = await _start(stack.url, folder)
            await measure(stack, min(tasks, 20_000))
            os.kill(projector.pid, signal.SIGUSR1)
            found = [await measure(stack, tasks) for _ in range(runs)]
            projector.terminate()
            assert projector.stdout is not None
            counted = json.loads(await asyncio.wait_for(projector.stdout.readline(), 120))
            await projector.wait()
    return {
        **counted,
        "noop_warm_up_per_s": alone["tasks_per_s"],
        "noop_with_projector_per_s": statistics.median(run["tasks_per_s"] for run in found),
        "projector_cpu_us_per_task": counted["projector_cpu_s"] / (tasks * runs) * 1e6,
    }


async def _start(url: str, folder: str) -> asyncio.subprocess.Process:
    node = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.history_live",
        url,
        folder,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert node.stdout is not None
    assert await asyncio.wait_for(node.stdout.readline(), 60) == b"ready\n"
    return node


def main() -> None:
    """Parse `URL FOLDER`."""
    collect_garbage_seldom()
    uvloop.run(follow(sys.argv[1], Path(sys.argv[2])))


if __name__ == "__main__":
    main()
