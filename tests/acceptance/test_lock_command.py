"""`agentflow lock` and `agentflow locks`: real processes, a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TypeVar

import pytest

import agentflow
from agentflow.events import LockAcquired, LockLost
from tests.cluster import Cluster
from tests.eventually import eventually

LOCK_STATUS = 7
TTL_S = 2

pytestmark = pytest.mark.timeout(60)

LockEvent = TypeVar("LockEvent", LockAcquired, LockLost)


class Command:
    """`agentflow ARGUMENTS…` as a process."""

    def __init__(self, url: str, *arguments: str) -> None:
        self._env = {**os.environ, "AGENTFLOW_NATS_URL": url}
        self._arguments = arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> Command:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agentflow_nodes", *self._arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )
        return self

    async def end(self) -> tuple[int, str, str]:
        """Status, what it printed, and what it complained about."""
        assert self.process is not None
        out, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), errors.decode()

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


async def run(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    return await (await Command(cluster.url, *arguments).start()).end()


async def holders(client: agentflow.Client, name: str) -> int:
    info = await client.lock_info(name)
    return 0 if info is None else len(info.holders)


async def test_the_command_finds_its_token_and_its_status_is_ours(cluster: Cluster) -> None:
    script = 'echo "$AGENTFLOW_LOCK $AGENTFLOW_LOCK_TOKEN"; exit 3'
    status, out, _ = await run(cluster, "lock", "a b", "--", "sh", "-c", script)
    assert status == 3
    name, _, token = out.strip().rpartition(" ")
    assert name == "a b"
    _, again, _ = await run(cluster, "lock", "a b", "--", "sh", "-c", script)
    assert int(again.strip().rpartition(" ")[2]) > int(token)


async def test_who_does_not_get_it_in_time_is_told_who_holds_it(cluster: Cluster, tmp_path: Path) -> None:
    client = await cluster.client()
    marker = tmp_path / "ran"
    async with client.lock("busy", metadata={"who": "test"}) as held:
        status, _, errors = await run(cluster, "lock", "busy", "--wait-s", "0.2", "--", "touch", str(marker))
        _, listed, _ = await run(cluster, "locks", "--json")
    assert status == LOCK_STATUS
    assert held.holder in errors
    assert not marker.exists()
    (shown,) = map(json.loads, listed.splitlines())
    assert shown["name"] == "busy"
    assert shown["holders"][0]["token"] == held.token
    assert shown["holders"][0]["metadata"] == {"who": "test"}


async def test_a_command_whose_lock_is_lost_is_killed_with_its_children(
    cluster: Cluster, tmp_path: Path
) -> None:
    """We are paused for longer than the time to live; somebody else takes the lock meanwhile."""
    client = await cluster.client()
    journal = tmp_path / "journal"
    script = f"while true; do echo tick >> {journal}; sleep 0.1; done & wait"
    holder = await Command(
        cluster.url, "lock", "lost", "--ttl-s", str(TTL_S), "--", "sh", "-c", script
    ).start()
    await eventually(journal.exists)
    holder.send(signal.SIGSTOP)
    held = await client.lock("lost").acquire(20.0)
    holder.send(signal.SIGCONT)
    status, _, errors = await asyncio.wait_for(holder.end(), 20.0)
    assert status == LOCK_STATUS
    assert "was lost" in errors
    size = journal.stat().st_size
    await asyncio.sleep(0.5)  # an orphan would have written five times
    assert journal.stat().st_size == size
    await held.release()


async def test_on_request_a_command_goes_on_without_its_lock(cluster: Cluster, tmp_path: Path) -> None:
    client = await cluster.client()
    started, go = tmp_path / "started", tmp_path / "go"
    script = f"touch {started}; while [ ! -e {go} ]; do sleep 0.05; done; exit 4"
    arguments = ("lock", "warned", "--ttl-s", str(TTL_S), "--on-lost", "warn", "--", "sh", "-c", script)
    holder = await Command(cluster.url, *arguments).start()
    await eventually(started.exists)
    holder.send(signal.SIGSTOP)
    held = await client.lock("warned").acquire(20.0)
    holder.send(signal.SIGCONT)
    await held.release()
    go.touch()
    status, _, errors = await asyncio.wait_for(holder.end(), 20.0)
    assert status == LOCK_STATUS
    assert "ran on (status 4)" in errors


async def test_a_signal_reaches_the_command_and_the_lock_is_released(
    cluster: Cluster, tmp_path: Path
) -> None:
    client = await cluster.client()
    script = f"trap 'exit 9' TERM; touch {tmp_path}/started; while true; do sleep 0.05; done"
    holder = await Command(cluster.url, "lock", "signalled", "--", "sh", "-c", script).start()
    await eventually((tmp_path / "started").exists)
    holder.send(signal.SIGTERM)
    status, _, _ = await asyncio.wait_for(holder.end(), 20.0)
    assert status == 9
    assert await holders(client, "signalled") == 0


async def test_history_says_who_held_what_when_with_which_token(cluster: Cluster) -> None:
    await cluster.leader()
    client = await cluster.client()
    async with client.lock("audited", holder="alice") as first:
        pass
    async with client.lock("audited", holder="bob", metadata={"ticket": "42"}) as second:
        pass
    status, out, _ = await run(cluster, "locks", "audited", "--history", "--json")
    assert status == 0
    said = [json.loads(line) for line in out.splitlines()]
    assert [(each["what"], each["holder"], each["token"]) for each in said] == [
        ("acquired", "alice", first.token),
        ("released", "alice", first.token),
        ("acquired", "bob", second.token),
        ("released", "bob", second.token),
    ]
    assert said[2]["detail"] == "ticket=42"
    assert said[3]["held_ms"] >= 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--on-lost", "explode", "--", "true"), "--on-lost: expected kill or warn"),
        (("--shared", "--permits", "2", "--", "true"), "expected one of them"),
        (("--metadata", "nothing", "--", "true"), "expected KEY=VALUE"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    cluster: Cluster, arguments: tuple[str, ...], expected: str
) -> None:
    status, _, errors = await run(cluster, "lock", "x", *arguments)
    assert status == 2
    assert expected in errors


async def test_the_log_learns_of_a_holder_that_died_unmissed(cluster: Cluster) -> None:
    """Nobody waits for the lock, so nobody takes it away: the leader notices that the ticket is gone."""
    await cluster.leader()
    holder = await Command(cluster.url, "lock", "orphan", "--ttl-s", "1", "--", "sleep", "60").start()
    client = await cluster.client()
    async with asyncio.timeout(50):
        await _first(client, LockAcquired)
        holder.send(signal.SIGKILL)
        await holder.end()  # once nobody holds its output any more: the command died with it
        event = await _first(client, LockLost)
    assert event.reason == "its holder fell silent"


async def _first(client: agentflow.Client, kind: type[LockEvent]) -> LockEvent:
    async for logged in client.events(after=0):
        if isinstance(logged.event, kind):
            return logged.event
    pytest.fail("the log ended")
