"""Everything on one machine: a NATS server, a master that keeps the history, workers, an archiver, supervised.

All but the server are child processes of ours. A child that dies is started again after a
growing pause. Leaving ends them in order: workers finish what they run, then the master, then
the archiver, which so has the last words, then the server. Their logs are in the data folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import psutil
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.ending import end_process, end_tasks
from agentflow.errors import Disconnected, OperatingError
from agentflow.frames import encode
from agentflow.notices import StatusRequest
from agentflow_nodes.cli.errors import CliError, Exit, operating
from agentflow_nodes.cli.kept import check_log, keep_log
from agentflow_nodes.embedded import EmbeddedCluster, EmbeddedServer, disk_full, disk_roomy, replicas_of
from agentflow_nodes.embedded.replicated import check_replicas

READY_S_MAX: Final = 60.0
_PAUSE_S_FIRST: Final = 0.5
_PAUSE_S_MAX: Final = 30.0
_STABLE_S: Final = 60.0
"""A child that lived so long starts with the first pause again."""
_KILL_AFTER_S: Final = 10.0
"""Beyond the time to drain: then a child is killed."""
_ASK_S: Final = 0.5
_ASK_PAUSE_S: Final = 0.02
_LOG_BYTES_MAX: Final = 8 << 20
_TAIL_BYTES: Final = 8 << 10
_MB: Final = 1 << 20

Tell = Callable[[str], None]


class ArchiveConfig(Struct, frozen=True, kw_only=True):
    """What the archiver is told, in the words of its options."""

    where: str
    keep_age: str = ""
    keep_bytes: str = ""
    seal_after: str = ""

    def options(self) -> list[str]:
        """As arguments of `agentflow archive`."""
        given = {
            "--dir": self.where,
            "--keep-age": self.keep_age,
            "--keep-bytes": self.keep_bytes,
            "--seal-after": self.seal_after,
        }
        return [word for option, text in given.items() if text for word in (option, text)]


class ClusterConfig(Struct, frozen=True, kw_only=True):
    """What to start."""

    data_dir: Path
    port: int = 0
    """Of the (first) NATS server; 0: any that is free."""
    replicas: int | None = None
    """NATS servers; None: as many as the folder holds, one in a new one."""
    namespace: str = "default"
    workers: int = 1
    slots: int = 4
    apps: tuple[str, ...] = ()
    drain_s: float = 30.0
    projector: bool = True
    """Whether the history is kept in a DuckDB file."""
    archive: ArchiveConfig | None = None
    """Whether and where the log is archived."""


class Cluster:
    """A running cluster. An async context manager: entered means that it takes and runs tasks.

    Entering raises CliError if a child cannot start, and what the server raises.
    """

    def __init__(self, config: ClusterConfig, tell: Tell) -> None:
        self.config: Final = config
        self.urls: list[str] = []
        self._tell = tell
        self._server: EmbeddedServer | EmbeddedCluster | None = None
        self._halt: CliError | None = None
        self._halted = asyncio.Event()
        self._workers: list[Child] = []
        self._master: Child | None = None
        self._followers: list[Child] = []
        """Those that follow the log for themselves: nobody waits for them."""
        self._keepers: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._server = self._make_server()
            await stack.enter_async_context(self._server)
            self.urls = self._server.urls
            await check_log(self.config.data_dir, self.urls, self.config.namespace)
            stack.push_async_callback(self._stop)
            self._make_children()
            try:
                async with asyncio.timeout(READY_S_MAX):
                    await asyncio.gather(*(child.start() for child in self._needed()))
                    await self._wait_leader()
            except TimeoutError as error:
                raise operating(
                    f"not ready within {READY_S_MAX:g} s; see the logs in {self.log_dir}"
                ) from error
            await keep_log(self.config.data_dir, self.urls, self.config.namespace)
            self._keepers = [asyncio.create_task(self._keep(child)) for child in self._needed()]
            for child in self._followers:
                self._keepers.append(asyncio.create_task(self._begin_and_keep(child)))
            self._keepers.append(asyncio.create_task(self._watch_disk(), name="disk"))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """Where its servers are, as one text."""
        return ",".join(self.urls)

    async def gone_or(self, asked: asyncio.Event) -> None:
        """Wait until somebody asks to stop.

        Raises CliError if the server ended for good before, or the log is no longer what it was.
        """
        assert self._server is not None
        waits = [asyncio.ensure_future(event.wait()) for event in (asked, self._server.gone, self._halted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._halt is not None:
            raise self._halt
        if self._server.gone.is_set() and not asked.is_set():
            one = "the NATS server ended and does not start again"
            several = "too few NATS servers are left: the others do not start again"
            raise operating(f"{one if len(self.urls) == 1 else several}; see {self._server.log_file}")

    @property
    def log_dir(self) -> Path:
        """Where the children's logs are."""
        return self.config.data_dir / "log"

    def kill(self) -> None:
        """End all children at once."""
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        return self._needed() + self._followers

    def _needed(self) -> list[Child]:
        """Those without which no task runs."""
        return ([self._master] if self._master is not None else []) + self._workers

    def _make_server(self) -> EmbeddedServer | EmbeddedCluster:
        folder, port = self.config.data_dir, self.config.port
        replicas = self.config.replicas or replicas_of(folder) or 1
        check_replicas(folder, replicas)
        if replicas == 1:
            return EmbeddedServer(folder, port=port, tell=self._tell)
        return EmbeddedCluster(folder, replicas=replicas, port=port, tell=self._tell)

    def _make_children(self) -> None:
        config = self.config
        self.log_dir.mkdir(parents=True, exist_ok=True)
        assert self._server is not None
        reached = ["--nats", self.url, "--namespace", config.namespace, "--supervised"]
        common = [*reached, "--replicas", str(len(self.urls))]
        archive = config.archive
        leading = ["master", "--name", "master", "--log-bytes-max", str(self._server.max_store_bytes)]
        self._master = self._child("master", [*leading, *self._history(), *common])
        if archive is not None:
            self._followers.append(self._child("archiver", ["archive", *archive.options(), *reached]))
        cores, memory_mb = os.cpu_count() or 1, psutil.virtual_memory().total // _MB
        for number in range(1, config.workers + 1):
            name = f"worker-{number}"
            arguments = [
                "worker",
                "--name",
                name,
                *common,
                "--slots",
                str(config.slots),
                "--drain-s",
                str(config.drain_s),
            ]
            arguments += [
                "--cpu",
                str(cores / config.workers),
                "--memory-mb",
                str(memory_mb // config.workers),
            ]
            if config.projector:
                arguments += ["--data", str(config.data_dir / "history")]
            arguments += [word for app in config.apps for word in ("--app", app)]
            self._workers.append(self._child(name, arguments))

    def _history(self) -> list[str]:
        """What the master is told: it keeps the history, or begins with what is left of one."""
        folder, archive = str(self.config.data_dir / "history"), self.config.archive
        if not self.config.projector:
            return ["--data", folder]
        return ["--history", folder, *(["--archive", archive.where] if archive is not None else [])]

    def _child(self, name: str, arguments: Sequence[str]) -> Child:
        argv = [sys.executable, "-m", "agentflow_nodes", *arguments]
        return Child(name, argv, self.log_dir / f"{name}.log")

    async def _wait_leader(self) -> None:
        """Until a leader answers: from here on what is submitted runs at once."""
        subject = wire.service(self.config.namespace, "status")
        async with Bus(self.urls, name="agentflow up") as bus:
            while True:
                try:
                    await bus.request(subject, encode(StatusRequest([])), _ASK_S)
                except Disconnected:
                    await asyncio.sleep(_ASK_PAUSE_S)
                else:
                    return

    async def _begin_and_keep(self, child: Child) -> None:
        """Start a child nobody waits for, and keep it."""
        with contextlib.suppress(CliError):  # it ended, and its status says why
            await child.start()
        await self._keep(child)

    async def _keep(self, child: Child) -> None:
        """Start a child again whenever it ends, unless the log is gone: then none can go on."""
        pause_s = _PAUSE_S_FIRST
        while True:
            begun = time.monotonic()
            status = await child.wait()
            if status == Exit.LOG_GONE:
                self._halt_because_of(child)
                return
            if status == Exit.OK:  # only a worker that was drained ends by itself in good order
                self._tell(f"{child.name} was drained: it is not started again")
                return
            if time.monotonic() - begun > _STABLE_S:
                pause_s = _PAUSE_S_FIRST
            self._tell(f"{child.name} ended ({_described(status)}): starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)
            try:
                await child.start()
                self._tell(f"{child.name} is back")
            except CliError as error:
                if error.code is Exit.LOG_GONE:
                    self._halt_because_of(child)
                    return

    async def _watch_disk(self) -> None:
        """Say that the disk is full; once there is room let the servers start anew, or they go on refusing."""
        assert self._server is not None
        folder = self.config.data_dir
        while True:
            await disk_full(folder)
            self._tell(
                f"The disk of {folder} is full: nothing more is accepted, and nothing accepted is lost."
                " Make room there, and work goes on."
            )
            await disk_roomy(folder)
            self._tell(f"The disk of {folder} has room again: starting NATS anew")
            await self._server.renew()

    def _halt_because_of(self, child: Child) -> None:
        self._halt = CliError(f"{child.name} halted: {child.last_words()}", Exit.LOG_GONE)
        self._halted.set()

    async def _stop(self) -> None:
        await end_tasks(*self._keepers)
        patience_s = self.config.drain_s + _KILL_AFTER_S
        await asyncio.gather(*(worker.stop(patience_s) for worker in self._workers))
        if self._master is not None:
            await self._master.stop(_KILL_AFTER_S)
        await asyncio.gather(*(child.stop(_KILL_AFTER_S) for child in self._followers))
        assert self._server is not None
        if self._halt is None and self._keepers and not self._server.gone.is_set():
            with contextlib.suppress(OperatingError, CliError):
                await keep_log(self.config.data_dir, self.urls, self.config.namespace)


class Child:
    """A node as a child process."""

    def __init__(self, name: str, argv: Sequence[str], log_path: Path) -> None:
        self.name: Final = name
        self.log_path: Final = log_path
        self._argv = argv
        self._process: Process | None = None

    async def start(self) -> None:
        """Start it and wait until it is ready. Raises CliError if it ends before."""
        with _open_log(self.log_path) as log:
            # A session of its own: Ctrl-C is for the supervisor, which then ends its children in order.
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=PIPE, stdout=PIPE, stderr=log, start_new_session=True
            )
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            status = await self._process.wait()
            raise CliError(f"{self.name} could not start: {self.last_words()}", _exit_of(status))

    async def wait(self) -> int:
        """Wait until it has ended; its status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, patience_s: float) -> None:
        """Ask it to end, wait, and kill it if that takes too long."""
        if self._process is not None:
            await end_process(self._process, patience_s)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"it said nothing; see {self.log_path}"


def _open_log(path: Path) -> BinaryIO:
    """A log to append to; one that has become large is set aside first."""
    if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
        path.replace(path.with_suffix(".old.log"))
    return path.open("ab")


def _described(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _exit_of(status: int) -> Exit:
    return Exit(status) if status in (Exit.USAGE, Exit.NOT_FOUND, Exit.LOG_GONE) else Exit.OPERATING
