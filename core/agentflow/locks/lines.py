"""The lines that one process waits in: each is watched once, for all who wait there.

Everybody reads the line for himself, after he came: the reading shows whoever came before him.
What has changed since, he is told by the one watch. It remembers what it told last, because
it may be ahead of the reading of who joins.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from agentflow.ending import end_tasks
from agentflow.leases.port import Change, Leases, Removed
from agentflow.locks.ticket import Line

# Who read the line longer ago than so many changes reads it again.
_RECENT_MAX: Final = 1_000


class Waiting(Struct, frozen=True, eq=False):
    """Somebody who waits in a line."""

    key: str
    line: Line
    """As he knows it; what changes is told to it."""
    since: int
    """The revision at which he read it."""
    wake: Callable[[], None]
    """Called when nobody is before him any more, when his ticket is gone, or when the watch has ended."""

    def tell(self, change: Change) -> None:
        """Take over one change, unless the reading has it."""
        if change.revision > self.since:
            self.line.apply(change)

    def wake_if_free(self) -> None:
        """Wake him if there is something for him to do."""
        if self.line.place(self.key) is None or not self.line.before(self.key):
            self.wake()


class Watch:
    """One line, watched from a revision on."""

    def __init__(self, leases: Leases, pattern: str, after: int) -> None:
        self._leases = leases
        self._pattern = pattern
        self._floor = after
        """What came later was told, or is going to be; the last of it is remembered."""
        self._recent: deque[Change] = deque()
        self._waiting: dict[str, Waiting] = {}
        self._task = asyncio.create_task(self._run(after), name=f"line {pattern}")
        self._task.add_done_callback(self._ended)

    @property
    def is_over(self) -> bool:
        """Whether it tells nothing more."""
        return self._task.done()

    def join(self, waiting: Waiting) -> bool:
        """Tell somebody what has changed since his reading; false if that was too long ago."""
        if waiting.since < self._floor:
            return False
        for change in self._recent:
            waiting.tell(change)
        self._waiting[waiting.key] = waiting
        return True

    def leave(self, key: str) -> bool:
        """Tell him nothing more; whether nobody is left."""
        self._waiting.pop(key, None)
        return not self._waiting

    def check(self) -> None:
        """Raise what the watch has ended with."""
        if self._task.done():
            self._task.result()

    async def end(self) -> None:
        """Watch no more."""
        await end_tasks(self._task)

    async def _run(self, after: int) -> None:
        async for batch in self._leases.watch(self._pattern, after):
            self._remember(batch)
            for waiting in self._waiting.values():
                for change in batch:
                    waiting.tell(change)
            # Who comes or stays makes way for nobody.
            if any(isinstance(change, Removed) for change in batch):
                for waiting in list(self._waiting.values()):
                    waiting.wake_if_free()

    def _remember(self, batch: list[Change]) -> None:
        self._recent.extend(batch)
        while len(self._recent) > _RECENT_MAX:
            self._floor = self._recent.popleft().revision

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # told by `check` to those who wait
        for waiting in self._waiting.values():
            waiting.wake()


class Lines:
    """All lines of a bucket that somebody of this process waits in."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._watches: dict[str, Watch] = {}

    def join(self, pattern: str, waiting: Waiting) -> Watch | None:
        """The watch that tells somebody from now on; None if he must read the line again before."""
        watch = self._watches.get(pattern)
        if watch is None or watch.is_over:
            watch = self._watches[pattern] = Watch(self._leases, pattern, waiting.since)
        return watch if watch.join(waiting) else None

    async def leave(self, pattern: str, watch: Watch, key: str) -> None:
        """End a watch when the last one leaves."""
        if not watch.leave(key):
            return
        if self._watches.get(pattern) is watch:
            del self._watches[pattern]
        await watch.end()
