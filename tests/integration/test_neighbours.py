"""Workers that share a machine, and nothing else."""

from __future__ import annotations

import asyncio

import agentflow
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests.servers import NatsServer

# A worker looks once a second for what its ended programs left behind.
LONGER_THAN_A_SWEEP_S = 2.5


async def _run_in(namespace: str, url: str, script: str) -> agentflow.Outcome:
    async with (
        Master(MasterConfig(url=url, namespace=namespace)),
        Worker(WorkerConfig(url=url, namespace=namespace)),
        agentflow.Client(url, namespace=namespace) as client,
    ):
        outcome = await (await client.shell(script)).outcome(20)
        await asyncio.sleep(LONGER_THAN_A_SWEEP_S)
        return outcome


async def test_a_worker_kills_nothing_of_another_namespace(nats_server: NatsServer) -> None:
    short, long = await asyncio.gather(
        _run_in("one", nats_server.url, "true"),
        _run_in("two", nats_server.url, f"sleep {LONGER_THAN_A_SWEEP_S}"),
    )
    assert (short.state, long.state) == ("completed", "completed"), long.message
