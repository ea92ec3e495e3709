"""The folder a server keeps its data in: locked, measured, and named in errors."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Final

import psutil

from agentflow.errors import OperatingError

FULL_BYTES: Final = 16 * 1024 * 1024
"""A disk with less than this free is as good as full."""
# A disk is not called roomy again as soon as a little was removed.
_ROOMY_BYTES: Final = 2 * FULL_BYTES
_LOOK_S: Final = 1.0
# Of what is free on the disk, so much is left to others.
_SPARED_SHARE: Final = 0.1
# How long a server may outlive the process that started it and was killed.
_LINGER_S_MAX: Final = 10.0
_LOCK_INTERVAL_S: Final = 0.02
_TAIL_BYTES: Final = 64 * 1024
_LOCK_FILE: Final = "nats-server.lock"


async def lock(folder: Path) -> int:
    """Lock the folder and return the descriptor that holds the lock. Raises OperatingError."""
    with writing(folder):
        fd = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        await _wait_lock(folder, fd)
        with writing(folder):
            write_holders(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _wait_lock(folder: Path, fd: int) -> None:
    deadline = asyncio.get_running_loop().time() + _LINGER_S_MAX
    while not _try_lock(folder, fd):
        owner, server = _holders(fd)
        # The server of one that was killed is about to end: worth waiting for.
        if _lives(owner) or asyncio.get_running_loop().time() > deadline:
            raise OperatingError(_in_use(folder, owner, server))
        await asyncio.sleep(_LOCK_INTERVAL_S)


def _try_lock(folder: Path, fd: int) -> bool:
    with writing(folder), contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _in_use(folder: Path, owner: int, server: int) -> str:
    if _lives(owner):
        return f"the folder {folder} is in use by process {owner}: end that process, or choose another folder"
    return (
        f"the folder {folder} is in use by nats-server, process {server}, left behind by a process that was"
        f" killed: end it (kill {server}), or choose another folder"
    )


def write_holders(fd: int, server: int) -> None:
    """Say in the lock file who we are and which server we have started."""
    os.pwrite(fd, f"{os.getpid():<10} {server:<10}\n".encode(), 0)


def _holders(fd: int) -> tuple[int, int]:
    """Process ids of who locked the folder and of its server; 0: not known."""
    owner, _, server = os.pread(fd, 64, 0).decode(errors="replace").partition(" ")
    return (_number(owner), _number(server))


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def writing(folder: Path) -> Generator[None]:
    """Turn what the file system says into an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise OperatingError(f"cannot write to the folder {folder}: {error}") from error


def store_limit(folder: Path) -> int:
    """What the store may grow to: what it has now, and most of what is free."""
    return used_bytes(folder) + int(shutil.disk_usage(folder).free * (1 - _SPARED_SHARE))


def free_bytes(folder: Path) -> int:
    """Bytes free on the folder's disk."""
    with writing(folder):
        return shutil.disk_usage(folder).free


async def disk_full(folder: Path) -> None:
    """Wait until its disk is as good as full. Raises OperatingError."""
    while free_bytes(folder) >= FULL_BYTES:  # noqa: ASYNC110 - no file system tells
        await asyncio.sleep(_LOOK_S)


async def disk_roomy(folder: Path) -> None:
    """Wait until there is room on its disk again. Raises OperatingError."""
    while free_bytes(folder) < _ROOMY_BYTES:  # noqa: ASYNC110 - no file system tells
        await asyncio.sleep(_LOOK_S)


def used_bytes(folder: Path) -> int:
    """Bytes the store takes now."""
    return sum(file.stat().st_size for file in (folder / "jetstream").rglob("*") if file.is_file())


def size(file: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def tail_of(fd: int, start: int) -> str:
    """The end of what an open file holds from `start` on."""
    size = os.fstat(fd).st_size
    start = max(start, size - _TAIL_BYTES)
    return os.pread(fd, _TAIL_BYTES, start).decode(errors="replace")
