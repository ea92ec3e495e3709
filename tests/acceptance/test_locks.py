"""Locks among processes that are killed and paused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from agentflow import Client
from agentflow.events import LockAcquired, LockLost, LockReleased
from tests.eventually import eventually
from tests.servers import NatsServer

LOCK = "db-migrate"
TTL_S = 2


class Holder:
    """A process that works under the lock, and what it has told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def told(self, what: str) -> int:
        """Wait until it tells this; the token it names."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := (await self.process.stdout.readline()).decode():
                found, _, token = line.strip().partition(" ")
                if found == what:
                    return int(token)
        raise AssertionError(f"it ended without telling {what!r}")

    def send(self, sent: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.process.pid, sent)

    async def ended(self) -> int:
        """Wait for its end; its exit code."""
        await asyncio.wait_for(self.process.communicate(), 50)
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def holder(server: NatsServer, journal: Path, *, rounds: int = 0) -> AsyncGenerator[Holder, None]:
    """A process that takes the lock `rounds` times, or once and for as long as it lives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.acceptance.lock_holder", server.url, LOCK, str(TTL_S), str(journal), str(rounds)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Holder(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def history(client: Client) -> list[LockAcquired | LockReleased | LockLost]:
    """What the log says of the lock, in order."""
    until = (await client.log.identity()).last_seq
    return [
        logged.event
        async for logged in client.events(after=0, until=until)
        if isinstance(logged.event, LockAcquired | LockReleased | LockLost)
    ]


def tokens(journal: Path) -> list[int]:
    """What was written, in order."""
    return [int(line) for line in journal.read_text().splitlines()]


async def test_a_killed_holders_lock_goes_to_the_next_in_line(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with (
        Client(nats_server.url, name="next") as client,
        holder(nats_server, tmp_path / "journal") as killed,
    ):
        token = await killed.told("held")
        waiter = asyncio.create_task(client.lock(LOCK).acquire())
        await eventually(lambda: one_waits(client))
        killed.send(signal.SIGKILL)
        held = await waiter
        assert held.token > token
        said = [(type(event), event.token) for event in await history(client)]
        assert said == [(LockAcquired, token), (LockLost, token), (LockAcquired, held.token)]


async def test_a_paused_holder_wakes_up_and_knows(nats_server: NatsServer, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with (
        Client(nats_server.url, name="next") as client,
        holder(nats_server, journal) as paused,
    ):
        token = await paused.told("wrote")
        async with holder(nats_server, journal, rounds=1) as second:
            await eventually(lambda: one_waits(client))
            paused.send(signal.SIGSTOP)
            later = await second.told("wrote")
            assert later > token
            await second.told("released")
        paused.send(signal.SIGCONT)
        assert await paused.told("lost-refused") == token
        written = tokens(journal)
        assert written == sorted(written)
        assert set(written) == {token, later}


async def test_processes_that_die_on_the_way_leave_a_history_without_overlaps(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(nats_server.url, name="observer"))
        many = [await stack.enter_async_context(holder(nats_server, journal, rounds=8)) for _ in range(4)]
        for victim in many[:2]:
            await victim.told("held")
            victim.send(signal.SIGKILL)
        assert [await each.ended() for each in many] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
        written = tokens(journal)
        assert written == sorted(written), "the resource was never changed by an earlier holder"
        assert_no_overlap(await history(client))
        assert len(set(written)) >= 16


def assert_no_overlap(said: Sequence[LockAcquired | LockReleased | LockLost]) -> None:
    """A hold ends in the log before the next one begins, or its holder died while nobody waited."""
    holding: int | None = None
    released = {event.token for event in said if isinstance(event, LockReleased)}
    for event in said:
        if isinstance(event, LockAcquired):
            assert holding not in released, f"{event} while {holding} holds"
            holding = event.token
        elif event.token == holding:
            holding = None


async def one_waits(client: Client) -> bool:
    """Whether somebody waits for the lock."""
    info = await client.lock_info(LOCK)
    return info is not None and len(info.waiters) == 1
