"""The worker's end of its keeper: started, fed, started again, ended. See `keeper`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from msgspec import structs

from agentflow import wire
from agentflow.client.function import Function
from agentflow.frames import encode
from agentflow.logs import get_logger
from agentflow_nodes.master.liveness import Heartbeat
from agentflow_nodes.worker.cleanup import without_marks
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.keeper import Charge

_MODULE: Final = "agentflow_nodes.worker.keeper"
_RESTART_S: Final = 1.0
_RESTART_S_MAX: Final = 60.0

_log = get_logger(__name__)


def needs_keeper(functions: Mapping[str, Function[..., Any]]) -> bool:
    """Whether a task may run inside the worker's own process."""
    return any(function.mode != "process" for function in functions.values())


class Kept:
    """A worker that is spoken for. An async context manager: left, its keeper is gone.

    Entering starts the keeper and does not wait for it.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._charge: Final = Charge(
            config.url,
            f"agentflow worker {config.name}",
            wire.heartbeat(config.namespace, config.name),
            os.getpid(),
            config.heartbeat_s,
            config.stall_s_max,
        )
        self._last = b""
        self._pipe = -1
        self._task: asyncio.Task[None] | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        # At once, not in the task: whatever the first assignment does, its keeper is on the way.
        self._try_launch()
        self._task = asyncio.create_task(self._keep(), name="worker keeper")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._hang_up()
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()

    def beat(self, beat: Heartbeat) -> None:
        """The worker's own heartbeat: what the keeper is to say if no other follows."""
        self._last = encode(structs.replace(beat, stalled=True)) + b"\n"
        self._tell(self._last)

    def _tell(self, line: bytes) -> None:
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            if self._popen is not None:
                self._popen.kill()  # it hangs: another one takes its place
        except OSError:
            pass  # it is gone, or none is there: its end is noticed elsewhere

    def _try_launch(self) -> None:
        try:
            self._launch()
        except OSError as error:  # no descriptors or processes left, which may pass
            self._popen = None
            _log.warning("keeper_not_started", error=str(error))

    def _launch(self) -> None:
        read_end, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", _MODULE],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                env=without_marks(os.environ),
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        self._tell(encode(self._charge) + b"\n" + self._last)

    async def _keep(self) -> None:
        """Start another one whenever it ends, ever more seldom."""
        pause_s = _RESTART_S
        while True:
            if self._popen is not None:
                status = await _ended(self._popen)
                _log.warning("keeper_died", status=status)
            self._hang_up()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESTART_S_MAX)
            self._try_launch()

    def _hang_up(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


async def _ended(popen: subprocess.Popen[bytes]) -> int:
    """Wait for its end without a thread; its status."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        pidfd = os.pidfd_open(popen.pid)
    except OSError:  # gone, and its status was taken by somebody else in this process
        return popen.wait()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return popen.wait()
