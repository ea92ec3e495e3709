"""Nodes as processes: started, killed, paused, and started again when they end, as an init would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from msgspec import Struct

from tests.chaos.journal import Journal

ROOT: Final = Path(__file__).parents[2]
READY_TIMEOUT_S: Final = 60.0
_RESTART_PAUSE_S: Final = 0.2
_SHIM: Final = Path(__file__).parent / "clock"


class Clock:
    """A wall clock of a node's own, that can jump; durations and the monotonic clock stay true.

    A shim for Python's own clocks. Not libfaketime: with it `time.sleep` fails (EINVAL) where the
    monotonic clock is left alone, and a process that is killed can leave the others' semaphore locked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)

    def set(self, offset_s: float) -> None:
        """From about a second on the clock is wrong by so much."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(f"{offset_s:+g}\n")
        fresh.replace(self._path)

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to be told to go by this clock."""
        path = os.pathsep.join(filter(None, (str(_SHIM), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "CHAOS_CLOCK": str(self._path)}


class Exit(Struct, frozen=True):
    """How a process ended."""

    node: str
    pid: int
    at: float
    """Monotonic."""
    code: int
    ready: bool
    """Whether it had been ready."""
    by_us: bool


class Node:
    """A process that is kept running. An async context manager: entered means started, left means dead.

    What is not `lasting` has a task to do: it is started again only if it was killed.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        exits: Journal,
        *,
        lasting: bool = True,
    ) -> None:
        self.name: Final = name
        self._argv = argv
        self._env = {**os.environ, **env}
        self._log_path = folder / f"{name}.log"
        self._exits = exits
        self._lasting = lasting
        self._process: asyncio.subprocess.Process | None = None
        self._killed = self._leaving = False
        self._hold = asyncio.Event()
        self._hold.set()
        self._keeper: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        """Set while it runs and has said that it is ready."""
        self.failures = 0
        """Times it ended by itself after it had been ready."""

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        self._hold.set()
        self.kill()
        if self._keeper is not None:
            await self._keeper

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    @property
    def done(self) -> bool:
        """Whether it has ended for good."""
        return self._keeper is not None and self._keeper.done()

    def kill(self) -> None:
        """SIGKILL."""
        self._killed = True
        self._send(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._send(signal.SIGCONT)

    def hold(self) -> None:
        """Do not start it again for the time being."""
        self._hold.clear()

    def release(self) -> None:
        """Start it again if it has ended."""
        self._hold.set()

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep(self) -> None:
        while True:
            await self._run()
            if self._leaving or not (self._lasting or self._killed):
                return
            await asyncio.sleep(_RESTART_PAUSE_S)
            await self._hold.wait()

    async def _run(self) -> None:
        self._killed = False
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=self._env,
                start_new_session=True,
            )
        process = self._process
        if self._leaving:
            self.kill()
        assert process.stdout is not None
        was_ready = bool(await process.stdout.readline())
        if was_ready:
            self.ready.set()
        code = await process.wait()
        self.ready.clear()
        by_us = self._killed or self._leaving
        self.failures += was_ready and not by_us
        self._exits.write(
            node=self.name, pid=process.pid, at=time.monotonic(), code=code, ready=was_ready, by_us=by_us
        )


def agentflow(*arguments: str) -> list[str]:
    """The command line of a node that ends with whoever started it."""
    return [sys.executable, "-m", "agentflow_nodes", *arguments, "--supervised"]
