"""A nats-server of our own: started, watched, restarted and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from msgspec import Struct

from agentflow.ending import end_tasks
from agentflow.errors import OperatingError
from agentflow.logs import get_logger
from agentflow_nodes.embedded.address import check_identity, is_loopback, reachable, url_host
from agentflow_nodes.embedded.folder import lock, store_limit, write_holders, writing
from agentflow_nodes.embedded.process import LOG_FILE, Run
from agentflow_nodes.embedded.program import find_server

Sync = Literal["always", "default"]
"""When what is acknowledged is on the disk: at once, or within two minutes."""

_PAYLOAD_BYTES_MAX: Final = 1024 * 1024
_PENDING_BYTES_MAX: Final = 64 * 1024 * 1024
_MEMORY_STORE_BYTES_MAX: Final = 256 * 1024 * 1024
_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
_LOG_FILES_MAX: Final = 3

_RESTARTS_MAX: Final = 8
_PAUSE_S_FIRST: Final = 0.05
_PAUSE_S_MAX: Final = 5.0
# A server that ran this long has earned its attempts anew.
_STABLE_S: Final = 60.0

_CONFIG_FILE: Final = "nats-server.conf"
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")

_log = get_logger(__name__)


class Peer(Struct, frozen=True, kw_only=True):
    """A server's place in a cluster on this machine."""

    name: str
    """The server's own; replicas know each other by it, so it must stay the same."""
    cluster: str
    port: int
    """Where the other servers connect, on loopback."""
    others: tuple[int, ...]
    """Their ports."""
    secret: str
    """What a server must know to take part."""

    def config(self) -> dict[str, Any]:
        """What the server is told of it."""
        return {
            "name": self.cluster,
            "listen": f"127.0.0.1:{self.port}",
            # Clients are told all addresses by us.
            "no_advertise": True,
            "authorization": {"user": "route", "password": self.secret, "timeout": 2},
            "routes": [f"nats-route://route:{self.secret}@127.0.0.1:{port}" for port in self.others],
        }


class EmbeddedServer:
    """A nats-server with JetStream in `data_dir`. An async context manager: entered means ready.

        async with EmbeddedServer(Path("data")) as server, Bus(server.url, name="cli") as bus:
            ...

    Port 0 is one that is free; it stays the same over restarts. `http_port` opens the
    monitoring port, on loopback; `peer` makes it one of a cluster; `tell` is called with words for people when
    it died and when it is back. Entering raises OperatingError saying what to do: no server
    installed or too old, port or folder in use, folder not writable, disk full.

    Enter it in the main thread, or in one that lives as long: the server ends with its thread.
    """

    def __init__(  # noqa: PLR0913 - options
        self,
        data_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        sync: Sync = "always",
        max_store_bytes: int | None = None,
        http_port: int | None = None,
        restart_if_dies: bool = True,
        peer: Peer | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.data_dir: Final = data_dir.absolute()
        self.gone: Final = asyncio.Event()
        """Set when the server died by itself and is not started again."""
        self.restarts = 0
        """How often it was started again after it had died."""
        self._host = host
        self._port = port
        self._sync: Sync = sync
        self._max_store_bytes = max_store_bytes
        self._http_port = http_port
        self._restart_if_dies = restart_if_dies
        self._peer = peer
        self._tell: Callable[[str], object] = tell or (lambda _: None)
        self._name = ""
        self._binary = Path()
        self._lock_fd: int | None = None
        self._run: Run | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._renewing = False
        self._why_not = ""
        """Why it could not be started again the last time, as people were told."""

    async def __aenter__(self) -> Self:
        assert self._lock_fd is None, "entered twice"
        self._binary = await find_server()
        try:
            self._make_folder()
            self._lock_fd = await lock(self.data_dir)
            self._settle_limit()
            await self._start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._keeper = asyncio.create_task(self._keep(), name="embedded nats-server")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await end_tasks(keeper)
        run, self._run = self._run, None
        if run is not None:
            await run.stop()
        lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is not None:
            os.close(lock_fd)

    async def renew(self) -> None:
        """End the server, for its keeper to start it again: after its disk was full it goes on refusing."""
        if self._run is not None and self._restart_if_dies:
            self._renewing = True
            await self._run.stop()

    @property
    def max_store_bytes(self) -> int:
        """Bytes its streams may take together."""
        assert self._max_store_bytes is not None, "the server was not started"
        return self._max_store_bytes

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        return f"nats://{url_host(reachable(self._host))}:{self.port}"

    @property
    def urls(self) -> list[str]:
        """The same, as a list of one."""
        return [self.url]

    @property
    def port(self) -> int:
        """The port clients connect to."""
        return self._port

    @property
    def name(self) -> str:
        """What it calls itself: random, and in a cluster the same over restarts."""
        return self._name

    @property
    def pid(self) -> int:
        """The server's process id; another one after a restart."""
        assert self._run is not None, "not entered"
        return self._run.process.pid

    @property
    def http_url(self) -> str | None:
        """Where the monitoring pages are, if they were asked for."""
        return None if self._http_port is None else f"http://127.0.0.1:{self._http_port}"

    @property
    def log_file(self) -> Path:
        """The server's log."""
        return self.data_dir / LOG_FILE

    # Starting.

    def _make_folder(self) -> None:
        if _UNPRINTABLE.search(str(self.data_dir)):
            raise OperatingError(f"the folder {str(self.data_dir)!r} has control characters in its name")
        if not is_loopback(self._host):
            _log.warning("nats-server listens without authentication", host=self._host)
        with writing(self.data_dir):
            self.data_dir.mkdir(parents=True, exist_ok=True)

    def _settle_limit(self) -> None:
        """Once, since it must stay the same over restarts."""
        with writing(self.data_dir):
            if self._max_store_bytes is None:
                self._max_store_bytes = store_limit(self.data_dir)

    async def _start(self) -> None:
        """Start the server and wait until it is ready. Raises OperatingError."""
        assert self._lock_fd is not None, "the folder is not locked"
        began = asyncio.get_running_loop().time()
        name = self._name = self._peer.name if self._peer is not None else f"embedded-{secrets.token_hex(8)}"
        with writing(self.data_dir):
            for stale in self.data_dir.glob("*.ports"):
                stale.unlink(missing_ok=True)
            config = self.data_dir / _CONFIG_FILE
            config.touch(mode=0o600)  # a cluster's secret stands in it
            config.write_text(json.dumps(self._config(name), indent=2, ensure_ascii=False) + "\n")
        self._run = await Run.launch(self._binary, config, self.data_dir, self._lock_fd)
        with writing(self.data_dir):
            write_holders(self._lock_fd, self._run.process.pid)
        try:
            ports = await self._run.ready()
            await check_identity(reachable(self._host), ports.client, name)
        except BaseException:
            await self._run.stop()
            raise
        self._port = ports.client
        self._http_port = ports.monitoring
        seconds = round(asyncio.get_running_loop().time() - began, 3)
        _log.info("nats-server started", url=self.url, pid=self.pid, data=str(self.data_dir), seconds=seconds)

    def _config(self, name: str) -> dict[str, Any]:
        """What the server is told; every option we rely on is named, defaults change."""
        folder = str(self.data_dir)
        config: dict[str, Any] = {
            "listen": f"{url_host(self._host)}:{self._port or -1}",
            "server_name": name,
            "ports_file_dir": folder,
            "max_payload": _PAYLOAD_BYTES_MAX,
            "max_pending": _PENDING_BYTES_MAX,
            "write_deadline": "10s",
            # The shortest the server takes.
            "lame_duck_duration": "30s",
            "lame_duck_grace_period": "1s",
            "logfile": str(self.log_file),
            "logfile_size_limit": _LOG_BYTES_MAX,
            "logfile_max_num": _LOG_FILES_MAX,
            "jetstream": {
                "store_dir": folder,
                "sync_interval": "always" if self._sync == "always" else "2m",
                "strict": True,
                # Left out, it would be derived from what is free at this start, and a disk that
                # was full once stays full to the server until the next.
                "max_file_store": self._max_store_bytes,
                "max_memory_store": _MEMORY_STORE_BYTES_MAX,
            },
        }
        if self._peer is not None:
            config["cluster"] = self._peer.config()
        if self._http_port is not None:
            config["http"] = f"127.0.0.1:{self._http_port or -1}"
        return config

    # Watching.

    async def _keep(self) -> None:
        """Keep a server running, and tell when that is over."""
        attempts = 0
        try:
            attempts = await self._revive()
        except Exception:  # noqa: BLE001 - whoever relies on the server must learn of it
            _log.exception("keeping nats-server alive failed")
        self.gone.set()
        _log.warning("nats-server is not started again", attempts=attempts)
        self._tell(f"The NATS server at {self.url} is not started again; see {self.log_file}")

    async def _revive(self) -> int:
        """Start the server again when it dies by itself; returns after too many attempts in a row."""
        attempts = 0
        started = True
        while True:
            if started and await self._died() > _STABLE_S:
                attempts = 0
            if not self._restart_if_dies or attempts == _RESTARTS_MAX:
                return attempts
            started = await self._restart(attempts)
            attempts += 1

    async def _died(self) -> float:
        """Wait until the server has ended; returns how many seconds it ran."""
        assert self._run is not None, "nothing to wait for"
        ran_s = await self._run.wait_dead()
        if not self._renewing:
            _log.warning("nats-server died", **self._run.obituary())
            self._tell(f"The NATS server at {self.url} {self._run.end()}")
        self._renewing = False
        await self._run.stop()
        return ran_s

    async def _restart(self, attempt: int) -> bool:
        if attempt:
            await asyncio.sleep(min(_PAUSE_S_MAX, _PAUSE_S_FIRST * 2.0**attempt))
        try:
            await self._start()
        except OperatingError as error:
            _log.warning("nats-server cannot be started again", attempt=attempt + 1, error=str(error))
            if str(error) != self._why_not:
                self._why_not = str(error)
                self._tell(f"The NATS server at {self.url} cannot be started again: {error}")
            return False
        self._why_not = ""
        self.restarts += 1
        self._tell(f"The NATS server at {self.url} is back")
        return True
