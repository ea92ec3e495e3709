"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def be_killed_with_parent() -> None:
    """In the child: it is killed once its parent dies, which may have happened already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with(parent: int) -> None:
    """In the child: it ends with the parent of this process id, also if that died before this was asked for."""
    be_killed_with_parent()
    if os.getppid() != parent:
        os._exit(1)
