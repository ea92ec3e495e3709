"""The processes of one peer's run: a broker on a free port, and its workers.

Each is a context manager: entered means started, left means ended, by process id, together
with every child it had. A broker keeps its data in a temporary folder that goes with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from tests.bench.peers.tally import FOLDER_VARIABLE
from tests.servers import free_port, nats_server_binary

Process = subprocess.Popen[bytes]

BROKER_VARIABLE: Final = "PEER_BROKER_URL"
"""Where the worker processes find their broker."""

_REPOSITORY: Final = Path(__file__).parents[3]
_START_TIMEOUT_S: Final = 15.0
_STOP_TIMEOUT_S: Final = 20.0
_LOG_TAIL_BYTES: Final = 4000


@contextlib.contextmanager
def redis_server(*, fsync: bool = False) -> Iterator[str]:
    """A Redis that writes nothing to disk, or with `fsync` each write before its answer; yields its URL.

    Without, neither snapshots nor an append-only file: the fastest Redis can be, and no durability
    at all. A production queue would rather run with `appendfsync everysec`.
    """
    port = free_port()
    durability = ("--appendonly", "yes", "--appendfsync", "always") if fsync else ("--appendonly", "no")
    with tempfile.TemporaryDirectory(prefix="peer-redis-") as folder:
        options = ("--save", "", *durability, "--dir", folder)
        argv = ("redis-server", "--port", str(port), "--bind", "127.0.0.1", *options)
        with running(argv) as server:
            _wait_until_listening(port, server)
            yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def nats_server(*, fsync: bool = False) -> Iterator[str]:
    """A nats-server with JetStream, yields its URL.

    As it comes it syncs every two minutes; with `fsync` before each acknowledgement.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="peer-nats-") as folder:
        config = Path(folder) / "server.conf"
        sync = ", sync_interval: always" if fsync else ""
        config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder}/data"{sync} }}\n')
        with running((nats_server_binary(), "-c", str(config))) as server:
            _wait_until_listening(port, server)
            yield f"nats://127.0.0.1:{port}"


@contextlib.contextmanager
def worker(module: str, *arguments: str, broker_url: str, tally: str = "") -> Iterator[Process]:
    """`python -m module arguments…` with what a peer's worker reads from its environment."""
    env = {BROKER_VARIABLE: broker_url, FOLDER_VARIABLE: tally}
    with running((sys.executable, "-m", module, *arguments), env=env) as process:
        yield process


@contextlib.contextmanager
def running(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A process for the time of the block; what it said last is shown if the block fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            argv, cwd=_REPOSITORY, env={**os.environ, **(env or {})}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process
        except Exception:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
            sys.stderr.write(f"--- end of the output of {argv}\n{log.read().decode(errors='replace')}---\n")
            raise
        finally:
            end(process)


def end(process: Process, timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """Ask a process to end, then make sure that it and all it started have."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _wait_until_listening(port: int, server: Process) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            message = f"{server.args!r} ended with {server.returncode} before it listened on port {port}"
            raise RuntimeError(message)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    message = f"{server.args!r} did not listen on port {port} within {_START_TIMEOUT_S} s"
    raise TimeoutError(message)
