"""A master as a process of its own that tells what it has folded, also while it only follows.

`python -m tests.bench.rolling_master URL NAME LEVEL [NAMESPACE]`. It is the same node that
`agentflow master` runs, with one question more: which state each of these ids is in, and as
of which position.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from agentflow import wire
from agentflow.domain.state import Namespace
from agentflow.frames import encode
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master

LEASE_TTL_S = 1
WORKER_TTL_S = 5.0


class Answer(Struct, frozen=True):
    """What a fold says as of one position."""

    who: str
    seq: int
    level: int
    counts: dict[str, int]
    states: dict[str, tuple[str, int, int]]
    """Of each id its state, and where the event that ended it lies."""


def asked(name: str) -> str:
    """The service of one master."""
    return wire.service("default", f"fold-{name}")


def answer(who: str, state: Namespace, ids: list[str]) -> Answer:
    """What a fold says of these ids."""
    counts = {"open": len(state.tasks), "ready": state.queue.size, "running": state.running}
    return Answer(who, state.seq, state.level, counts, {each: said_of(state, each) for each in ids})


def said_of(state: Namespace, wanted: str) -> tuple[str, int, int]:
    """State of one id and the position of its end; zeros while it is open."""
    status, position = state.status(wanted)
    return (str(status), position[0], position[1]) if position else (str(status), 0, 0)


async def _run(url: str, name: str, level: int) -> None:
    config = MasterConfig(url=url, name=name, level=level, lease_ttl_s=LEASE_TTL_S, worker_ttl_s=WORKER_TTL_S)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Master(config) as master:
        state = master.seats["default"].follower.state

        def reply(_subject: str, data: bytes, to: str, _headers: Any) -> None:
            master.bus.publish(to, encode(answer(name, state, msgspec.json.decode(data))))

        await master.bus.subscribe(asked(name), reply)
        sys.stdout.write('{"ready":true}\n')
        sys.stdout.flush()
        await stop.wait()


if __name__ == "__main__":
    uvloop.run(_run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
