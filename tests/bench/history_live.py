"""A history that follows a cluster at full load: how far behind it is, what it costs, how it answers meanwhile.

Kept by the master itself (`agentflow master --history`, as in `agentflow up`), and by a projector beside it.

python -m tests.bench.history_live master|projector URL [FOLDER]     the process measured; the bench starts it
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from agentflow.bus import Bus
from agentflow.frames import Judged
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Message
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.history import History
from agentflow_nodes.master.node import Master
from agentflow_nodes.namespaces import collect_garbage_seldom, take_short_turns
from agentflow_projections.database import Database
from agentflow_projections.file_writer import FileWriter
from agentflow_projections.hydrate import StateFile, history_path
from agentflow_projections.projector import Projector
from tests.bench.figures import Figures, percentile
from tests.bench.history_replay import NAMESPACE
from tests.bench.noop import measure
from tests.bench.stack import ROOT, Stack, cpu_s_of

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
_LOOK_S: Final = 0.005
_ASKED: Final = "AGENTFLOW_BENCH_ASKED"
"""Set: questions are asked all the time, which takes CPU for itself."""


class Watching:
    """How old each message was when it could be asked about, and how long answers took."""

    def __init__(self, writer: FileWriter, database: Database) -> None:
        self.writer = writer
        self.database = database
        self.waiting: deque[tuple[int, int]] = deque()
        self.lags_ms: list[float] = []
        self.asked_ms: list[float] = []

    def timed(self, apply: Callable[[Message, Judged], object]) -> Callable[[Message, Judged], object]:
        """The same, and remember when the message had been stored."""

        def noting(message: Message, judged: Judged) -> None:
            self.waiting.append((message.seq, message.time_ns))
            apply(message, judged)

        return noting

    async def look(self) -> None:
        """What is in the file by now?"""
        while True:
            await asyncio.sleep(_LOOK_S)
            now_ns, seq = time.time_ns(), self.writer.seq
            while self.waiting and self.waiting[0][0] <= seq:
                self.lags_ms.append((now_ns - self.waiting.popleft()[1]) / 1e6)

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

    def figures(self) -> dict[str, float]:
        """Lags and times of answers since `reset`."""
        asked = [each for each in self.asked_ms if each]
        lags = {
            "lag_p50_ms": percentile(self.lags_ms, 0.5),
            "lag_p99_ms": percentile(self.lags_ms, 0.99),
            "lag_max_ms": max(self.lags_ms),
        }
        if not asked:
            return lags
        return {
            **lags,
            "point_query_p50_ms": percentile(asked, 0.5),
            "point_query_p99_ms": percentile(asked, 0.99),
            "point_queries": len(asked),
        }


async def lead(url: str, folder: Path | None) -> None:
    """Be a master until SIGTERM, and measure the history if it keeps one."""
    async with Master(MasterConfig(url=url, name="m1", history=folder)) as master:
        recording = master.seats[NAMESPACE].follower.recording
        if folder is None:
            await _until_told(None)
            return
        assert isinstance(recording, History)
        assert recording.writer is not None, "it keeps the history itself"
        watching = Watching(recording.writer, recording._database)
        recording.apply = watching.timed(recording.apply)
        await _until_told(watching)


async def follow(url: str, folder: Path) -> None:
    """Be a projector until SIGTERM, and measure."""
    path = history_path(folder, NAMESPACE)
    with Database(path, NAMESPACE) as database:
        async with Bus(url, name="projector") as bus, JetStreamLog(bus, NAMESPACE) as log:
            projector = Projector(log, database, StateFile(path, NAMESPACE))
            await projector.open()
            writer = projector._writer
            assert writer is not None
            watching = Watching(writer, database)
            writer.apply = watching.timed(writer.apply)  # type: ignore[method-assign,assignment]
            running = asyncio.create_task(projector.run())
            await _until_told(watching)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await projector.close()


async def _until_told(watching: Watching | None) -> None:
    """Until SIGTERM, and then until all that was read is in the file; on SIGUSR1 begin to count."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, watching.reset if watching is not None else int)
    print("ready", flush=True)
    if watching is None:
        await stop.wait()
        print("{}", flush=True)
        return
    tasks = [asyncio.create_task(watching.look())]
    if os.environ.get(_ASKED):
        tasks.append(asyncio.create_task(watching.ask()))
    await stop.wait()
    while watching.waiting:
        await asyncio.sleep(_LOOK_S)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    print(json.dumps(watching.figures()), flush=True)


async def beside_noop(tasks: int, runs: int) -> Figures:
    """The no-op benchmark of part one, several times in turn.

    Without a history; with one that the master keeps; that one, asked all the time; a projector beside.
    """
    ways: dict[str, list[dict[str, Any]]] = {"without": [], "kept": [], "asked": [], "beside": []}
    for _ in range(runs):
        for way, found in ways.items():
            found.append(await _measured(way, tasks))
    medians = {way: {key: _median(found, key) for key in found[0]} for way, found in ways.items()}
    without, kept, asked, beside = medians.values()
    return {
        **{key: value for key, value in kept.items() if key.startswith("lag")},
        **{key: value for key, value in asked.items() if key.startswith("point")},
        "noop_without_history_per_s": without["tasks_per_s"],
        "noop_with_projector_per_s": kept["tasks_per_s"],
        "noop_cpu_us_without_history": without["cpu_us_per_task"],
        "projector_cpu_us_per_task": kept["cpu_us_per_task"] - without["cpu_us_per_task"],
        "beside_lag_p99_ms": beside["lag_p99_ms"],
        "beside_noop_per_s": beside["tasks_per_s"],
        "beside_cpu_us_per_task": beside["projector_cpu_us"],
    }


def _median(found: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(each[key] for each in found))


async def _measured(way: str, tasks: int) -> dict[str, Any]:
    """One run, in a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="af-history-") as folder:
        async with Stack(masters=0, workers=0) as stack:
            roles = {"without": (("master",),), "beside": (("master",), ("projector", folder))}
            for role, *rest in roles.get(way, (("master", folder),)):
                stack.nodes[role] = await _start(role, stack.url, *rest, asked=way == "asked")
            await stack.start("worker", "w1", 8)
            await measure(stack, min(tasks, 20_000))
            watched = stack.nodes["projector" if way == "beside" else "master"]
            os.kill(watched.pid, signal.SIGUSR1)
            before = cpu_s_of(watched.pid)
            found = await measure(stack, tasks)
            watched.terminate()
            assert watched.stdout is not None
            counted = json.loads(await asyncio.wait_for(watched.stdout.readline(), 120))
            used = cpu_s_of(watched.pid) - before
            await watched.wait()
    return {**found, **counted, "projector_cpu_us": used / tasks * 1e6}


async def _start(role: str, url: str, *rest: str, asked: bool = False) -> asyncio.subprocess.Process:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    node = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.history_live", role, url, *rest),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, _ASKED: "yes" if asked else ""},
    )
    assert node.stdout is not None
    assert await asyncio.wait_for(node.stdout.readline(), 60) == b"ready\n"
    return node


def main() -> None:
    """Parse `master|projector URL [FOLDER]`."""
    collect_garbage_seldom()
    role, url, *folder = sys.argv[1:]
    where = Path(folder[0]) if folder else None
    if role == "projector":
        assert where is not None
        take_short_turns()
        uvloop.run(follow(url, where))
    else:
        uvloop.run(lead(url, where))


if __name__ == "__main__":
    main()
