"""The disk, or the share of it that the log may take, is full: refused clearly, and nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
from pathlib import Path
from typing import Final

import pytest

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Appended, Done, Frame, Log, Reason, Refused, Unknown
from agentflow_nodes.embedded import EmbeddedServer
from tests.disks import require_root, small_disk

pytestmark = pytest.mark.timeout(120)

SUBJECT: Final = wire.event("default", "task.submitted", "cli")
MIB: Final = 1 << 20
DATA: Final = b"[" + b" " * 200_000 + b"]"


async def fill(log: Log) -> tuple[list[int], Appended]:
    """Write until it is refused: what was acknowledged, and the refusal."""
    acknowledged: list[int] = []
    for number in itertools.count():
        appended = await log.append(Frame(SUBJECT, DATA, f"fill.{number}"), timeout_s=2)
        if not isinstance(appended, Done):
            return acknowledged, appended
        acknowledged.append(appended.seq)
    raise AssertionError("no disk is endless")


async def all_there(log: JetStreamLog, acknowledged: list[int]) -> bool:
    found = [await log.read(seq) for seq in acknowledged]
    return all(message is not None and message.data == DATA for message in found)


async def test_the_share_of_the_log_is_full(tmp_path: Path) -> None:
    async with (
        EmbeddedServer(tmp_path, max_store_bytes=8 * MIB) as server,
        Bus(server.url, name="writer") as bus,
        JetStreamLog(bus, "default") as log,
    ):
        acknowledged, refused = await fill(log)
        assert isinstance(refused, Refused)
        assert refused.reason is Reason.FULL
        assert acknowledged
        assert await all_there(log, acknowledged)
    async with (
        EmbeddedServer(tmp_path, max_store_bytes=64 * MIB) as server,
        Bus(server.url, name="again") as bus,
        JetStreamLog(bus, "default") as log,
    ):
        assert await all_there(log, acknowledged)
        assert isinstance(await log.append(Frame(SUBJECT, DATA, "more.1")), Done)


async def test_the_disk_is_full(tmp_path: Path) -> None:
    """What others wrote there leaves no room; with room again, a new start of the server goes on."""
    require_root()
    with small_disk(tmp_path / "disk", 32) as folder:
        async with (
            EmbeddedServer(folder, max_store_bytes=64 * MIB) as server,
            Bus(server.url, name="writer") as bus,
            JetStreamLog(bus, "default") as log,
        ):
            filling = folder / "filling"
            filling.write_bytes(bytes(20 * MIB))
            acknowledged, refused = await fill(log)
            assert not isinstance(refused, Done)
            assert "disk is full" in refused.detail or "insufficient" in refused.detail
            assert acknowledged
            filling.unlink()
        async with (
            EmbeddedServer(folder, max_store_bytes=64 * MIB) as server,
            Bus(server.url, name="again") as bus,
            JetStreamLog(bus, "default") as log,
        ):
            assert await all_there(log, acknowledged)
            assert isinstance(await log.append(Frame(SUBJECT, DATA, "more.1")), Done)


@pytest.mark.parametrize("replicas", ["1", "3"])
async def test_up_says_so_and_goes_on_once_there_is_room(tmp_path: Path, replicas: str) -> None:
    require_root()
    with small_disk(tmp_path / "disk", 128) as disk:
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agentflow_nodes", "up", "--data-dir", disk / "data", "--port", "0"),
            *("--replicas", replicas, "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert up.stdout is not None
            told = json.loads(await up.stdout.readline())
            async with agentflow.Client(told["url"]) as client:
                before = await client.shell("echo before")
                assert await before.result(30) == "before"
                _fill(disk / "filling")
                await _says(up, "is full: nothing more is accepted, and nothing accepted is lost. Make room")
                _, refused = await fill(client.log)
                assert isinstance(refused, Refused | Unknown)
                waiting = asyncio.create_task(client.shell("echo after"))
                (disk / "filling").unlink()
                await _says(up, "has room again: starting NATS anew")
                assert await (await waiting).result(60) == "after"
        finally:
            if up.returncode is None:
                up.send_signal(signal.SIGTERM)
            await up.communicate()
        assert up.returncode == 0


def _fill(path: Path) -> None:
    """Leave no byte free."""
    with path.open("wb") as file:
        try:
            while file.write(bytes(MIB)):
                pass
        except OSError:
            return


async def _says(up: asyncio.subprocess.Process, words: str) -> None:
    """Wait until it says that to people."""
    assert up.stderr is not None
    async with asyncio.timeout(60):
        while line := await up.stderr.readline():
            if words in line.decode():
                return
    raise AssertionError(f"it ended without saying {words!r}")
