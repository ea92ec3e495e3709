"""How completions are counted without slowing the peer that is measured.

A result store costs a peer one to three writes for every task. Where a peer is measured without one
(`way.UNRECORDED`), its no-op task adds one to eight bytes of shared memory instead, and the client adds those up. That
costs less than a microsecond a task, and it is to the peer's advantage: a task counts as done
when its body ran, before the peer acknowledged it. Every thread of every worker process writes
a file of its own, so nothing is locked.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

FOLDER_VARIABLE: Final = "PEER_TALLY_FOLDER"
"""Where a worker process finds the folder of its tallies."""

_NUMBER: Final = struct.Struct("<Q")
_POLL_S: Final = 0.005
_STALL_LIMIT_S: Final = 60.0


class _Own(threading.local):
    """The tally of one thread, opened when the thread completes its first task."""

    def __init__(self) -> None:
        folder = Path(os.environ[FOLDER_VARIABLE])
        path = folder / f"{os.getpid()}-{threading.get_ident()}"
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".new-", delete=False) as file:
            file.write(_NUMBER.pack(0))
            file.flush()
            self.memory = mmap.mmap(file.fileno(), _NUMBER.size)
        # A tally appears under its name only when it can be read.
        Path(file.name).rename(path)
        self.number = 0


class _Tallies:
    """The tallies of the process; made after the fork, at the first task."""

    own: _Own | None = None


def completed() -> None:
    """Count one task: all that the no-op of a peer does."""
    own = _Tallies.own
    if own is None:
        own = _Tallies.own = _Own()
    own.number += 1
    _NUMBER.pack_into(own.memory, 0, own.number)


def wait_for_completions(folder: Path, expected: int, workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return as soon as the workers have completed so many tasks since they started.

    Raises RuntimeError when a worker ends before, TimeoutError when nothing moves for a minute.
    """
    tallies: dict[Path, mmap.mmap] = {}
    seen, moved_at = 0, time.monotonic()
    while True:
        _open_new(folder, tallies)
        total = sum(_NUMBER.unpack_from(memory)[0] for memory in tallies.values())
        if total >= expected:
            return
        now = time.monotonic()
        if total > seen:
            seen, moved_at = total, now
        if now - moved_at > _STALL_LIMIT_S:
            message = f"{total} of {expected} tasks completed, none in the last {_STALL_LIMIT_S:.0f} s"
            raise TimeoutError(message)
        _expect_alive(workers)
        time.sleep(_POLL_S)


def _open_new(folder: Path, tallies: dict[Path, mmap.mmap]) -> None:
    for path in folder.glob("[0-9]*"):
        if path not in tallies:
            with path.open("rb") as file:
                tallies[path] = mmap.mmap(file.fileno(), _NUMBER.size, access=mmap.ACCESS_READ)


def _expect_alive(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.poll() is not None:
            message = f"worker {process.args!r} ended with {process.returncode} before its tasks were done"
            raise RuntimeError(message)
