"""Kills what a worker ran, once the worker itself is gone, however it went.

A worker that is killed with SIGKILL can clean up nothing, and its children would run on as orphans beside the
attempt that replaces them. So each `ProcessRunner` keeps one helper process, this file, run by path under
`python -I -S` (no site, no package: it starts in some 10 ms and needs the standard library only).

The runner holds the write end of the helper's stdin and says which process groups are alive:

    +<pgid>     a group was started
    -<pgid>     a group has ended
    q           nothing is left: go away

At the end of the file, or when the worker's pidfd says that it died (a process forked off the worker may hold
a copy of the pipe), every group still registered is killed, and then every process whose environment carries
the runner's mark: those that left their group with `setsid`, and one that was being started at that instant.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKEN_VARIABLE = "AGENTFLOW_ATTEMPT_TOKEN"  # noqa: S105 - the name of a variable, no secret
"""Environment variable that names the attempt a process belongs to."""

MARK_VARIABLE = "AGENTFLOW_RUNNER"
"""Environment variable that names the runner, and so the worker process, that started a process."""

COALESCE_S = 0.05
"""Pause after each read: a worker that starts thousands of processes a second must not wake us for each."""

SWEEP_PASSES_MAX = 100
QUIET_PASSES = 3
SWEEP_PAUSE_S = 0.02

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_READ_BYTES = 65536
_FILE_BYTES_MAX = 2 * 1024 * 1024
_STAT_FIELDS = 4


class Seen(NamedTuple):
    """A living process, as found in /proc."""

    pid: int
    session: int
    token: bytes | None
    mark: bytes | None


def look_at(pid: int) -> Seen | None:
    """What there is to know about `pid`; None if it is gone or a zombie."""
    stat = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if len(stat) < _STAT_FIELDS or stat[0] in b"ZX":
        return None
    environment = b"\0" + _read(f"/proc/{pid}/environ")
    return Seen(
        pid, int(stat[3]), _variable(environment, TOKEN_VARIABLE), _variable(environment, MARK_VARIABLE)
    )


def census() -> list[Seen]:
    """Every living process but this one."""
    me = os.getpid()
    names = (entry.name for entry in os.scandir("/proc"))
    found = (look_at(int(name)) for name in names if name.isdigit() and int(name) != me)
    return [seen for seen in found if seen is not None]


def strike(seen: Seen, signum: int) -> None:
    """Send a signal to the process that was seen.

    The pidfd is taken before a second look, so that a pid reused since the first one is never hit.
    """
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(seen.pid)
        try:
            if look_at(seen.pid) == seen:
                signal.pidfd_send_signal(fd, signum)
        finally:
            os.close(fd)


def _read(path: str) -> bytes:
    """The file's bytes, as far as the kernel hands them out."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    found = b""
    try:
        while len(found) < _FILE_BYTES_MAX and (part := os.read(fd, _READ_BYTES)):
            found += part
    except OSError:
        return b""
    finally:
        os.close(fd)
    return found


def _variable(environment: bytes, name: str) -> bytes | None:
    """The value of a variable in an environment whose every entry follows a zero byte."""
    entry = b"\0" + name.encode() + b"="
    start = environment.find(entry)
    if start < 0:
        return None
    start += len(entry)
    end = environment.find(b"\0", start)
    return environment[start : end if end >= 0 else None]


def kill_group(pgid: int, signum: int) -> None:
    """Signal a whole process group; it is no error if it is gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signum)


class _Register:
    """The groups alive, as told line by line."""

    def __init__(self) -> None:
        self.groups: set[int] = set()
        self.released = False
        self._rest = b""

    def tell(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"+"):
                self.groups.add(int(line[1:]))
            elif line.startswith(b"-"):
                self.groups.discard(int(line[1:]))
            elif line == b"q":
                self.released = True


def follow(pipe: int, worker_pid: int) -> _Register:
    """Read the pipe until the worker is gone or lets us go."""
    register = _Register()
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    gone = None
    with contextlib.suppress(OSError):
        gone = os.pidfd_open(worker_pid)
        poll.register(gone, select.POLLIN)
    ended = os.getppid() != worker_pid
    while not register.released:
        if not ended:
            ended = any(fd == gone for fd, _ in poll.poll())
        try:
            while data := os.read(pipe, _READ_BYTES):
                register.tell(data)
            break
        except BlockingIOError:
            if ended:
                break
        time.sleep(COALESCE_S)
    return register


def reap(groups: Iterable[int], mark: bytes) -> None:
    """Kill the groups, then all that carries the mark, until several looks in a row find nothing."""
    for pgid in groups:
        kill_group(pgid, signal.SIGKILL)
    quiet = 0
    for _ in range(SWEEP_PASSES_MAX):
        found = [seen for seen in census() if seen.mark == mark]
        for seen in found:
            strike(seen, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        if quiet == QUIET_PASSES:
            return
        time.sleep(SWEEP_PAUSE_S)


def main(worker_pid: int, mark: str) -> None:
    """The helper process: outlive the worker, clean up, end."""
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    register = follow(0, worker_pid)
    if not register.released:
        reap(register.groups, mark.encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
