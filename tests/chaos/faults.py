"""Carrying out faults: each strikes whoever has the role now, and is healed for the same one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.chaos.cluster import Cluster
from tests.chaos.journal import Journal
from tests.chaos.schedule import Fault

_SERVERS = frozenset({"server", "stream-leader", "lease-leader"})


class Faults:
    """Strikes at the planned times. What is under way when `run` ends has been healed."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._journal = Journal(folder / "faults.jsonl")
        self.struck: Counter[str] = Counter()
        """By kind."""

    async def run(self, planned: Sequence[Fault], began: float) -> None:
        """All of them; `began` is the time that theirs counts from."""
        try:
            async with asyncio.TaskGroup() as group:
                for fault in planned:
                    await asyncio.sleep(max(0.0, began + fault.at_s - time.monotonic()))
                    group.create_task(self._strike(fault))
        finally:
            self._journal.close()

    async def _strike(self, fault: Fault) -> None:
        at = time.monotonic()
        is_server = fault.target.partition("-")[0] == "server" or fault.target in _SERVERS
        hit = await (self._strike_server(fault) if is_server else self._strike_node(fault))
        if hit:
            self.struck[fault.kind] += 1
        self._journal.write(
            number=fault.number,
            family=fault.family,
            kind=fault.kind,
            target=fault.target,
            hit=hit,
            at=at,
            healed=time.monotonic(),
        )

    async def _strike_server(self, fault: Fault) -> str:
        """Which server was hit; empty if none has the role."""
        number = await self._cluster.server(fault.target)
        if number is None:
            return ""
        servers = self._cluster.servers
        async with AsyncExitStack() as healing:
            match fault.family:
                case "kill":
                    await servers.kill(number)
                    healing.push_async_callback(servers.start, number)
                case "pause":
                    servers.all[number].pause()
                    healing.callback(servers.all[number].go_on)
                case "partition":
                    for route in servers.routes_of(number):
                        route.refuse()
                        healing.callback(route.heal)
                case _:
                    await servers.fill(number)
                    healing.push_async_callback(servers.make_room, number)
            await asyncio.sleep(fault.for_s)
        return f"server-{number}"

    async def _strike_node(self, fault: Fault) -> str:
        """Which node was hit; empty if none has the role."""
        node = self._cluster.node(fault.target)
        if node is None:
            return ""
        async with AsyncExitStack() as healing:
            match fault.family:
                case "kill":
                    node.hold()
                    healing.callback(node.release)
                    node.kill()
                case "pause":
                    node.pause()
                    healing.callback(node.go_on)
                case "clock":
                    clock = self._cluster.clocks[node.name]
                    clock.set(fault.amount)
                    healing.callback(clock.set, 0)
                case _:
                    self._break_edge(fault, node.name, healing)
            await asyncio.sleep(fault.for_s)
        return node.name

    def _break_edge(self, fault: Fault, name: str, healing: AsyncExitStack) -> None:
        for proxy in self._cluster.proxies[name]:
            healing.callback(proxy.heal)
            match fault.family:
                case "cut":
                    proxy.refuse()
                case "oneway":
                    proxy.blackhole(to_server=fault.amount == 1, to_client=fault.amount != 1)
                case "latency":
                    proxy.delay(fault.amount)
                case _:
                    proxy.drop_acks()
