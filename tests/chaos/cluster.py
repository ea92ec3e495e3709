"""The cluster of a campaign: real servers and nodes, with a proxy on every edge."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import agentflow
from agentflow import wire
from agentflow.errors import AgentFlowError
from agentflow.log.stream import ask
from tests.chaos.app import EFFECTS_VARIABLE
from tests.chaos.histories import PREFIX
from tests.chaos.journal import Journal
from tests.chaos.nodes import Clock, Node
from tests.chaos.nodes import agentflow as command
from tests.chaos.options import NAMESPACE, Options
from tests.chaos.servers import Disk, Servers
from tests.chaos.watch import Watch
from tests.eventually import eventually
from tests.faultproxy import FaultProxy

LEASES: Final = f"KV_{wire.LEASE_BUCKET}"
_ASK_TIMEOUT_S: Final = 2.0
_LED_WITHIN_S: Final = 30.0
_CLUSTER_WITHIN_S: Final = 30.0


class Cluster:
    """Servers, masters, workers and clients. An async context manager: entered means all is ready."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options: Final = options
        self.folder: Final = folder
        self.canary: Final = f"CANARY-{secrets.token_hex(12)}"
        self._disk = Disk(folder / "disk", options.store_mb)
        self.servers: Final = Servers(folder, options.replicas, self._disk)
        self.proxies: Final[dict[str, list[FaultProxy]]] = {}
        """By node, one for each server."""
        self.masters: Final[list[Node]] = []
        self.workers: Final[list[Node]] = []
        self.clients: Final[list[Node]] = []
        self.clocks: Final[dict[str, Clock]] = {}
        self._stack = AsyncExitStack()
        self._exits = Journal(folder / "exits.jsonl")
        self._watch: Watch | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self._exits.close)
            await stack.enter_async_context(self._disk)
            await stack.enter_async_context(self.servers)
            await self._open(stack)
            await self._start_nodes(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def watch(self) -> Watch:
        """What sees the log."""
        assert self._watch is not None
        return self._watch

    @property
    def nodes(self) -> list[Node]:
        """Masters and workers."""
        return [*self.masters, *self.workers]

    def reconnects(self) -> int:
        """Connections made beyond the first of each edge."""
        return sum(max(0, proxy.connections - 1) for edge in self.proxies.values() for proxy in edge)

    async def _open(self, stack: AsyncExitStack) -> None:
        """Make the streams, and read the log from now on."""
        urls = [server.url for server in self.servers.all]
        replicas = self.options.replicas
        client = agentflow.Client(urls, namespace=NAMESPACE, name="watch", replicas=replicas)
        await eventually(lambda: _entered(stack, client), within_s=_CLUSTER_WITHIN_S)
        await eventually(lambda: _made_bucket(client), within_s=_CLUSTER_WITHIN_S)
        chance = random.Random(f"watch {self.options.seed}")
        self._watch = await stack.enter_async_context(Watch(client, self.folder, chance))

    async def _start_nodes(self, stack: AsyncExitStack) -> None:
        options = self.options
        for number in range(options.masters):
            ttls = ("--lease-ttl-s", str(options.lease_ttl_s), "--worker-ttl-s", str(options.worker_ttl_s))
            kept = () if number else ("--history", str(self.folder / f"{PREFIX}{number}"))
            self.masters.append(await self._node(stack, f"master-{number}", "master", *ttls, *kept))
        for number in range(options.workers):
            given = ("--app", "tests.chaos.app", "--slots", str(options.slots), "--cpu", "4")
            self.workers.append(await self._node(stack, f"worker-{number}", "worker", *given))
        async with asyncio.timeout(_LED_WITHIN_S * 2):
            await asyncio.gather(*(node.ready.wait() for node in self.nodes))
        await eventually(lambda: self.watch.leader, within_s=_LED_WITHIN_S)

    async def _node(self, stack: AsyncExitStack, name: str, *arguments: str) -> Node:
        url = await self._edge(stack, name)
        clock = self.clocks[name] = Clock(self.folder / f"{name}.clock")
        env = {
            **clock.env,
            EFFECTS_VARIABLE: str(self.folder / "effects.tsv"),
            # No task, log or journal may ever show these.
            "AGENTFLOW_SECRET": self.canary,
            "NATS_PASSWORD": self.canary,
        }
        given = ["--name", name, "--nats", url, "--namespace", NAMESPACE]
        given += ["--replicas", str(self.options.replicas)]
        node = Node(name, command(*arguments, *given), env, self.folder, self._exits)
        return await stack.enter_async_context(node)

    async def _edge(self, stack: AsyncExitStack, name: str) -> str:
        """Proxies between a node and each server; their urls."""
        edge = self.proxies[name] = [
            await stack.enter_async_context(FaultProxy(server.port)) for server in self.servers.all
        ]
        start = len(self.proxies) % len(edge)
        return ",".join(proxy.url for proxy in edge[start:] + edge[:start])

    async def start_clients(self) -> None:
        """Begin the load."""
        options = self.options
        for number in range(options.clients):
            name = f"client-{number}"
            given: Mapping[str, Any] = {
                "--url": await self._edge(self._stack, name),
                "--name": name,
                "--journal": self.folder / f"{name}.jsonl",
                "--seed": options.seed,
                "--tasks": options.tasks // options.clients,
                "--replicas": options.replicas,
                "--seconds": options.seconds,
            }
            argv = [sys.executable, "-m", "tests.chaos.load"]
            argv += [str(part) for pair in given.items() for part in pair]
            node = Node(name, argv, {}, self.folder, self._exits, lasting=False)
            self.clients.append(await self._stack.enter_async_context(node))

    def node(self, role: str) -> Node | None:
        """Who has a role now; None if nobody has."""
        if role in {"leader", "standby"}:
            leads = role == "leader"
            fit = [master for master in self.masters if (master.name == self.watch.leader) == leads]
            return next((master for master in fit if master.running), None)
        return next(node for node in [*self.nodes, *self.clients] if node.name == role)

    async def server(self, role: str) -> int | None:
        """The number of the server that has a role now; None if nobody knows."""
        if role not in {"stream-leader", "lease-leader"}:
            return int(role.removeprefix("server-")) if role != "server" else 0
        stream = wire.stream(NAMESPACE) if role == "stream-leader" else LEASES
        try:
            info = await ask(
                self.watch.client.bus, f"STREAM.INFO.{stream}", None, dict[str, Any], _ASK_TIMEOUT_S
            )
            return self.servers.number_of(info["cluster"]["leader"])
        except (AgentFlowError, KeyError, ValueError):
            return None


async def _made_bucket(client: agentflow.Client) -> bool:
    try:
        await client.objects.put(b"the bucket is made when it is first needed")
    except AgentFlowError:
        return False
    return True


async def _entered(stack: AsyncExitStack, client: agentflow.Client) -> bool:
    try:
        await stack.enter_async_context(client)
    except AgentFlowError:
        return False
    return True
