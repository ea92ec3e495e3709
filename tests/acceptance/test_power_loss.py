"""The power fails: what was acknowledged is on the disk, or was never acknowledged.

The log lies on an ext4 image. In the midst of writing the server is held and the image copied:
the copy has what the file system has written out, and not what the kernel still had in memory.
That is what a machine finds when the power comes back. A kill of the server alone shows nothing
of this, since the kernel lives on and writes everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import LogGone
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame
from tests.app import add_in_thread
from tests.cluster import Cluster, audit
from tests.disks import cut_power, ext4, require_root
from tests.eventually import eventually
from tests.servers import NatsServer

pytestmark = pytest.mark.timeout(120)

SUBJECT: Final = wire.event("default", "task.submitted", "cli")
WRITERS: Final = 8
ENOUGH: Final = 400
"""Writes acknowledged before the power fails."""


class Disk:
    """The disk before the power fails, and after."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def before(self) -> Generator[Path]:
        with ext4(self._folder / "image", self._folder / "before") as mounted:
            yield mounted / "nats"

    @contextlib.contextmanager
    def after(self) -> Generator[Path]:
        with ext4(self._folder / "copy", self._folder / "after") as mounted:
            yield mounted / "nats"

    async def fail(self, server: NatsServer) -> None:
        """Cut the power: what the server does from here on never happened."""
        server.send(signal.SIGSTOP)
        await asyncio.to_thread(cut_power, self._folder / "image", self._folder / "copy")
        server.send(signal.SIGCONT)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    require_root()
    return Disk(tmp_path)


@asynccontextmanager
async def serving(folder: Path, sync: str = "always") -> AsyncGenerator[NatsServer]:
    folder.mkdir(exist_ok=True)
    async with NatsServer(folder=folder, sync=sync) as server:
        yield server


async def write(log: JetStreamLog, acknowledged: dict[int, str], writer: int) -> None:
    """Write one frame after the other, and note what is acknowledged."""
    for number in itertools.count():
        msg_id = f"{writer}.n.{number}"
        appended = await log.append(Frame(SUBJECT, b"[]", msg_id), timeout_s=20)
        if not isinstance(appended, Done):
            return
        acknowledged[appended.seq] = msg_id


async def lose_power_while_writing(disk: Disk, sync: str) -> dict[int, str]:
    """Write, and cut the power; what was acknowledged before, by sequence."""
    acknowledged: dict[int, str] = {}
    with disk.before() as folder:
        async with (
            serving(folder, sync) as server,
            Bus(server.url, name="writer") as bus,
            JetStreamLog(bus, "default") as log,
        ):
            writing = [asyncio.create_task(write(log, acknowledged, n)) for n in range(WRITERS)]
            await eventually(lambda: len(acknowledged) >= ENOUGH)
            promised = dict(acknowledged)
            await disk.fail(server)
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
    return promised


async def kept(disk: Disk, promised: dict[int, str]) -> set[int]:
    """The sequences of what is still there when the power is back."""
    with disk.after() as folder:
        async with serving(folder) as server, Bus(server.url, name="reader") as bus:
            with contextlib.suppress(LogGone):
                async with JetStreamLog(bus, "default", create=False) as log:
                    found = {seq: await log.read(seq) for seq in promised}
                    return {
                        seq
                        for seq, message in found.items()
                        if message and _is(message.headers, promised[seq])
                    }
    return set()


def _is(headers: dict[str, str] | None, msg_id: str) -> bool:
    return headers is not None and headers.get(wire.MSG_ID) == msg_id


async def test_what_was_acknowledged_is_there_after_the_power_failed(disk: Disk) -> None:
    promised = await lose_power_while_writing(disk, "always")
    assert len(promised) >= ENOUGH
    assert await kept(disk, promised) == set(promised)


async def test_without_fsync_it_would_be_lost(disk: Disk) -> None:
    """That this test can tell."""
    promised = await lose_power_while_writing(disk, "2m")
    assert await kept(disk, promised) < set(promised)


async def test_what_completed_stays_completed_and_the_rest_is_done(disk: Disk) -> None:
    with disk.before() as folder:
        async with serving(folder) as server, Cluster(server) as cluster:
            await cluster.leader()
            await cluster.worker(drain_s=0.0)
            client = await cluster.client()
            handles = await client.submit_many(add_in_thread, [(n, 1) for n in range(2_000)])
            await asyncio.wait_for(handles[200].outcome(), 30)
            completed = {handle.id for handle in handles if handle.done}
            await disk.fail(server)
    with disk.after() as folder:
        async with serving(folder) as server, Cluster(server) as cluster:
            await cluster.leader()
            await cluster.worker(name="after")
            client = await cluster.client()
            async with asyncio.timeout(60):
                for handle in handles:
                    assert (await client.task(handle.id).outcome()).state == "completed"
            found = await audit(client)
    again = {
        str(getattr(logged.event, "id", ""))
        for logged in found.of_kind("task.assigned")
        if logged.actor == "after"
    }
    assert completed
    assert not completed & again, "what was known to have completed ran again"
    assert [ended for ended in found.outcomes().values() if ended != ["task.completed"]] == []
