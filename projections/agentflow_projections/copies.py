"""Copies of a history's file, for processes that may see nothing else.

A file that is written has one process; everybody else reads a copy. It is made between two
commits, by a process that copies blocks: a tenth of a second for ten million events.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from agentflow_projections.confinement import NOBODY
from agentflow_projections.database import Database
from agentflow_projections.query import position_of

_PREFIX: Final = "agentflow-query-"
_FRESH_S_MIN: Final = 0.5
_FRESH_SHARE: Final = 20
"""Copying takes at most one part of so many of all time, unless somebody must see the newest."""


async def reach_of(database: Database) -> int:
    """How far a database reaches, asked beside its writer."""
    return await asyncio.to_thread(reach_now, database)


def reach_now(database: Database) -> int:
    """How far a database reaches; for a thread."""
    cursor = database.cursor()
    try:
        return position_of(cursor)
    finally:
        cursor.close()


class _Copy:
    """A copy of the file in a folder of its own, whose name says nothing."""

    def __init__(self, database: Database) -> None:
        self.source: Final = database
        self.reach: Final = reach_now(database)
        self.users = 0
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        # Held until this process ends, however it does: what nobody holds is nobody's.
        self._held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        # Only now has it a name by which others look for such.
        self._folder = made.rename(made.with_name(made.name.removeprefix(".")))
        self.path: Final = self._folder / "db"
        try:
            database.copy_to(self.path)
            _give(self._folder)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove it; doing it twice is harmless."""
        shutil.rmtree(self._folder, ignore_errors=True)
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)


def remove_orphans() -> None:
    """Remove the copies of projectors that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody holds it, or it is not ours to open
            found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(found)


def _give(folder: Path) -> None:
    """Let it be read, and no more, by the process that is asked: nobody's, where this one may make it so."""
    for_group = os.geteuid() == 0
    for each in folder.iterdir():
        _restrict(each, 0o440 if for_group else 0o400)
    _restrict(folder, 0o750 if for_group else 0o700)


def _restrict(path: Path, mode: int) -> None:
    if os.geteuid() == 0:
        os.chown(path, -1, NOBODY)
    path.chmod(mode)


class Copies:
    """The newest copy of the file, made anew when it has become old."""

    def __init__(self) -> None:
        self._copy: _Copy | None = None
        self._fresh_until = 0.0
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def use(self, database: Database, at_least: int) -> AsyncGenerator[Path]:
        """A copy that reaches a position which the database reaches. Raises OperatingError."""
        copy = await self._newest(database, at_least)
        copy.users += 1
        try:
            yield copy.path
        finally:
            copy.users -= 1
            if copy is not self._copy and not copy.users:
                copy.remove()

    async def _newest(self, database: Database, at_least: int) -> _Copy:
        loop = asyncio.get_running_loop()
        async with self._one:
            copy = self._copy
            usable = copy is not None and copy.source is database and copy.reach >= at_least
            if copy is not None and usable:
                fresh_still = loop.time() < self._fresh_until
                if fresh_still or copy.reach >= await reach_of(database):
                    return copy
            begun = loop.time()
            self._copy = fresh = await asyncio.to_thread(_Copy, database)
            took_s = loop.time() - begun
            self._fresh_until = loop.time() + max(_FRESH_S_MIN, _FRESH_SHARE * took_s)
            if copy is not None and not copy.users:
                copy.remove()
            return fresh

    def close(self) -> None:
        """Remove it."""
        if self._copy is not None:
            self._copy.remove()
