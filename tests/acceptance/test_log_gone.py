"""The log is taken away under everybody: all halt, say why, and nothing begins anew by itself."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow_nodes.cli.errors import Exit
from tests.app import add, wait_for_file
from tests.cluster import Cluster, audit
from tests.eventually import eventually
from tests.servers import NatsServer

pytestmark = pytest.mark.timeout(120)

STREAM: Final = wire.stream("default")
Fault = Callable[[NatsServer, Path], Awaitable[None]]


async def deleted(server: NatsServer, folder: Path) -> None:
    async with Bus(server.url, name="vandal") as bus:
        await bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)


async def created_anew(server: NatsServer, folder: Path) -> None:
    await deleted(server, folder)
    async with Bus(server.url, name="vandal") as bus, JetStreamLog(bus, "default"):
        pass


async def purged(server: NatsServer, folder: Path) -> None:
    async with Bus(server.url, name="vandal") as bus:
        await bus.js_api(f"STREAM.PURGE.{STREAM}", b"", 5)


async def cut(server: NatsServer, folder: Path) -> None:
    """The disk as it was before: a backup brought back too eagerly, or a server that lost its end."""
    await server.kill()
    shutil.rmtree(folder / "data")
    shutil.copytree(folder / "before", folder / "data")
    await server.start()


FAULTS: Final[list[tuple[Fault, str]]] = [
    (deleted, f"there is no stream {STREAM}"),
    (created_anew, "was deleted and created again"),
    (purged, "purged"),
    (cut, "went back"),
]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server whose folder was copied before anything was in it but a log."""
    async with NatsServer(folder=tmp_path) as running:
        async with Bus(running.url, name="maker") as bus, JetStreamLog(bus, "default"):
            pass
        await running.stop()
        shutil.copytree(tmp_path / "data", tmp_path / "before")
        await running.start()
        yield running


@pytest.mark.parametrize(("fault", "found"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
async def test_nodes_and_clients_halt(
    server: NatsServer, fault: Fault, found: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with Cluster(server) as cluster:
        worker = await cluster.process("worker", "--app", "tests.app", "--drain-s", "0", "--name", "w")
        master = await cluster.process("master", "--name", "m")
        client = await cluster.client()
        assert await (await client.submit(add, 1, 2)).result(30) == 3
        waiting = await client.submit(wait_for_file, str(tmp_path / "never"))
        await fault(server, tmp_path)
        assert await master.ended() == Exit.LOG_GONE
        if fault is not purged:  # what it needs, from its own joining on, may be all there is
            assert await worker.ended() == Exit.LOG_GONE
        with pytest.raises(agentflow.LogGone):
            await waiting.outcome(30)
        said = capfd.readouterr().err
    assert found in said
    assert "restore it from a backup" in said


async def test_nobody_says_anything_in_the_log_that_took_the_place_of_theirs(
    server: NatsServer, tmp_path: Path
) -> None:
    async with Cluster(server) as cluster:
        master = await cluster.process("master", "--name", "m")
        worker = await cluster.process("worker", "--app", "tests.app", "--drain-s", "0", "--name", "w")
        client = await cluster.client()
        waiting = await client.submit(wait_for_file, str(tmp_path / "never"))
        await eventually(lambda: _started(client, waiting.id))
        await created_anew(server, tmp_path)
        assert await worker.ended() == Exit.LOG_GONE
        assert await master.ended() == Exit.LOG_GONE
        async with Bus(server.url, name="reader") as bus:
            assert await _subjects(bus) == []


async def _started(client: agentflow.Client, task: str) -> bool:
    return "task.started" in (await audit(client)).about(task)


async def _subjects(bus: Bus) -> list[str]:
    """Of everything in the log that is there now."""
    async with JetStreamLog(bus, "default", create=False) as log:
        found = [await log.read(seq + 1) for seq in range((await log.identity()).last_seq)]
    return [message.subject for message in found if message is not None]


async def test_up_ends_with_the_log_and_starts_nothing_again(tmp_path: Path) -> None:
    up = await _up(tmp_path)
    told = await _ready(up)
    async with Bus(told["url"], name="vandal") as bus:
        await bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
    _, error = await asyncio.wait_for(up.communicate(), 60)
    assert up.returncode == Exit.LOG_GONE
    assert f"there is no stream {STREAM}" in error.decode()
    again = await _up(tmp_path)
    _, error = await asyncio.wait_for(again.communicate(), 60)
    assert again.returncode == Exit.LOG_GONE
    assert "is not what it was" in error.decode()
    assert "Bring the folder back from a backup" in error.decode()
    (tmp_path / "logs.json").unlink()
    (tmp_path / "history").rename(tmp_path / "history-of-before")
    anew = await _up(tmp_path)
    await _ready(anew)
    anew.send_signal(signal.SIGTERM)
    await asyncio.wait_for(anew.communicate(), 60)
    assert anew.returncode == 0


async def _up(folder: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentflow_nodes", "up", "--data-dir", folder, "--port", "0", "--drain-s", "0", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )


async def _ready(up: asyncio.subprocess.Process) -> dict[str, Any]:
    assert up.stdout is not None
    told: dict[str, Any] = json.loads(await asyncio.wait_for(up.stdout.readline(), 60))
    assert told["ready"], told
    return told
