"""One run of one peer: `python -m tests.bench.peers PEER [--tasks N]`.

Prints one JSON object: tasks, seconds, what the peer was set to, and the versions it ran with.
Diagnostics go to stderr. A run has an interpreter of its own, so that no peer inherits what
another one imported, patched or left running.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from types import FrameType
from typing import Final, Protocol, cast

from tests.bench.conditions import package_version

PEERS: Final = ("celery", "dramatiq", "taskiq_nats", "dask")
_WARM_UP_TASKS: Final = 1000


class Peer(Protocol):
    """What each `<name>_peer` module offers."""

    PACKAGES: tuple[str, ...]
    """The distributions whose versions matter."""
    SETTINGS: str
    """How client, workers and broker are set, for the reader of the table."""
    TASKS: int
    """So many that a run takes five to ten seconds on two cores."""

    def measure(self, tasks: int, warm_up: int) -> float:
        """Start everything, warm up, and return the seconds from first submit to last completion."""
        ...


def main() -> None:
    """Run the peer named on the command line once."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--tasks", type=int, default=None, help="instead of the peer's own number")
    arguments = parser.parse_args()
    # Without this SIGTERM would end us before the `finally` clauses that end the servers.
    signal.signal(signal.SIGTERM, _leave)
    peer = cast("Peer", importlib.import_module(f"tests.bench.peers.{arguments.peer}_peer"))
    tasks = arguments.tasks or peer.TASKS
    seconds = peer.measure(tasks, _WARM_UP_TASKS)
    versions = {name: package_version(name) for name in peer.PACKAGES}
    print(json.dumps({"tasks": tasks, "seconds": seconds, "settings": peer.SETTINGS, "versions": versions}))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("ended by SIGTERM")


if __name__ == "__main__":
    main()
