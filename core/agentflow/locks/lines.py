"""The lines that one process waits in: each is watched once, for all who wait there.

The watch alone does not show everybody who came earlier: a ticket renewed before the watch got
to it is told only after that renewal, in another place. So nobody is granted a lock before a
reading of the line that began when his ticket was there already. One reading serves all of
this process who wait then; until nobody seems to be before him, nobody needs any.

The watch remembers what it told last, because it may be ahead of a reading.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from agentflow.ending import end_tasks
from agentflow.leases.port import Change, Leases, Removed, Snapshot
from agentflow.locks.ticket import Line

# Who read the line longer ago than so many changes reads it again.
_RECENT_MAX: Final = 1_000


class Waiting:
    """Somebody who waits in a line, as his process knows it."""

    def __init__(self, key: str, line: Line, wake: Callable[[], None]) -> None:
        self.key: Final = key
        self.line: Final = line
        """What changes is told to it."""
        self.wake: Final = wake
        """Called when nobody is before him any more, when his ticket is gone, or when the watch has ended."""
        self.has_read = False
        """Whether `line` shows everybody who came before him: there was a reading since."""
        self.is_gone = False
        """Whether a reading did not find his ticket."""

    def learn(self, snapshot: Snapshot) -> None:
        """Take over a reading that began after he came."""
        self.line.learn(snapshot)
        self.has_read = True
        self.is_gone = all(entry.key != self.key for entry in snapshot.entries)

    def wake_if_free(self) -> None:
        """Wake him if there is something for him to do."""
        if self.is_gone or self.line.place(self.key) is None or not self.line.before(self.key):
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
        self._reading = asyncio.Lock()
        self._task = asyncio.create_task(self._run(after), name=f"line {pattern}")
        self._task.add_done_callback(self._ended)

    @property
    def is_over(self) -> bool:
        """Whether it tells nothing more."""
        return self._task.done()

    def known(self) -> Line | None:
        """The line as somebody knows it who waits."""
        return next((waiting.line for waiting in self._waiting.values()), None)

    def join(self, waiting: Waiting, since: int) -> bool:
        """Tell him what has changed since revision `since`, and will; false if that was too long ago."""
        if since < self._floor:
            return False
        self.catch_up(waiting)
        self._waiting[waiting.key] = waiting
        return True

    def join_others(self, waiting: Waiting) -> None:
        """Tell him what those know who wait already, and what changes."""
        known = self.known()
        if known is not None:
            waiting.line.learn_from(known)
        self._waiting[waiting.key] = waiting

    async def read(self, waiting: Waiting) -> None:
        """Read the line, for all who wait in it, unless that was done since he came.

        Raises Disconnected, LogGone.
        """
        async with self._reading:
            while not waiting.has_read:
                covered = list(self._waiting.values())
                snapshot = await self._leases.entries(self._pattern)
                if snapshot.revision < self._floor:
                    continue
                for each in covered:
                    each.learn(snapshot)
                    self.catch_up(each)
                    each.wake_if_free()

    def catch_up(self, waiting: Waiting) -> None:
        """Tell him again what was told since a reading that may be older."""
        for change in self._recent:
            waiting.line.apply(change)

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
                    waiting.line.apply(change)
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

    def watched(self, pattern: str) -> Watch | None:
        """The watch of a line that somebody waits in."""
        watch = self._watches.get(pattern)
        return None if watch is None or watch.is_over else watch

    def join(self, pattern: str, waiting: Waiting, since: int) -> Watch | None:
        """The watch that tells somebody from now on; None if he must read the line again before."""
        watch = self.watched(pattern)
        if watch is None:
            watch = self._watches[pattern] = Watch(self._leases, pattern, since)
        return watch if watch.join(waiting, since) else None

    async def leave(self, pattern: str, watch: Watch, key: str) -> None:
        """End a watch when the last one leaves."""
        if not watch.leave(key):
            return
        if self._watches.get(pattern) is watch:
            del self._watches[pattern]
        await watch.end()
