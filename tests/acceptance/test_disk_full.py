"""The disk, or the share of it that the log may take, is full: refused clearly, and nothing is lost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Appended, Done, Frame, Reason, Refused
from agentflow_nodes.embedded import EmbeddedServer
from tests.disks import require_root, small_disk

pytestmark = pytest.mark.timeout(120)

SUBJECT: Final = wire.event("default", "task.submitted", "cli")
MIB: Final = 1 << 20
DATA: Final = b"[" + b" " * 200_000 + b"]"


async def fill(log: JetStreamLog) -> tuple[list[int], Appended]:
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
