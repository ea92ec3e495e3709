"""One run of one peer in one way: `python -m tests.bench.peers PEER [WAY] [--tasks N]`.

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
from collections.abc import Mapping
from types import FrameType
from typing import Final, Protocol, cast

from tests.bench.conditions import package_version
from tests.bench.peers.way import RECORDED, WAYS, Way

PEERS: Final[Mapping[str, tuple[str, ...]]] = {
    "celery": WAYS,
    "dramatiq": WAYS,
    "taskiq_nats": WAYS,
    "taskiq_nats_fsync": (RECORDED,),
    "dask": WAYS,
}
"""The ways in which each can be measured, known without importing its library."""
_WARM_UP_TASKS: Final = 1000


class Peer(Protocol):
    """What each `<name>_peer` module offers."""

    PACKAGES: tuple[str, ...]
    """The distributions whose versions matter."""
    WAYS: Mapping[str, Way]
    """As many as `PEERS` says."""


def main() -> None:
    """Run the peer named on the command line once."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("way", choices=WAYS, nargs="?", default=RECORDED)
    parser.add_argument("--tasks", type=int, default=None, help="instead of the peer's own number")
    arguments = parser.parse_args()
    # Without this SIGTERM would end us before the `finally` clauses that end the servers.
    signal.signal(signal.SIGTERM, _leave)
    peer = cast("Peer", importlib.import_module(f"tests.bench.peers.{arguments.peer}_peer"))
    way = peer.WAYS[arguments.way]
    tasks = arguments.tasks or way.tasks
    seconds = way.measure(tasks, _WARM_UP_TASKS)
    versions = {name: package_version(name) for name in peer.PACKAGES}
    print(json.dumps({"tasks": tasks, "seconds": seconds, "settings": way.settings, "versions": versions}))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("ended by SIGTERM")


if __name__ == "__main__":
    main()
