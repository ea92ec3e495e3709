"""An event loop without a clock, a network or chance of its own.

Time stands still while anything can run, and jumps to the next timer when nothing can. What
is run belongs to a `Process`: the callbacks of one process run in the order asyncio promises,
those of several in an order drawn from the seed, as machines of their own would. A process
can be stopped and continued (nothing of it runs meanwhile, its timers fall due all the same)
and killed (nothing of it runs ever again, not even a `finally`).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, TypeVar

T = TypeVar("T")

STEPS_MAX: Final = 20_000
"""Rounds of callbacks at one instant: more is a loop that waits for nothing."""


class Stuck(Exception):
    """Nothing can run any more, or too much at one instant."""


_process: ContextVar[Process] = ContextVar("process")


class Process:
    """What an operating system's process is: something that can be stopped and killed."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.stopped = False
        self.killed = False
        self.held: list[asyncio.Handle] = []
        """Callbacks that fell due and were not run."""
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.context: Final = Context()
        self.context.run(_process.set, self)

    @property
    def runs(self) -> bool:
        """Whether its callbacks run."""
        return not (self.stopped or self.killed)


_OUTSIDE: Final = Process("outside")


class _Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on where it lies in memory."""

    order = 0

    def __hash__(self) -> int:
        return self.order

    __eq__ = object.__eq__


class SimLoop(asyncio.AbstractEventLoop):
    """See above. `run` runs until a coroutine is done."""

    def __init__(self, chance: random.Random) -> None:
        self.errors: Final[list[str]] = []
        """What went wrong in callbacks and was caught by nobody."""
        self._chance = chance
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._orders = itertools.count(1)
        self._at_once = 0
        self._bare = Context()

    # What asyncio asks of a loop.

    def time(self) -> float:
        """Seconds since the run began."""
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Run in the next round."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run after `delay` seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run at a time of this loop."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._orders), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        """A task of the current process."""
        _Task.order = next(self._orders)
        task = _Task(coro, loop=self, name=name, context=context)
        task.order = _Task.order
        process = (context or copy_context()).get(_process)
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(lambda done: process.tasks.pop(done, None))
        return task

    def get_debug(self) -> bool:
        """No."""
        return False

    def is_running(self) -> bool:
        """Whenever somebody asks."""
        return True

    def is_closed(self) -> bool:
        """There is nothing to close."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A callback failed, or a task nobody waited for."""
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        """It is left out when it falls due."""

    # Processes.

    def start(self, process: Process, coro: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A first task of a process; what it starts belongs to the process too."""
        return self.create_task(coro, name=process.name, context=process.context.copy())

    def call_in(self, process: Process, callback: Callable[..., object], *args: Any) -> None:
        """Run in the next round, as something of a process."""
        self.call_soon(callback, *args, context=process.context)

    def outside(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Run at a time, on behalf of no process."""
        self.call_at(when, callback, *args, context=self._bare)

    def stop_process(self, process: Process) -> None:
        """Nothing of it runs from now on, as after SIGSTOP."""
        process.stopped = True

    def continue_process(self, process: Process) -> None:
        """It goes on, with everything that fell due meanwhile."""
        process.stopped = False
        if process.runs:
            held, process.held = process.held, []
            self._ready.extend(held)

    def revive_process(self, process: Process) -> None:
        """Let what was killed run again, to be ended in good order once nobody looks."""
        process.killed = False
        self.continue_process(process)

    # Running.

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run until a coroutine of no process is done."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(coro, context=Context())
            while not task.done():
                self._round()
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _round(self) -> None:
        """Run what is ready, after letting time pass if nothing is."""
        if not self._ready:
            self._at_once = 0
            self._pass_time()
        self._at_once += 1
        if self._at_once > STEPS_MAX:
            raise Stuck(f"{STEPS_MAX} rounds of callbacks at {self._now:.6f} s: {self._ready[0]!r}")
        if len(self._ready) == 1:
            self._run(self._ready.popleft())
            return
        ready, self._ready = self._ready, deque()
        for handle in self._interleaved(ready):
            self._run(handle)

    def _pass_time(self) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Stuck(f"nothing is left to run at {self._now:.6f} s")
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])

    def _run(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:
            return
        process = _process_of(handle)
        if process.stopped or process.killed:
            process.held.append(handle)
        else:
            handle._run()

    def _interleaved(self, ready: deque[asyncio.Handle]) -> Any:
        """Each process's callbacks in their order, the processes in any."""
        by_process: dict[int, list[asyncio.Handle]] = {}
        for handle in ready:
            by_process.setdefault(id(_process_of(handle)), []).append(handle)
        if len(by_process) == 1:
            return ready
        parts = list(by_process.values())
        self._chance.shuffle(parts)
        return itertools.chain.from_iterable(parts)


def _process_of(handle: asyncio.Handle) -> Process:
    context: Context = handle._context  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    return context.get(_process, _OUTSIDE)


def new_loop(chance: random.Random) -> SimLoop:
    """A loop at second 0. It lacks what a loop without files, sockets and signals does not need."""
    return SimLoop(chance)  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
