"""One process of nats-server, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Any, Final, Self

from agentflow.ending import end_process
from agentflow.errors import OperatingError
from agentflow.logs import get_logger
from agentflow_nodes.embedded.folder import FULL_BYTES, size, tail_of
from agentflow_nodes.embedded.program import launcher

LOG_FILE: Final = "nats-server.log"

# Recovering a large store takes its time.
_START_S_MAX: Final = 120.0
_POLL_INTERVAL_S: Final = 0.002
_FULL_S: Final = 2.0
_STOP_S_MAX: Final = 10.0
_TAIL_LINES: Final = 20
_INFORMING: Final = " [INF] "
_IN_USE: Final = re.compile(r"listen tcp \S*?:(\d+): bind: address already in use")

_log = get_logger(__name__)


class Ports:
    """Where a server listens, as it wrote it itself."""

    def __init__(self, text: str) -> None:
        found = json.loads(text)
        self.client: Final = int(found["nats"][0].rpartition(":")[2])
        monitoring = found.get("monitoring")
        self.monitoring: Final = int(monitoring[0].rpartition(":")[2]) if monitoring else None


class Run:
    """One server process, from its start to its end."""

    def __init__(self, process: Process, folder: Path, output: int, log_from: int) -> None:
        self.process: Final = process
        self._folder = folder
        self._output = output
        self._log_from = log_from
        self._began = asyncio.get_running_loop().time()

    @classmethod
    async def launch(cls, binary: Path, config: Path, folder: Path, lock_fd: int) -> Self:
        """Start the process. Raises OperatingError if that is impossible."""
        log_from = size(folder / LOG_FILE)
        output = os.memfd_create("nats-server")
        command = [str(binary), "-c", str(config)]
        try:
            process = await asyncio.create_subprocess_exec(
                *(launcher() + command),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock_fd,),
                start_new_session=True,
                cwd=folder,
            )
        except BaseException as error:
            os.close(output)
            if isinstance(error, OSError):
                raise OperatingError(f"cannot start {binary}: {error}") from error
            raise
        return cls(process, folder, output, log_from)

    async def ready(self) -> Ports:
        """Wait until the server listens. Raises OperatingError if it ends instead."""
        while (waited_s := asyncio.get_running_loop().time() - self._began) < _START_S_MAX:
            ports = self._ports()
            if ports is not None:
                # What it said while it looked for the others explains nothing later.
                self._log_from = size(self._folder / LOG_FILE)
                return ports
            if self.process.returncode is not None:
                raise OperatingError(self._why_not())
            if waited_s > _FULL_S and self._full():  # it runs, and cannot write that it is ready
                raise OperatingError(f"{self._full()}nats-server does not get ready; it says:\n{self.tail()}")
            await asyncio.sleep(_POLL_INTERVAL_S)
        raise OperatingError(f"nats-server is not ready after {_START_S_MAX} s; it says:\n{self.tail()}")

    async def wait_dead(self) -> float:
        """Wait until the process has ended; returns how many seconds it ran."""
        await self.process.wait()
        return asyncio.get_running_loop().time() - self._began

    async def stop(self) -> None:
        """Ask it to end, and kill it if it does not. Doing it twice is harmless."""
        if await end_process(self.process, _STOP_S_MAX):
            _log.warning("nats-server does not end: killed", pid=self.process.pid)
        output, self._output = self._output, -1
        if output >= 0:
            os.close(output)

    def obituary(self) -> dict[str, Any]:
        """How it ended, for the log."""
        return {"pid": self.process.pid, "code": self.process.returncode, "said": self.tail()}

    def end(self) -> str:
        """How it ended, for people: with its last words, unless it was killed."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        said = self.tail().splitlines()[-1:]
        return ": ".join([f"ended with code {code}", *said])

    def tail(self) -> str:
        """The last lines this process wrote, to its log or elsewhere, without the merely informing."""
        output = tail_of(self._output, 0) if self._output >= 0 else ""
        try:
            fd = os.open(self._folder / LOG_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            logged = ""
        else:
            # A shorter file is a new one: the old was full.
            logged = tail_of(fd, self._log_from if os.fstat(fd).st_size >= self._log_from else 0)
            os.close(fd)
        lines = (logged + output).splitlines()
        telling = [line for line in lines if line.strip() and _INFORMING not in line]
        return "\n".join(telling[-_TAIL_LINES:] or lines[-1:])

    def _ports(self) -> Ports | None:
        # Written in place: until it is complete it is no JSON.
        for file in self._folder.glob(f"*_{self.process.pid}.ports"):
            with contextlib.suppress(OSError, ValueError, LookupError):
                return Ports(file.read_text())
        return None

    def _why_not(self) -> str:
        tail = self.tail()
        in_use = _IN_USE.search(tail)
        if in_use is not None:
            return (
                f"port {in_use[1]} is in use by another program: end that program,"
                " or choose another port (0 takes one that is free)"
            )
        code = self.process.returncode
        return f"{self._full()}nats-server ended with code {code} while starting; it says:\n{tail}"

    def _full(self) -> str:
        """The words that the disk is full, if it is."""
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return ""
        return f"the disk of {self._folder} is full ({free} bytes free): " if free < FULL_BYTES else ""
