"""What a process gives up for good, so that it can do no harm whatever it is made to run.

Two steps. `cut_off` comes first, before anything has started a thread: no network, no other
process, none of the rarer doors into the kernel. `confine` comes when all code is loaded: no
rights, no file but those of one folder, little memory, CPU and room.

What needs a right or a newer kernel (a network and a root folder of one's own, Landlock) is left
out where it is missing. The filter of system calls needs neither: without it, on a processor not
listed here or in a kernel built without it, only a network of one's own keeps the network away.

This module imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

NOBODY: Final = 65_534
"""The user and group that root becomes."""

_CLONE_NEWUSER: Final = 0x1000_0000
_CLONE_NEWNET: Final = 0x4000_0000
_CLONE_THREAD: Final = 0x0001_0000
_FILES_MAX: Final = 64
_MIB: Final = 1024 * 1024

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_CAPABILITIES_V3: Final = 0x2008_0522


def cut_off() -> None:
    """Be alone: no network, no other programs, no signals to others. Before there are threads."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNET) and os.geteuid():
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_system_calls()


def confine(folder: Path, *, address_space_mb: int, cpu_s: int) -> None:
    """Keep nothing but reading what is in a folder, which is the working directory from here on."""
    os.chdir(folder)
    with suppress(OSError):
        os.chroot(".")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    libc = ctypes.CDLL(None)
    libc.capset(struct.pack("Ii", _CAPABILITIES_V3, 0), bytes(24))
    keep_only_files_in(Path())
    for kind, soft, hard in (
        (resource.RLIMIT_AS, address_space_mb * _MIB, address_space_mb * _MIB),
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),  # at the harder one nobody is told why
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, _FILES_MAX, _FILES_MAX),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user would undo it


# System calls --------------------------------------------------------------------------------


_MACHINES: Final = {"x86_64": 0, "aarch64": 1}
"""Which of the two numbers below is meant."""
_AUDIT: Final = (0xC000_003E, 0xC000_00B7)
_CLONE: Final = (56, 220)
_CLONE3: Final = 435
_X32: Final = 0x4000_0000
"""From here on numbers are those of another interface of the same processor."""
_REFUSED: Final[dict[str, tuple[int, ...]]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57,),
    "vfork": (58,),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "open_by_handle_at": (304, 265),
    "userfaultfd": (323, 282),
}
"""On x86_64, and on aarch64 where it is there."""
_ALLOW: Final = 0x7FFF_0000
_REFUSE: Final = 0x0005_0000
"""Plus the error that the call ends with."""
_EPERM: Final = 1
_ENOSYS: Final = 38


def filter_system_calls() -> bool:
    """Refuse those that reach other processes, the network or the depths of the kernel; whether it could be done.

    It holds for this thread and all it starts from here on.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return False
    code = b"".join(_program(_AUDIT[machine], _CLONE[machine], _numbers(machine)))
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(held))
    return not ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def _numbers(machine: int) -> list[int]:
    return [numbers[machine] for numbers in _REFUSED.values() if machine < len(numbers)]


def _program(audit: int, clone: int, numbers: list[int]) -> Iterator[bytes]:
    """The filter, in instructions of the kernel's."""
    refused = _REFUSE + _EPERM
    yield _load(_ARCHITECTURE)
    yield from _when(_EQUAL, audit, refused, negated=True)
    yield _load(_NUMBER)
    yield from _when(_AT_LEAST, _X32, refused)
    for number in numbers:
        yield from _when(_EQUAL, number, refused)
    # What it is asked for is in memory, where no filter can look: libraries then use `clone`.
    yield from _when(_EQUAL, _CLONE3, _REFUSE + _ENOSYS)
    yield from _when(_EQUAL, clone, _ALLOW, negated=True)
    yield _load(_FIRST_ARGUMENT)
    yield from _when(_ANY_BIT, _CLONE_THREAD, _ALLOW)
    yield _return(refused)


_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Where the kernel tells what of a call, in bytes."""
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45


def _load(place: int) -> bytes:
    return _instruction(0x20, place)


def _return(result: int) -> bytes:
    return _instruction(0x06, result)


def _when(test: int, value: int, result: int, *, negated: bool = False) -> Iterator[bytes]:
    """Return a result if what was loaded passes a test; else go on."""
    yield _instruction(test, value, skip_if=int(negated), skip_else=int(not negated))
    yield _return(result)


def _instruction(code: int, value: int, *, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("HBBI", code, skip_if, skip_else, value)


# Files ---------------------------------------------------------------------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_MEMORY_LIMITS: Final = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
"""Where DuckDB looks for how much it may take; it does not survive being forbidden to."""
# By version: what may be done with files, with TCP, and beyond the process (signals, sockets).
_FILE_RIGHTS: Final = (13, 14, 15, 15, 16)
_NETWORK_SINCE, _SCOPES_SINCE = 4, 6


def landlock_version() -> int:
    """What this kernel knows of Landlock; less than 1: nothing."""
    version: int = ctypes.CDLL(None).syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    return version


def keep_only_files_in(folder: Path) -> bool:
    """Have no files but those in a folder, to read; whether it could be done.

    It holds for this thread and all it starts from here on.
    """
    version = landlock_version()
    if version < 1:
        return False
    call = ctypes.CDLL(None).syscall
    files = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS)) - 1]) - 1
    network, scopes = 3 * (version >= _NETWORK_SINCE), 3 * (version >= _SCOPES_SINCE)
    rules = call(_LANDLOCK_CREATE, struct.pack("QQQ", files, network, scopes), 24, 0)
    try:
        for path in (folder, *filter(Path.exists, _MEMORY_LIMITS)):
            _let_read(rules, path)
        return not call(_LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _let_read(rules: int, path: Path) -> None:
    rights = _READ_FILE | (_READ_FOLDER if path.is_dir() else 0)
    opened = os.open(path, os.O_PATH)
    try:
        ctypes.CDLL(None).syscall(_LANDLOCK_ADD, rules, _PATH_BENEATH, struct.pack("=Qi", rights, opened), 0)
    finally:
        os.close(opened)
