"""Runs shell scripts and programs, and leaves nothing of them behind.

Every run is a session and process group of its own. It ends when its first process exits, when its time is
up, when `run` is cancelled or when the runner is left; whatever the way, all its processes are dead then:

- the group gets SIGTERM, a grace, SIGKILL; what is left in it after a normal exit gets SIGKILL;
- what left the group (`setsid`, a double fork) still carries the attempt's token in its environment and is
  looked for in /proc: at once when we kill or when it holds our pipes, otherwise by one sweep a second for
  all runs that ended since the last (a look through /proc, about 12 us a process, is too dear for each);
- if the worker itself is killed, its helper process does the same (see `reaper`).

A process group's number stays taken as long as its leader is a zombie, so the leader is reaped last, after
the group was signalled: no signal can hit a group that merely got the same number.

Output is read as it comes and only its end is kept, so a program may print for ever into flat memory.

How processes are started was measured, `true` with 2 to 8 at a time on 2 cores under uvloop, per second:
`asyncio.create_subprocess_exec` without pipes 740, with pipes 650; `subprocess.Popen` (vfork) in a new
session with two pipes and a pidfd 1,950; `os.posix_spawn` with the same 2,150. Popen it is: posix_spawn can
neither change the directory nor close inherited descriptors. All of `run`, on a machine shared
with other load, medians of six: `true` 1,640, `sh -ec true` 1,620, the bare asyncio loop 480.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import secrets
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, Self

import msgspec

from agentflow.logs import get_logger
from agentflow_nodes.worker import reaper
from agentflow_nodes.worker.cleanup import Census, Helper, uninterrupted, without_marks
from agentflow_nodes.worker.outcome import MESSAGE_BYTES_MAX, bounded
from agentflow_nodes.worker.reaper import MARK_VARIABLE, TOKEN_VARIABLE, kill_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

PIPE_LINGER_S = 0.25
"""How long output is still read when the first process has exited and another holds its pipes open."""

SWEEP_EVERY_S = 1.0
"""How often processes are looked for that outlived their run; only while runs end."""

KILL_POLL_S = 0.02
KILL_WAIT_S = 5.0
"""How long a process may take to die of SIGKILL (it may hang in the kernel) before we go on without it."""

_CHUNK_BYTES = 65536
_CHUNKS_AT_EXIT_MAX = 64
_SPAWN_ERRORS = (OSError, ValueError, TypeError, subprocess.SubprocessError)

_log = get_logger(__name__)


class ProcessExit(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended.

    Exactly one of `exit_code`, `signal` and `error` is set, unless it was ended by us: then `timed_out` or
    `stopped` is True beside it. `error` says why it could not be started, or not be ended. The tails are
    the last bytes of the output, decoded as UTF-8 with U+FFFD for what is none.
    """

    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stopped: bool = False
    stdout_tail: str = ""
    stderr_tail: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    started_at_ms: int
    duration_us: int
    error: str | None = None


def shell_argv(script: str) -> list[str]:
    """The argv that runs a shell script, which ends at the first command that fails."""
    return ["/bin/sh", "-ec", script]


class _End(enum.Enum):
    """Why a run is over."""

    EXITED = enum.auto()
    TIMED_OUT = enum.auto()
    CLOSED = enum.auto()


class _Tail:
    """Reads a pipe as it fills; keeps the end of what came and counts it all."""

    def __init__(self, fd: int, limit: int, buffer: memoryview) -> None:
        self._fd = fd
        self._limit = limit
        self._buffer = buffer
        self._kept = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)
        self.total = 0
        self.ended = asyncio.Event()

    def drain(self) -> bool:
        """Read what is there, within limits; True at the end of the file."""
        for _ in range(_CHUNKS_AT_EXIT_MAX):
            if self._fd < 0 or not self._readable():
                break
        return self._fd < 0

    def text(self) -> str:
        kept = bytes(self._kept[-self._limit :]) if self._limit else b""
        if self.total > self._limit:
            kept = kept[_broken_start(kept) :]
        return kept.decode("utf-8", "replace").replace("\0", "\ufffd")

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self.ended.set()

    def _readable(self) -> bool:
        """One read; True if there may be more."""
        try:
            count = os.readv(self._fd, (self._buffer,))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            count = 0
        if count == 0:
            self.close()
            return False
        self.total += count
        self._kept += self._buffer[max(0, count - self._limit) : count]
        if len(self._kept) > 2 * self._limit:
            del self._kept[: -self._limit or None]
        return True


def _broken_start(data: bytes) -> int:
    """How many bytes at the start belong to a character that was cut off."""
    for index, byte in enumerate(data[:3]):
        if byte & 0xC0 != 0x80:  # noqa: PLR2004 - 10xxxxxx continues a character in UTF-8
            return index
    return min(3, len(data))


class _Child:
    """A running process: its pidfd, its pipes, and the two moments waited for."""

    def __init__(
        self, popen: subprocess.Popen[bytes], pidfd: int, token: str, out: _Tail, err: _Tail
    ) -> None:
        self.pid = popen.pid
        self.token = token.encode()
        self.out = out
        self.err = err
        self.exited_ns = 0
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._pidfd = pidfd
        self._loop.add_reader(pidfd, self._exited)
        self.exited = asyncio.Event()
        self.over: asyncio.Future[_End] = self._loop.create_future()

    def end(self, why: _End) -> None:
        if not self.over.done():
            self.over.set_result(why)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.exited_ns = time.monotonic_ns()
        self.exited.set()
        self.end(_End.EXITED)

    def owns(self, seen: reaper.Seen) -> bool:
        return seen.session == self.pid or seen.token == self.token

    def drain(self) -> bool:
        """Read what the pipes hold; True if both have ended."""
        out, err = self.out.drain(), self.err.drain()
        return out and err

    async def pipes_closed(self) -> None:
        await self.out.ended.wait()
        await self.err.ended.wait()

    def reap(self) -> tuple[int | None, int | None, str | None]:
        """Exit code, signal, error. The process must have exited, or is given up."""
        self.out.close()
        self.err.close()
        self._loop.remove_reader(self._pidfd)
        try:
            status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            self._popen.returncode = -1
            return None, None, "its exit status was taken by somebody else in this process"
        finally:
            os.close(self._pidfd)
        if status is None:
            return None, None, f"process {self.pid} did not die of SIGKILL within {KILL_WAIT_S:g} s"
        self._popen.returncode = status.si_status  # so that Popen does not wait for it as well
        if status.si_code == os.CLD_EXITED:
            return status.si_status, None, None
        return None, status.si_status, None


class ProcessRunner:
    """Runs programs; an async context manager. Entered it is ready, left everything it ran is dead.

    `grace_s` is the time between SIGTERM and SIGKILL, `tail_bytes` how much of each output is kept.
    """

    def __init__(self, *, grace_s: float = 2.0, tail_bytes: int = 8192) -> None:
        self.mark = secrets.token_hex(8)
        self._grace_s = grace_s
        self._tail_bytes = tail_bytes
        self._children: dict[int, _Child] = {}
        self._ended_tokens: set[bytes] = set()
        self._ended = asyncio.Event()
        self._open = False
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._null = -1
        self._helper: Helper | None = None
        self._janitor: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._census = Census()

    async def __aenter__(self) -> Self:
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._helper = Helper(self.mark, self._children)
        self._janitor = asyncio.create_task(self._sweep_regularly(), name="process-sweep")
        self._open = True
        self._idle.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._helper is None:
            return
        self._open = False
        for child in list(self._children.values()):
            child.end(_End.CLOSED)
        await uninterrupted(self._close(self._helper))
        self._helper = None

    async def _close(self, helper: Helper) -> None:
        await self._idle.wait()
        if self._janitor is not None:
            self._janitor.cancel()
            await asyncio.gather(self._janitor, return_exceptions=True)
        mark = self.mark.encode()
        await self._census.sweep(lambda seen: seen.mark == mark)
        await helper.release()
        os.close(self._null)

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdin: bytes | None = None,
        timeout_s: float | None = None,
        token: str,
    ) -> ProcessExit:
        """Run `argv` until it exits or is ended, and say how.

        `env` is the whole environment, apart from the two variables by which we find the process again;
        `token` must be unique to this run. Never raises for what the program or its arguments do; a
        cancellation is passed on once everything is dead.
        """
        started_at_ms, started_ns = time.time_ns() // 1_000_000, time.monotonic_ns()
        child = self._start(argv, env, cwd, stdin, token)
        if isinstance(child, str):
            return ProcessExit(
                started_at_ms=started_at_ms,
                duration_us=(time.monotonic_ns() - started_ns) // 1000,
                stopped=not self._open,
                error=bounded(child, MESSAGE_BYTES_MAX),
            )
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, child.end, _End.TIMED_OUT)
        try:
            why = await child.over
            if why is not _End.EXITED:
                await uninterrupted(self._kill(child))
            elif not child.drain():
                await self._linger(child)
        except asyncio.CancelledError:
            await uninterrupted(self._kill(child))
            raise
        finally:
            if timer is not None:
                timer.cancel()
            code, signum, error = self._finish(child)
        return ProcessExit(
            exit_code=code,
            signal=signum,
            timed_out=why is _End.TIMED_OUT,
            stopped=why is _End.CLOSED,
            stdout_tail=child.out.text(),
            stderr_tail=child.err.text(),
            stdout_bytes=child.out.total,
            stderr_bytes=child.err.total,
            started_at_ms=started_at_ms,
            duration_us=((child.exited_ns or time.monotonic_ns()) - started_ns) // 1000,
            error="the runner was closed" if why is _End.CLOSED and error is None else error,
        )

    def _start(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, stdin: bytes | None, token: str
    ) -> _Child | str:
        """The child, or why there is none."""
        if not self._open:
            return "the runner is closed"
        if not argv:
            return "argv is empty"
        fds: list[int] = []
        try:
            popen = self._popen(argv, env, cwd, stdin, token, fds)
            pidfd = _pidfd_of(popen)
        except _SPAWN_ERRORS as error:
            for fd in fds:
                os.close(fd)
            return f"{type(error).__name__}: {error}"
        out_fd, err_fd, *theirs = fds
        for fd in theirs:
            os.close(fd)
        out = _Tail(out_fd, self._tail_bytes, self._buffer)
        err = _Tail(err_fd, self._tail_bytes, self._buffer)
        child = self._children[popen.pid] = _Child(popen, pidfd, token, out, err)
        self._idle.clear()
        if self._helper is not None:
            self._helper.started(child.pid)
        return child

    def _popen(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | None,
        stdin: bytes | None,
        token: str,
        fds: list[int],
    ) -> subprocess.Popen[bytes]:
        """Start the process; `fds` receives the two ends we read, then what only the process needs."""
        out_r, out_w = os.pipe()
        fds += (out_r, out_w)
        err_r, err_w = os.pipe()
        fds[:] = (out_r, err_r, out_w, err_w)
        os.set_blocking(out_r, False)
        os.set_blocking(err_r, False)
        source = self._null
        if stdin is not None:
            source = _as_file(stdin)
            fds.append(source)
        return subprocess.Popen(  # noqa: S603 - running what the task says is the purpose
            list(argv),
            stdin=source,
            stdout=out_w,
            stderr=err_w,
            cwd=cwd,
            env={TOKEN_VARIABLE: token, MARK_VARIABLE: self.mark, **without_marks(env)},
            close_fds=True,
            restore_signals=True,
            start_new_session=True,
        )

    async def _linger(self, child: _Child) -> None:
        """The first process has exited, another has its pipes: it may finish its say, and then must go."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PIPE_LINGER_S):
                await child.pipes_closed()
                return
        kill_group(child.pid, signal.SIGKILL)
        await self._census.sweep(child.owns)
        child.drain()

    async def _kill(self, child: _Child) -> None:
        """SIGTERM, grace, SIGKILL for the group and for all that left it."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace_s
        try:
            kill_group(child.pid, signal.SIGTERM)
            kill_group(child.pid, signal.SIGCONT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await child.exited.wait()
            await self._dismiss(child, until)
            kill_group(child.pid, signal.SIGKILL)
            await self._census.sweep(child.owns)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_WAIT_S):
                    await child.exited.wait()
            child.drain()
        finally:  # also if the event loop is being torn down under us
            kill_group(child.pid, signal.SIGKILL)

    async def _dismiss(self, child: _Child, until: float) -> None:
        """Tell those that left the group too, and wait until all are gone or the grace is over."""
        told: set[int] = set()
        while left := [seen for seen in await self._census.take() if child.owns(seen)]:
            for seen in left:
                if seen.session != child.pid and seen.pid not in told:
                    reaper.strike(seen, signal.SIGTERM)
                    told.add(seen.pid)
            if asyncio.get_running_loop().time() >= until:
                return
            await asyncio.sleep(KILL_POLL_S)

    def _finish(self, child: _Child) -> tuple[int | None, int | None, str | None]:
        kill_group(child.pid, signal.SIGKILL)
        if self._helper is not None:
            self._helper.ended(child.pid)
        result = child.reap()
        del self._children[child.pid]
        self._ended_tokens.add(child.token)
        self._ended.set()
        if not self._children:
            self._idle.set()
        return result

    async def _sweep_regularly(self) -> None:
        """Kill what outlived its run and hid from its group."""
        while True:
            await self._ended.wait()
            await asyncio.sleep(SWEEP_EVERY_S)
            self._ended.clear()
            tokens, self._ended_tokens = self._ended_tokens, set()
            killed = await self._census.sweep(partial(_of_attempts, tokens))
            if killed:
                _log.warning("processes_outlived_their_run", killed=killed)


def _of_attempts(tokens: set[bytes], seen: reaper.Seen) -> bool:
    return seen.token in tokens


def _pidfd_of(popen: subprocess.Popen[bytes]) -> int:
    """A pidfd; without one (no descriptors left) the process cannot be watched and is ended at once."""
    try:
        return os.pidfd_open(popen.pid)
    except OSError:
        kill_group(popen.pid, signal.SIGKILL)
        popen.wait()
        raise


def _as_file(data: bytes) -> int:
    """A file in memory, positioned at its start: unlike a pipe it needs nobody to feed it."""
    fd = os.memfd_create("agentflow-stdin")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd
