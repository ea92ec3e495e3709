"""Requests of those who run a cluster."""

from __future__ import annotations

from agentflow.checks import check
from agentflow.client.client import PATIENCE_S, Client
from agentflow.errors import InvalidRequest
from agentflow.events import WorkerDrainRequested
from agentflow.writer import Writer


async def drain_worker(client: Client, worker: str, reason: str = "") -> int:
    """Ask a worker to take nothing new, finish what it runs, and end.

    Returns the request's sequence once it is durable. The worker says `worker.draining` when it
    has read it and `worker.left` when it is done; a worker nobody knows is answered with
    `event.rejected`. Raises InvalidRequest, AppendRefused, AppendUnknown.
    """
    event = WorkerDrainRequested(worker=worker, reason=reason)
    bad = check(event)
    if bad is not None:
        raise InvalidRequest(f"{bad.reason}: {bad.detail}")
    async with Writer(client.log, client.name, patience_s=PATIENCE_S) as writer:
        return await writer.write([event])
