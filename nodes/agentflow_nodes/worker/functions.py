"""Runs Python functions: on the event loop, in a thread, or in a child process.

| mode    | for                             | at its time limit, or when cancelled                          |
|---------|---------------------------------|---------------------------------------------------------------|
| async   | `async def`, waiting on the net | cancelled; one that ignores it is abandoned after a grace     |
| thread  | blocking calls                  | abandoned: a thread cannot be killed. Another takes its place |
| process | computing, code that may crash  | its process is killed, with all that it started               |

Threads are daemons of our own, not those of a `ThreadPoolExecutor`: the interpreter joins the latter when
it exits, so one task that hangs would keep a worker from ever ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import pickle
import queue
import threading
from typing import TYPE_CHECKING, Any, Literal, Self

from agentflow.context import TaskContext
from agentflow.logs import get_logger
from agentflow_nodes.worker.calls import Call, judge, judge_async, settle
from agentflow_nodes.worker.children import Children
from agentflow_nodes.worker.cleanup import uninterrupted
from agentflow_nodes.worker.outcome import (
    Failed,
    Outcome,
    crashed,
    refused,
    stopped,
    timed_out,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

Mode = Literal["async", "thread", "process"]

CANCEL_GRACE_S = 2.0
"""How long an async function may take to clean up after its cancellation."""

ABANDONED_MAX = 256
"""Threads that may go on after their time limit before this worker refuses to start more."""

_log = get_logger(__name__)


class FunctionRunner:
    """Runs functions; an async context manager. Left, its child processes are dead.

    At most `threads` functions run in threads and `processes` in children; others wait, and their time limit
    does not run yet. `mark` is the mark of the worker's `ProcessRunner`: with it, what a function started in
    a child process is killed also if the worker itself is. Leave this runner before that one.
    """

    def __init__(self, *, threads: int, processes: int, mark: str | None = None) -> None:
        self._threads = _Threads(threads)
        self._children = Children(processes, mark)
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
            settle(over, _closed())
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
        task = loop.create_task(judge_async(call))
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
            timer = over.get_loop().call_later(timeout_s, settle, over, timed_out(timeout_s))
        try:
            return await over
        finally:
            self._calls.discard(over)
            if timer is not None:
                timer.cancel()


def _closed() -> Failed:
    return stopped("the runner was closed")


def _settle_from(over: asyncio.Future[Outcome], task: asyncio.Task[Outcome]) -> None:
    """An outcome, unless the coroutine was cancelled, by us (then it is over already) or by itself."""
    if task.cancelled():
        settle(over, Failed("error", "CancelledError: the function cancelled itself"))
    else:
        settle(over, task.result())


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
        settle(over, outcome)
        if self.on_free is not None:
            self.on_free()
