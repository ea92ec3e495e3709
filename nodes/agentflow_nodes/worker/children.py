"""Child processes that run functions.

Each is a `pebble.ProcessPool` of one. Children of one pool share a channel and its locks, and a child killed
(out of memory, say) while it sends a large result would take the lock with it and stop all others; and pebble
reports no child that leaves with `os._exit(0)`, so each is watched through its pidfd. A child is thrown away
after anything but an ordinary return or exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import secrets
import select
import signal
from typing import TYPE_CHECKING

import msgspec
import pebble

from agentflow.logs import get_logger
from agentflow_nodes.orphans import end_with
from agentflow_nodes.worker.calls import Call, judge, settle
from agentflow_nodes.worker.cleanup import Census, uninterrupted
from agentflow_nodes.worker.outcome import Completed, Failed, Outcome, crashed, refused
from agentflow_nodes.worker.reaper import MARK_VARIABLE, TOKEN_VARIABLE, Seen, kill_group

if TYPE_CHECKING:
    from concurrent.futures import Future

CHILD_START_S = 60.0
CHILD_DEATH_S = 5.0
EXIT_REPORT_S = 0.5
"""How long pebble may take to say how a child ended; of those that end with status 0 it says nothing."""

_log = get_logger(__name__)
_decode = msgspec.json.Decoder(Completed | Failed).decode
_encode = msgspec.json.Encoder().encode


class Children:
    """Up to `limit` child processes, started when first needed and used again while they are sound."""

    def __init__(self, limit: int, mark: str | None) -> None:
        self.free = asyncio.Semaphore(limit)
        self._mark = mark
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._census = Census()
        self._open = True

    async def take(self) -> _Child | None:
        """A child ready for a call, started if none is idle; None if it does not start."""
        while self._idle:
            child = self._idle.pop()
            if child.sound and not child.has_died():
                return child
            await self._discard(child)
        child = _Child(self._mark)
        self._all.add(child)
        try:
            async with asyncio.timeout(CHILD_START_S):
                await child.greet()
        except Exception:  # noqa: BLE001 - whatever keeps it from starting
            _log.exception("child_did_not_start")
            await uninterrupted(self._discard(child))
            return None
        except asyncio.CancelledError:
            await uninterrupted(self._discard(child))
            raise
        return child

    async def give_back(self, child: _Child) -> None:
        """The call is over: the child is kept for the next one if it is still sound."""
        if child.sound and self._open:
            self._idle.append(child)
        else:
            await self._discard(child)

    async def close(self) -> None:
        """End all children and wait until they have ended."""
        self._open = False
        self._idle.clear()
        await asyncio.gather(*(self._discard(child) for child in list(self._all)))
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _discard(self, child: _Child) -> None:
        """Kill it with all it started. Its pool, which takes its time, is closed in the background."""
        if child not in self._all:
            return
        self._all.discard(child)
        await child.kill()
        await self._census.sweep(child.owns)
        task = asyncio.create_task(asyncio.to_thread(child.close))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Child:
    """One child process; the leader of a session, so that what it starts can be killed with it."""

    def __init__(self, mark: str | None) -> None:
        self.sound = False
        self._pid = 0
        self._pidfd = -1
        self._token = secrets.token_hex(16)
        self._dead = asyncio.Event()
        self._over: asyncio.Future[Outcome] | None = None
        self._loop = asyncio.get_running_loop()
        self._pool = pebble.ProcessPool(
            max_workers=1,
            initializer=_prepare_child,
            initargs=(os.getpid(), self._token, mark),
            context=multiprocessing.get_context("spawn"),
        )

    async def greet(self) -> None:
        """Wait until it is up; learn its pid."""
        # Scheduled from the loop's thread: a child is sent SIGKILL when the thread that started it ends.
        self._pid = await asyncio.wrap_future(self._pool.schedule(os.getpid))
        self._pidfd = os.pidfd_open(self._pid)
        self._loop.add_reader(self._pidfd, self._died)
        self.sound = True

    def has_died(self) -> bool:
        """Whether it is dead at this moment, which the event loop may not have noticed yet."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def owns(self, seen: Seen) -> bool:
        return (self._pid != 0 and seen.session == self._pid) or seen.token == self._token.encode()

    def start(self, payload: bytes, over: asyncio.Future[Outcome]) -> None:
        """Run the call; the child is not sound again before it has answered."""
        self.sound = False
        self._over = over
        try:
            future = self._pool.schedule(judge_in_child, args=(payload,))
        except RuntimeError as error:  # pebble noticed its death before we did
            settle(over, crashed(f"the child process is gone: {error}"))
            return
        future.add_done_callback(self._answered)

    async def kill(self) -> None:
        self.sound = False
        if self._pid == 0:
            return
        kill_group(self._pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHILD_DEATH_S):
                await self._dead.wait()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def close(self) -> None:
        """Stop the pool's threads; blocks for some tenths of a second."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _answered(self, future: Future[bytes]) -> None:
        """Called in a thread of pebble's."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(self._conclude, future)

    def _conclude(self, future: Future[bytes]) -> None:
        if self._over is None:
            return
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            self.sound = not self._dead.is_set()
            settle(self._over, _decode(future.result()))
        elif isinstance(error, pebble.ProcessExpired):
            settle(self._over, crashed(_how_it_ended(error.exitcode)))
        else:
            settle(self._over, crashed(f"the child process could not run it: {error!r}"))

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.sound = False
        self._dead.set()
        if self._over is not None:
            end = crashed("the child process exited with status 0 instead of returning a result")
            self._loop.call_later(EXIT_REPORT_S, settle, self._over, end)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"the child process exited with status {status}"
    try:
        return f"the child process was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"the child process was killed by signal {-status}"


def _prepare_child(worker_pid: int, token: str, mark: str | None) -> None:
    """In the child: a session of its own, marked, and gone when the worker is."""
    os.setsid()
    os.environ[TOKEN_VARIABLE] = token
    if mark is not None:
        os.environ[MARK_VARIABLE] = mark
    end_with(worker_pid)


def judge_in_child(payload: bytes) -> bytes:
    """In the child: run the call; its outcome is encoded here, so that it can always be sent."""
    try:
        call: Call = pickle.loads(payload)  # noqa: S301 - it comes from the worker that started us
    except BaseException as error:  # noqa: BLE001
        return _encode(refused(f"the child process cannot load the call: {type(error).__name__}: {error}"))
    return _encode(judge(call))
