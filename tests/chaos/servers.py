"""The servers of a campaign: one, or three behind proxies on every route; stores that can be full."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from agentflow_nodes.embedded.address import free_ports
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

_MB: Final = 1 << 20
_ROOM_LEFT_BYTES: Final = 256 * 1024
"""What a full disk has left: enough for a few more writes."""


class Disk:
    """A file system of the servers' own, in memory, that can be made full. An async context manager.

    Where mounting is not permitted it is a plain folder, and filling it limits the server's
    own budget instead.
    """

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder: Final = folder
        self._size_mb = size_mb
        self.mounted = False

    async def __aenter__(self) -> Self:
        self.folder.mkdir()
        command = ("mount", "-t", "tmpfs", "-o", f"size={self._size_mb}m", "tmpfs", str(self.folder))
        self.mounted = os.geteuid() == 0 and await _run(*command)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.mounted:
            await _run("umount", "--lazy", str(self.folder))

    @property
    def used_bytes(self) -> int:
        """What lies there now."""
        if self.mounted:
            stat = os.statvfs(self.folder)
            return (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    async def fill(self) -> None:
        """Leave next to no room."""
        await self._resize(str(self.used_bytes + _ROOM_LEFT_BYTES))

    async def empty(self) -> None:
        """Give the room back."""
        await self._resize(f"{self._size_mb}m")

    async def _resize(self, size: str) -> None:
        if self.mounted:
            await _run("mount", "-o", f"remount,size={size}", str(self.folder))


async def _run(*command: str) -> bool:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return await process.wait() == 0


class Server(NatsServer):
    """A server whose folder, budget and routes are given; its neighbours are reached through proxies only."""

    def __init__(self, folder: Path, *, cluster_port: int | None = None) -> None:
        super().__init__(cluster_port=cluster_port)
        self._folder.rmdir()
        folder.mkdir()
        self._folder = folder
        self.budget_bytes = 1 << 40
        """What the server itself takes at the most."""
        self.paused = False

    def lead_routes(self, ports: Sequence[int]) -> None:
        """Where its neighbours are, from the next start on."""
        self._routes = ports

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _config(self) -> str:
        cluster = ""
        if self._cluster_port is not None:
            routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in self._routes)
            cluster = f"""
            cluster {{
                name: chaos, listen: "127.0.0.1:{self._cluster_port}", no_advertise: true, routes: [{routes}]
            }}
            """
        return f"""
            listen: "127.0.0.1:{self.port}"
            server_name: {self.name}
            logfile: "{self._folder}/server.log"
            jetstream {{
                store_dir: "{self._folder}/data", sync_interval: always, strict: true
                max_file_store: {self.budget_bytes}
            }}
            {cluster}
            """


class Servers:
    """All of them, with a proxy on each route. An async context manager: entered means started."""

    def __init__(self, folder: Path, replicas: int, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        self._replicated = replicas > 1
        self.all: list[Server] = []
        self._routes: dict[tuple[int, int], FaultProxy] = {}
        self._count = replicas
        self._stack = AsyncExitStack()
        self._locks: list[asyncio.Lock] = []

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            ports = free_ports(self._count)
            for number, port in enumerate(ports):
                server = Server(
                    self._disk.folder / f"server-{number}", cluster_port=port if self._replicated else None
                )
                self.all.append(server)
                self._locks.append(asyncio.Lock())
            if self._replicated:
                await self._lay_routes(stack, ports)
            await asyncio.gather(*(stack.enter_async_context(server) for server in self.all))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, server in enumerate(self.all):
            log = server._folder / "server.log"
            if log.exists():
                (self._folder / f"server-{number}.log").write_bytes(log.read_bytes())
        await self._stack.aclose()

    async def _lay_routes(self, stack: AsyncExitStack, ports: Sequence[int]) -> None:
        for one in range(len(ports)):
            for other, port in enumerate(ports):
                if one != other:
                    self._routes[one, other] = await stack.enter_async_context(FaultProxy(port))
            routes = [route.port for (start, _), route in self._routes.items() if start == one]
            self.all[one].lead_routes(routes)

    def routes_of(self, number: int) -> list[FaultProxy]:
        """The routes to and from a server."""
        return [route for ends, route in self._routes.items() if number in ends]

    def number_of(self, server_name: str) -> int:
        """The number of the server that calls itself so."""
        return [server.name for server in self.all].index(server_name)

    async def kill(self, number: int) -> None:
        """SIGKILL."""
        async with self._locks[number]:
            await self.all[number].kill()

    async def start(self, number: int) -> None:
        """Start it if it is not running; twice if need be, since a fault may hit it while it starts."""
        async with self._locks[number]:
            for attempt in (1, 2, 3):
                try:
                    if not self.all[number].running:
                        await self.all[number].start()
                except (TimeoutError, AssertionError):
                    await self.all[number].kill()
                    if attempt == 3:
                        raise
                else:
                    return

    async def fill(self, number: int) -> None:
        """The disk is full from here on."""
        await self._disk.fill()
        if not self._disk.mounted:
            self.all[number].budget_bytes = max(self._disk.used_bytes, _MB)
            await self.kill(number)
            await self.start(number)

    async def make_room(self, number: int) -> None:
        """There is room again. A server that met a full disk writes again only after a restart."""
        await self._disk.empty()
        self.all[number].budget_bytes = 1 << 40
        await self.kill(number)
        await self.start(number)
