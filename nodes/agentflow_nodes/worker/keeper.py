"""Beats for a worker whose event loop stands still.

A function in async or thread mode runs inside the worker's process. One that keeps the
interpreter to itself (a C extension that does not release it, a regular expression gone
wild) stops the event loop with all it does, the heartbeat too; the worker would be given up
although it lives. So such a worker keeps one companion process, this module, with a
connection of its own.

The worker holds the write end of the keeper's stdin: in the first line it says what to do
(`Charge`), with each heartbeat of its own it sends a line (what to say in its place, should
no other follow), and at the end of the file the keeper ends. While lines come it is silent.
When none came for 1.5 intervals and the worker's process runs, it beats in its place, for
`stall_s_max` at the most. A worker that is stopped (SIGSTOP, a debugger) or dead is not spoken
for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Final

import msgspec
from msgspec import Struct

from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow.logs import get_logger
from agentflow_nodes.orphans import be_killed_with_parent

MISSED: Final = 1.5
"""Intervals without a heartbeat after which the worker counts as stalled."""
LOOKS: Final = 4
"""Looks at the worker within one interval."""

_RUNS: Final = b"RSDI"
"""States of a process that goes on by itself; the others are stopped, traced, dead."""
_READ_BYTES: Final = 65536
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_log = get_logger(__name__)


class Charge(Struct, frozen=True):
    """Whom to keep, and how."""

    url: str
    name: str
    subject: str
    """Where heartbeats go."""
    pid: int
    heartbeat_s: float
    stall_s_max: float


class Keeper:
    """What the keeper knows of its worker, fed through a pipe."""

    def __init__(self, charge: Charge, bus: Bus, rest: bytes = b"") -> None:
        self._charge = charge
        self._bus = bus
        self._rest = rest
        self._beat = b""
        self._beaten_at = time.monotonic()
        self._said_at = 0.0
        self._over = asyncio.Event()
        self._take_lines()

    async def keep(self, pipe: int) -> None:
        """Look after the worker until it has gone."""
        asyncio.get_running_loop().add_reader(pipe, self._readable, pipe)
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self._charge.heartbeat_s / LOOKS)
            self._look()

    def _readable(self, pipe: int) -> None:
        data = os.read(pipe, _READ_BYTES)
        if not data:
            asyncio.get_running_loop().remove_reader(pipe)
            self._over.set()
        self._rest += data
        self._take_lines()

    def _take_lines(self) -> None:
        *lines, self._rest = self._rest.split(b"\n")
        if lines:
            self._beat = lines[-1]
            self._beaten_at = time.monotonic()

    def _look(self) -> None:
        """Speak for the worker if it lives and does not speak itself."""
        charge, now = self._charge, time.monotonic()
        silent_s = now - self._beaten_at
        if not MISSED * charge.heartbeat_s < silent_s <= charge.stall_s_max or not self._beat:
            return
        if now - self._said_at >= charge.heartbeat_s and goes_on(charge.pid):
            self._said_at = now
            with contextlib.suppress(Disconnected):
                self._bus.publish(charge.subject, self._beat)


def goes_on(pid: int) -> bool:
    """Whether a process lives and is not stopped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib is not worth loading
            state = file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in _RUNS


def _first_line(pipe: int) -> tuple[bytes, bytes]:
    """The first line, and what came after it. Raises EOFError if the worker ended before."""
    read = b""
    while b"\n" not in read:
        data = os.read(pipe, _READ_BYTES)
        if not data:
            raise EOFError
        read += data
    line, _, rest = read.partition(b"\n")
    return line, rest


async def _main(charge: Charge, rest: bytes) -> None:
    # A server that cannot be reached now may be when it matters.
    async with Bus(charge.url, name=f"{charge.name} keeper", connect_timeout_s=charge.stall_s_max) as bus:
        await Keeper(charge, bus, rest).keep(0)


def main() -> None:
    """The keeper process: ends with its worker, whatever becomes of that."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    be_killed_with_parent()
    with contextlib.suppress(EOFError, Disconnected):
        line, rest = _first_line(0)
        charge = msgspec.json.decode(line, type=Charge)
        if os.getppid() == charge.pid:
            asyncio.run(_main(charge, rest))


if __name__ == "__main__":
    main()
