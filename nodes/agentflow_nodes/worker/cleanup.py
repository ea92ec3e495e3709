"""What it takes to leave nothing behind: a view of all processes, and a helper that outlives the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from agentflow.logs import get_logger
from agentflow_nodes.worker import reaper
from agentflow_nodes.worker.reaper import MARK_VARIABLE, TOKEN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping

SWEEP_PAUSE_S = 0.02
HELPER_EXIT_S = 5.0
HELPER_RESTART_S = 1.0
HELPER_RESTARTS_MAX = 100

_log = get_logger(__name__)


class Census:
    """Looks through /proc in a thread, once for all who ask at the same time."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[list[reaper.Seen]] | None = None

    async def take(self) -> list[reaper.Seen]:
        """The living processes, as of a moment after this call."""
        if self._next is None:
            self._next = asyncio.create_task(self._take(), name="process-census")
        return await asyncio.shield(self._next)

    async def sweep(self, accept: Callable[[reaper.Seen], bool]) -> int:
        """Kill until nothing is left that `accept` agrees to; how many there were, roughly."""
        killed = 0
        for _ in range(reaper.SWEEP_PASSES_MAX):
            found = [seen for seen in await self.take() if accept(seen)]
            if not found:
                break
            for seen in found:
                reaper.strike(seen, signal.SIGKILL)
            killed += len(found)
            await asyncio.sleep(SWEEP_PAUSE_S)
        return killed

    async def _take(self) -> list[reaper.Seen]:
        try:
            await self._turn.acquire()
        finally:
            self._next = None
        try:
            return await asyncio.to_thread(reaper.census)
        finally:
            self._turn.release()


async def uninterrupted(work: Coroutine[None, None, None]) -> None:
    """Await `work` to its end; a cancellation meanwhile is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


def without_marks(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without what marks our own processes."""
    return {name: value for name, value in env.items() if name not in (TOKEN_VARIABLE, MARK_VARIABLE)}


class Helper:
    """Our end of the reaper process; starts another one should it die."""

    def __init__(self, mark: str, groups: Collection[int]) -> None:
        self._mark = mark
        self._groups = groups
        self._restarts = 0
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._released = False
        self._launch()

    def started(self, pgid: int) -> None:
        """A process group to be killed should we die."""
        self._tell(b"+%d\n" % pgid)

    def ended(self, pgid: int) -> None:
        """The process group is gone; its number may be used again."""
        self._tell(b"-%d\n" % pgid)

    async def release(self) -> None:
        """Let the helper go and wait until it has gone."""
        self._released = True
        self._tell(b"q\n")
        self._hang_up()
        try:
            async with asyncio.timeout(HELPER_EXIT_S):
                await self._gone.wait()
        except TimeoutError:
            self._popen.kill()
            self._popen.wait()

    def _launch(self) -> None:
        read_end, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - our own interpreter and file
                [sys.executable, "-I", "-S", reaper.__file__, str(os.getpid()), self._mark],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=without_marks(os.environ),
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        for pgid in self._groups:
            self.started(pgid)

    def _hang_up(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _tell(self, line: bytes) -> None:
        """A full pipe means that the helper hangs: it is replaced. A broken one is noticed by its pidfd."""
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            self._popen.kill()
        except OSError:
            pass

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._popen.wait()
        self._gone.set()
        if self._released:
            return
        self._hang_up()
        _log.warning("reaper_died", status=status, restarts=self._restarts)
        self._relaunch()

    def _relaunch(self) -> None:
        if self._released or self._restarts == HELPER_RESTARTS_MAX:
            return
        self._restarts += 1
        try:
            self._launch()
            self._gone.clear()
        except OSError as error:  # no descriptors or processes left, which may pass
            self._hang_up()
            _log.warning("reaper_not_started", error=str(error))
            self._loop.call_later(HELPER_RESTART_S, self._relaunch)
