"""Runs Python functions: on the event loop, in a thread, or in a child process.

| mode    | for                             | at its time limit, or when cancelled                          |
|---------|---------------------------------|---------------------------------------------------------------|
| async   | `async def`, waiting on the net | cancelled; one that ignores it is abandoned after a grace     |
| thread  | blocking calls                  | abandoned: a thread cannot be killed. Another takes its place |
| process | computing, code that may crash  | its process is killed, with all that it started               |

Threads are daemons of our own, not those of a `ThreadPoolExecutor`: the interpreter joins the latter when
it exits, so one task that hangs would keep a worker from ever ending.

Each child process is a `pebble.ProcessPool` of one. Children of one pool share a channel and its locks, and
a child killed (out of memory, say) while it sends a large result would take the lock with it and stop all
others; and pebble reports no child that leaves with `os._exit(0)`, so each is watched through its pidfd. A
child is thrown away after anything but an ordinary return or exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import inspect
import multiprocessing
import os
import pickle
import queue
import secrets
import select
import signal
import threading
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec
import pebble
import structlog

from agentflow.context import TaskContext, running
from agentflow_nodes.worker.outcome import (
    Completed,
    Failed,
    Outcome,
    completed,
    crashed,
    failed,
    refused,
    stopped,
    timed_out,
)
from agentflow_nodes.worker.processes import Census, uninterrupted
from agentflow_nodes.worker.reaper import MARK_VARIABLE, TOKEN_VARIABLE, Seen, kill_group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from types import TracebackType

Mode = Literal["async", "thread", "process"]

CANCEL_GRACE_S = 2.0
"""How long an async function may take to clean up after its cancellation."""

ABANDONED_MAX = 256
"""Threads that may go on after their time limit before this worker refuses to start more."""

CHILD_START_S = 60.0
CHILD_DEATH_S = 5.0
EXIT_REPORT_S = 0.5
"""How long pebble may take to say how a child ended; of those that end with status 0 it says nothing."""

_PR_SET_PDEATHSIG = 1

_log = structlog.get_logger(__name__)
_decode = msgspec.json.Decoder(Completed | Failed).decode
_encode = msgspec.json.Encoder().encode


class Call(msgspec.Struct, frozen=True):
    """A function and all it takes to run it anywhere."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    task: TaskContext | None
    non_retryable: tuple[str, ...]


class FunctionRunner:
    """Runs functions; an async context manager. Left, its child processes are dead.

    At most `threads` functions run in threads and `processes` in children; others wait, and their time limit
    does not run yet. `mark` is the mark of the worker's `ProcessRunner`: with it, what a function started in
    a child process is killed also if the worker itself is. Leave this runner before that one.
    """

    def __init__(self, *, threads: int, processes: int, mark: str | None = None) -> None:
        self._threads = _Threads(threads)
        self._children = _Children(processes, mark)
        self._calls: set[asyncio.Future[Outcome]] = set()
        self._ignoring = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = False

    @property
    def abandoned(self) -> int:
        """How many threads and coroutines still go on although their attempt is over."""
        return self._threads.abandoned + self._ignoring

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        for over in list(self._calls):
            _settle(over, _closed())
        await uninterrupted(self._close())

    async def _close(self) -> None:
        await self._idle.wait()
        self._threads.close()
        await self._children.close()

    async def run(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        mode: Mode,
        timeout_s: float | None = None,
        task: TaskContext | None = None,
        non_retryable: Sequence[str] = (),
    ) -> Outcome:
        """Run `function` and say how it ended; only a cancellation is raised, once what can be ended has.

        `task` is what `agentflow.context.current()` returns inside. `non_retryable` names exception types
        that another attempt would raise again.
        """
        if not self._open:
            return _closed()
        self._running += 1
        self._idle.clear()
        try:
            return await self._run(Call(function, args, kwargs, task, tuple(non_retryable)), mode, timeout_s)
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def _run(self, call: Call, mode: Mode, timeout_s: float | None) -> Outcome:
        match mode:
            case "async":
                return await self._on_loop(call, timeout_s)
            case "thread":
                async with self._threads.free:
                    return await self._in_thread(call, timeout_s) if self._open else _closed()
            case "process":
                async with self._children.free:
                    return await self._in_child(call, timeout_s) if self._open else _closed()

    async def _on_loop(self, call: Call, timeout_s: float | None) -> Outcome:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[Outcome] = loop.create_future()
        task = loop.create_task(_judge_async(call))
        task.add_done_callback(functools.partial(_settle_from, over))
        try:
            return await self._until(over, timeout_s)
        finally:
            if not task.done():
                await uninterrupted(self._give_up(task))

    async def _give_up(self, task: asyncio.Task[Outcome]) -> None:
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
        if not task.done():
            self._ignoring += 1
            task.add_done_callback(self._gave_in)
            _log.warning("coroutine_ignores_cancellation", abandoned=self.abandoned)

    def _gave_in(self, _: asyncio.Task[Outcome]) -> None:
        self._ignoring -= 1

    async def _in_thread(self, call: Call, timeout_s: float | None) -> Outcome:
        if self._threads.abandoned >= ABANDONED_MAX:
            return refused(f"{ABANDONED_MAX} threads of this worker hang in tasks that timed out")
        thread = self._threads.take()
        over: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        thread.start(call, over)
        try:
            return await self._until(over, timeout_s)
        finally:
            self._threads.give_back(thread)

    async def _in_child(self, call: Call, timeout_s: float | None) -> Outcome:
        try:
            payload = pickle.dumps(call)
        except Exception as error:  # noqa: BLE001 - arguments may raise anything while they are pickled
            return refused(f"the call cannot be sent to a child process: {type(error).__name__}: {error}")
        child = await self._children.take()
        if child is None:
            return crashed("no child process could be started")
        over: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        child.start(payload, over)
        try:
            return await self._until(over, timeout_s)
        finally:
            await uninterrupted(self._children.give_back(child))

    async def _until(self, over: asyncio.Future[Outcome], timeout_s: float | None) -> Outcome:
        """Wait until it is over, its time is, or the runner is closed."""
        if not self._open:
            return _closed()
        self._calls.add(over)
        timer = None
        if timeout_s is not None:
            timer = over.get_loop().call_later(timeout_s, _settle, over, timed_out(timeout_s))
        try:
            return await over
        finally:
            self._calls.discard(over)
            if timer is not None:
                timer.cancel()


def _closed() -> Failed:
    return stopped("the runner was closed")


def _settle(over: asyncio.Future[Outcome], outcome: Outcome) -> None:
    """The first outcome counts."""
    if not over.done():
        over.set_result(outcome)


def _settle_from(over: asyncio.Future[Outcome], task: asyncio.Task[Outcome]) -> None:
    """An outcome, unless the coroutine was cancelled, by us (then it is over already) or by itself."""
    if task.cancelled():
        _settle(over, Failed("error", "CancelledError: the function cancelled itself"))
    else:
        _settle(over, task.result())


def judge(call: Call) -> Outcome:
    """Run the call in this thread and say how it ended."""
    try:
        with _as_task(call.task):
            value = call.function(*call.args, **call.kwargs)
            return completed(asyncio.run(value) if inspect.iscoroutine(value) else value)
    except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome, SystemExit too
        return failed(_without_our_frame(error), call.non_retryable)


async def _judge_async(call: Call) -> Outcome:
    try:
        with _as_task(call.task):
            value = call.function(*call.args, **call.kwargs)
            return completed(await value if inspect.isawaitable(value) else value)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return failed(_without_our_frame(error), call.non_retryable)
    except BaseException as error:  # noqa: BLE001 - a SystemExit that reaches the loop would end the worker
        return failed(_without_our_frame(error), call.non_retryable)


def _as_task(task: TaskContext | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if task is None else running(task)


def _without_our_frame(error: BaseException) -> BaseException:
    trace = error.__traceback__
    return error if trace is None else error.with_traceback(trace.tb_next)


class _Threads:
    """Up to `limit` daemon threads, and those that were abandoned."""

    def __init__(self, limit: int) -> None:
        self.free = asyncio.Semaphore(limit)
        self.abandoned = 0
        self._idle: list[_Thread] = []
        self._open = True

    def take(self) -> _Thread:
        return self._idle.pop() if self._idle else _Thread()

    def give_back(self, thread: _Thread) -> None:
        if thread.busy:
            self.abandoned += 1
            thread.on_free = self._came_back
            thread.stop()
            _log.warning("thread_abandoned", abandoned=self.abandoned)
        elif self._open:
            self._idle.append(thread)
        else:
            thread.stop()

    def close(self) -> None:
        self._open = False
        while self._idle:
            self._idle.pop().stop()

    def _came_back(self) -> None:
        self.abandoned -= 1


class _Thread:
    """One daemon thread, doing one call after the other."""

    def __init__(self) -> None:
        self.busy = False
        self.on_free: Callable[[], None] | None = None
        self._inbox: queue.SimpleQueue[tuple[Call, asyncio.Future[Outcome]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="task", daemon=True).start()

    def start(self, call: Call, over: asyncio.Future[Outcome]) -> None:
        self.busy = True
        self._inbox.put((call, over))

    def stop(self) -> None:
        """End after the call being run."""
        self._inbox.put(None)

    def _serve(self) -> None:
        while (job := self._inbox.get()) is not None:
            call, over = job
            outcome = contextvars.Context().run(judge, call)
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                over.get_loop().call_soon_threadsafe(self._done, over, outcome)
            del job, call, over, outcome

    def _done(self, over: asyncio.Future[Outcome], outcome: Outcome) -> None:
        self.busy = False
        _settle(over, outcome)
        if self.on_free is not None:
            self.on_free()


class _Children:
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
        if child.sound and self._open:
            self._idle.append(child)
        else:
            await self._discard(child)

    async def close(self) -> None:
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
            _settle(over, crashed(f"the child process is gone: {error}"))
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
            _settle(self._over, _decode(future.result()))
        elif isinstance(error, pebble.ProcessExpired):
            _settle(self._over, crashed(_how_it_ended(error.exitcode)))
        else:
            _settle(self._over, crashed(f"the child process could not run it: {error!r}"))

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.sound = False
        self._dead.set()
        if self._over is not None:
            end = crashed("the child process exited with status 0 instead of returning a result")
            self._loop.call_later(EXIT_REPORT_S, _settle, self._over, end)


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
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != worker_pid:
        os._exit(1)


def judge_in_child(payload: bytes) -> bytes:
    """In the child: run the call; its outcome is encoded here, so that it can always be sent."""
    try:
        call: Call = pickle.loads(payload)  # noqa: S301 - it comes from the worker that started us
    except BaseException as error:  # noqa: BLE001
        return _encode(refused(f"the child process cannot load the call: {type(error).__name__}: {error}"))
    return _encode(judge(call))
