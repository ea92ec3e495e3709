"""One node of a bench's cluster, as a process of its own: `python -m tests.bench.node master URL …`."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TypeVar

import msgspec
import uvloop

import tests.bench.app  # noqa: F401  # pyright: ignore[reportUnusedImport] - registers the functions
from agentflow.client.function import registered
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker

T = TypeVar("T", bound=msgspec.Struct)


async def run(role: str, url: str, name: str, slots: int, functions: bool, more: bytes = b"{}") -> None:
    """Be a node until SIGTERM; `more` holds further fields of its configuration, as JSON."""
    node: Master | Worker
    if role == "master":
        node = Master(_config(MasterConfig(url=url, name=name), more))
    else:
        chosen = registered() if functions else {}
        node = Worker(_config(WorkerConfig(url=url, name=name, slots=slots, drain_s=2.0), more), chosen)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with node:
        print("ready", flush=True)
        await stop.wait()


def _config(config: T, more: bytes) -> T:
    given = {**msgspec.to_builtins(config), **msgspec.json.decode(more)}
    return msgspec.convert(given, type(config))


def main() -> None:
    """Parse `ROLE URL NAME [SLOTS [JSON]]`."""
    role, url, name = sys.argv[1:4]
    slots = int(sys.argv[4]) if len(sys.argv) > 4 else 8
    more = sys.argv[5].encode() if len(sys.argv) > 5 else b"{}"
    uvloop.run(run(role, url, name, slots, functions=True, more=more))


if __name__ == "__main__":
    main()
