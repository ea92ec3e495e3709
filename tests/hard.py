"""Task functions that are hard on the worker they run in; importable, as `tests.app` is."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from pathlib import Path

import agentflow

_MICROSECONDS = 1_000_000
_HOPELESS = re.compile(r"(a+)+b")


def _hold_interpreter(seconds: float) -> None:
    """Keep the interpreter lock while doing nothing: PyDLL, unlike CDLL, does not give it away."""
    ctypes.PyDLL(None).usleep(int(seconds * _MICROSECONDS))


@agentflow.task(name="hold_in_thread")
def hold_in_thread(seconds: float) -> int:
    _hold_interpreter(seconds)
    return agentflow.current().attempt


@agentflow.task(name="hold_async")
async def hold_async(seconds: float) -> int:
    _hold_interpreter(seconds)
    return agentflow.current().attempt


@agentflow.task(name="match_wildly")
def match_wildly(seconds: float) -> int:
    """One regular expression after the other, each longer than the last, none of which lets go."""
    until = time.monotonic() + seconds
    length = 20
    while time.monotonic() < until:
        _HOPELESS.match("a" * length)
        length += 1
    return agentflow.current().attempt


@agentflow.task(name="kill_worker")
def kill_worker(folder: str, lives: int) -> str:
    """Kill the worker it runs in, as often as it takes `lives`."""
    task = agentflow.current()
    with (Path(folder) / "killed").open("a") as journal:
        journal.write(f"{task.attempt} {task.worker}\n")
    if len((Path(folder) / "killed").read_text().splitlines()) <= lives:
        # Not before the log says that it has started: only then does it cost the worker's life.
        while not (Path(folder) / f"kill.{task.attempt}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return task.worker


@agentflow.task(name="journal")
def journal(path: str, go: str) -> str:
    """Write down who runs it, and when it is let go."""
    task = agentflow.current()
    with Path(path).open("a") as file:
        file.write(f"{task.attempt} {task.worker}\n")
    while not Path(go).exists():
        time.sleep(0.01)
    return task.worker
