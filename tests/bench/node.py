"""One node of a bench's cluster, as a process of its own: `python -m tests.bench.node master URL …`."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

import tests.bench.app  # noqa: F401  # pyright: ignore[reportUnusedImport] - registers the functions
from agentflow.client.function import registered
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker


async def run(role: str, url: str, name: str, slots: int, functions: bool) -> None:
    """Be a node until SIGTERM."""
    node: Master | Worker
    if role == "master":
        node = Master(MasterConfig(url=url, name=name))
    else:
        chosen = registered() if functions else {}
        node = Worker(WorkerConfig(url=url, name=name, slots=slots, drain_s=2.0), chosen)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with node:
        print("ready", flush=True)
        await stop.wait()


def main() -> None:
    """Parse `ROLE URL NAME [SLOTS]`."""
    role, url, name = sys.argv[1:4]
    slots = int(sys.argv[4]) if len(sys.argv) > 4 else 8
    uvloop.run(run(role, url, name, slots, functions=True))


if __name__ == "__main__":
    main()
