"""Three or five nats-servers of our own in one cluster on this machine.

Each has a folder, a port and a watcher of its own, so that a stream of three replicas goes on
while one of them is dead. It protects from the death of a server, not from that of the disk or
of the machine they share.

Replicas know each other by their servers' names, which are therefore chosen once and kept in
the folder (`cluster.json`); the secret of the routes and their ports are new at each start.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from msgspec import Struct

from agentflow.bus import Bus
from agentflow.ending import end_tasks
from agentflow.errors import Disconnected, OperatingError
from agentflow.logs import get_logger
from agentflow_nodes.embedded.address import free_ports
from agentflow_nodes.embedded.folder import used_bytes, writing
from agentflow_nodes.embedded.server import EmbeddedServer, Peer, Sync

SIZES: Final = (1, 3, 5)
"""How many replicas a log may have: an even number survives no more deaths than one less."""

_FILE: Final = "cluster.json"
_SPARED_SHARE: Final = 0.1
# A first election among raft servers takes 4 to 9 s in the worst case, and may be undecided once.
_READY_S_MAX: Final = 40.0
_ASK_S: Final = 1.0
_ASK_PAUSE_S: Final = 0.05

_log = get_logger(__name__)


class _Kept(Struct, frozen=True):
    """What stays the same over restarts."""

    cluster: str
    servers: tuple[str, ...]


class EmbeddedCluster:
    """Several nats-servers with JetStream below `data_dir`. An async context manager.

    Entered means that all run and have elected who leads them. Port 0 is one that is free for
    each; otherwise the servers take `port` and those after it. Entering raises OperatingError
    as `EmbeddedServer` does, and if the folder holds another number of servers.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        replicas: int = 3,
        port: int = 0,
        sync: Sync = "always",
        tell: Callable[[str], object] | None = None,
    ) -> None:
        assert replicas in SIZES[1:], f"3 or 5 servers, not {replicas}"
        self.data_dir: Final = data_dir.absolute()
        self.gone: Final = asyncio.Event()
        """Set when so many died for good that the rest cannot write."""
        self.servers: list[EmbeddedServer] = []
        self._replicas = replicas
        self._port = port
        self._sync: Sync = sync
        self._tell = tell
        self._watcher: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        check_replicas(self.data_dir, self._replicas)
        kept = _keep(self.data_dir, self._replicas)
        self.servers = self._made(kept)
        async with AsyncExitStack() as stack:
            started = await asyncio.gather(*map(_entered, self.servers), return_exceptions=True)
            for server in self.servers:
                stack.push_async_exit(server)
            for error in started:
                if error is not None:
                    raise error
            await self._wait_elected()
            self._stack = stack.pop_all()
        self._watcher = asyncio.create_task(self._watch(), name="embedded cluster")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            await end_tasks(watcher)
        # At once: one by one, those that are left would elect again and again.
        await asyncio.gather(*(server.__aexit__(None, None, None) for server in self.servers))
        await self._stack.aclose()

    async def renew(self) -> None:
        """End the servers, to be started again: after their disk was full they go on refusing."""
        await asyncio.gather(*(server.renew() for server in self.servers))

    @property
    def urls(self) -> list[str]:
        """Where clients on this machine connect."""
        return [server.url for server in self.servers]

    @property
    def url(self) -> str:
        """The same as one text."""
        return ",".join(self.urls)

    @property
    def max_store_bytes(self) -> int:
        """Bytes a log of as many replicas as there are servers may take."""
        return min(server.max_store_bytes for server in self.servers)

    @property
    def log_file(self) -> Path:
        """The log of the server that ended last, or of the first."""
        gone = [server for server in self.servers if server.gone.is_set()]
        return (gone or self.servers)[-1].log_file

    def _made(self, kept: _Kept) -> list[EmbeddedServer]:
        routes = free_ports(self._replicas)
        secret = secrets.token_urlsafe(24)
        with writing(self.data_dir):
            free = shutil.disk_usage(self.data_dir).free * (1 - _SPARED_SHARE)
        servers = []
        for number, name in enumerate(kept.servers):
            folder = self.data_dir / f"n{number + 1}"
            peer = Peer(
                name=name,
                cluster=kept.cluster,
                port=routes[number],
                others=tuple(port for port in routes if port != routes[number]),
                secret=secret,
            )
            port = self._port + number if self._port else 0
            room = used_bytes(folder) + int(free / self._replicas)
            servers.append(
                EmbeddedServer(
                    folder, port=port, sync=self._sync, max_store_bytes=room, peer=peer, tell=self._tell
                )
            )
        return servers

    async def _wait_elected(self) -> None:
        """Until the servers know each other and one of them leads."""
        deadline = asyncio.get_running_loop().time() + _READY_S_MAX
        said = "no answer"
        async with Bus(self.urls, name="embedded cluster") as bus:
            while asyncio.get_running_loop().time() < deadline:
                try:
                    answer = msgspec.json.decode(await bus.js_api("INFO", b"", _ASK_S), type=dict[str, Any])
                except (Disconnected, msgspec.DecodeError) as error:
                    said = str(error)
                else:
                    if "error" not in answer:
                        return
                    said = str(answer["error"].get("description"))
                await asyncio.sleep(_ASK_PAUSE_S)
        raise OperatingError(
            f"{self._replicas} nats-servers run and do not find a leader within {_READY_S_MAX:g} s: {said};"
            f" see {self.log_file}"
        )

    async def _watch(self) -> None:
        """Tell when too few servers are left."""
        ends = [asyncio.create_task(server.gone.wait()) for server in self.servers]
        spare = (self._replicas - 1) // 2
        try:
            while sum(server.gone.is_set() for server in self.servers) <= spare:
                await asyncio.wait(
                    [end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            await end_tasks(*ends)
        self.gone.set()


def replicas_of(data_dir: Path) -> int | None:
    """How many servers' data a folder holds; None if it holds none. Raises OperatingError."""
    kept = _read(data_dir)
    if kept is not None:
        return len(kept.servers)
    if (data_dir / "n1" / "jetstream").exists():
        raise OperatingError(
            f"{data_dir} holds the data of several servers, and not {_FILE}, which says their names: bring that"
            " file back, or choose another folder"
        )
    return 1 if (data_dir / "jetstream").exists() else None


def check_replicas(data_dir: Path, replicas: int) -> None:
    """Raise OperatingError if the folder holds the data of another number of servers."""
    found = replicas_of(data_dir)
    if found is not None and found != replicas:
        raise OperatingError(
            f"{data_dir} holds the data of {found} server{'' if found == 1 else 's'}, {replicas} asked for:"
            f" start with --replicas {found}, or choose another folder with --data-dir"
        )


def _read(data_dir: Path) -> _Kept | None:
    try:
        return msgspec.json.decode((data_dir / _FILE).read_bytes(), type=_Kept)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OperatingError(f"cannot read {data_dir / _FILE}: {error}") from error
    except msgspec.DecodeError as error:
        raise OperatingError(f"{data_dir / _FILE} does not say which servers there are: {error}") from error


def _keep(data_dir: Path, replicas: int) -> _Kept:
    """The names kept in the folder, chosen now if there are none."""
    kept = _read(data_dir)
    if kept is not None:
        return kept
    names = tuple(f"n{number + 1}-{secrets.token_hex(8)}" for number in range(replicas))
    kept = _Kept(f"embedded-{secrets.token_hex(8)}", names)
    fresh = data_dir / f"{_FILE}.new"
    with writing(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(kept)))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(data_dir / _FILE)
    return kept


async def _entered(server: EmbeddedServer) -> None:
    await server.__aenter__()
