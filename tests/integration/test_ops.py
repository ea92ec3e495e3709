"""The configurations in ops/: the server takes them, and they allow what is needed and no more."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import agentflow
from agentflow.bus import Bus
from agentflow.errors import AgentFlowError, Disconnected
from agentflow.events import TaskSubmitted
from agentflow.log.jetstream import JetStreamLog
from agentflow_nodes.archiver.node import ArchiverConfig, archiver_of
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.node import ProjectorNode
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from agentflow_projections.archiver import Keep
from tests.eventually import eventually
from tests.servers import NatsServer, nats_server_binary

OPS = Path(__file__).resolve().parents[2] / "ops"
SECRET = "correct-horse"  # noqa: S105 - of a server that lives as long as a test
PASSWORDS = {
    f"{role}_PASSWORD": SECRET
    for role in ("SYS", "MASTER", "PROJECTOR", "ARCHIVER", "WORKER", "CLIENT", "GUEST", "ROUTE")
}


def test_the_server_takes_the_configuration_of_a_cluster(tmp_path: Path) -> None:
    environment = {
        "SERVER_NAME": "n1",
        "NATS_HOST": "127.0.0.1",
        "ROUTE_2": "nats-route://127.0.0.2:6222",
        "ROUTE_3": "nats-route://127.0.0.3:6222",
        "STORE_DIR": str(tmp_path),
    }
    checked = subprocess.run(
        [nats_server_binary(), "-t", "-c", OPS / "nats-server.conf"],
        env=os.environ | environment | PASSWORDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
async def guarded_server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NatsServer]:
    """A server with the accounts of ops/accounts.conf."""
    for name, value in PASSWORDS.items():
        monkeypatch.setenv(name, value)
    async with NatsServer(extra=(OPS / "accounts.conf").read_text()) as server:
        yield server


def _url(server: NatsServer, user: str) -> str:
    return f"nats://{user}:{SECRET}@127.0.0.1:{server.port}"


async def test_a_task_runs_with_nobody_allowed_more_than_needed(guarded_server: NatsServer) -> None:
    large = "x" * 300_000
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        Worker(WorkerConfig(url=_url(guarded_server, "w1"), name="w1", slots=2), {}),
        agentflow.Client(_url(guarded_server, "web"), name="web") as client,
    ):
        handle = await client.submit_task(TaskSubmitted(shell="echo ran"))
        assert await handle.result(20) == "ran"
        cat = await client.argv(["cat"], env={"SMALL": "1"})
        await cat.cancel()
        assert (await cat.outcome(20)).state in {"completed", "cancelled"}
        ref = await client.objects.put(json.dumps(large).encode())
        assert await client.objects.get(ref) == json.dumps(large).encode()


async def _waits(client: agentflow.Client, name: str) -> bool:
    info = await client.lock_info(name)
    return info is not None and len(info.waiters) == 1


async def test_locks_are_held_with_nobody_allowed_more_than_needed(guarded_server: NatsServer) -> None:
    script = 'test "$AGENTFLOW_LOCK_TOKEN" -gt 0 && echo "$AGENTFLOW_LOCK"'
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        Worker(WorkerConfig(url=_url(guarded_server, "w1"), name="w1", slots=2), {}),
        agentflow.Client(_url(guarded_server, "web"), name="web") as client,
    ):
        await (await client.submit_task(TaskSubmitted(shell="true"))).result(20)  # a leader leads by now
        handle = await client.submit_task(TaskSubmitted(shell=script, lock="door"))
        async with client.lock("window", wait_s=10) as held:
            waiting = asyncio.create_task(client.lock("window").acquire(20))
            await eventually(lambda: _waits(client, "window"))
        assert (await waiting).token > held.token
        assert await handle.result(20) == "door"


async def test_history_is_asked_with_nobody_allowed_more_than_needed(
    guarded_server: NatsServer, tmp_path: Path
) -> None:
    config = ProjectorConfig(data=tmp_path, url=_url(guarded_server, "projector"))
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        agentflow.Client(_url(guarded_server, "web"), name="web") as client,
        ProjectorNode(config),
    ):
        handle = await client.submit_task(TaskSubmitted(shell="true"))
        position = (await client.log.identity()).last_seq
        request = {"sql": "SELECT id FROM tasks", "at_least": position}

        async def answer() -> bytes:
            try:
                reply = await client.bus.request_reply("afq.default.query", json.dumps(request).encode(), 20)
            except Disconnected:  # it does not listen yet
                return b""
            return reply.data

        assert json.loads(await eventually(answer))["rows"] == [[handle.id]]


async def test_a_log_is_archived_and_trimmed_with_nobody_allowed_more_than_needed(
    guarded_server: NatsServer, tmp_path: Path
) -> None:
    large = json.dumps("x" * 3_000)  # kept for who will run it, when its message is trimmed
    bus = Bus(_url(guarded_server, "archiver"), name="archiver")
    config = ArchiverConfig(where=tmp_path, url="", keep=Keep(age_s=0, young_s=0))
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        agentflow.Client(_url(guarded_server, "web"), name="web") as client,
        bus,
        JetStreamLog(bus, "default", create=False) as log,
    ):
        handle = await client.argv(["echo", large])
        for _ in range(2):  # the second removes what stood for the first
            until = (await log.identity()).last_seq
            async with archiver_of(config, bus, log) as archiver:
                await archiver.run(until=until)
            assert (await log.identity()).trimmed_seq == until
        async with Worker(WorkerConfig(url=_url(guarded_server, "w1"), name="w1", slots=2), {}):
            assert await handle.result(20) == large
    with pytest.raises(AgentFlowError):
        async with Bus(_url(guarded_server, "archiver"), name="archiver") as archiver_bus:
            await archiver_bus.request("af.default.task.submitted.archiver", b"{}", 1.0)


async def test_nobody_says_what_others_say(guarded_server: NatsServer) -> None:
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        Bus(_url(guarded_server, "web"), name="web") as web,
    ):
        for subject in ("af.default.task.completed.w1", "af.default.leader.elected.epoch"):
            with pytest.raises(AgentFlowError):
                await web.request(subject, b"{}", 1.0)


async def test_a_stranger_submits_from_an_account_of_their_own(guarded_server: NatsServer) -> None:
    async with (
        Master(MasterConfig(url=_url(guarded_server, "master"), name="m1")),
        Worker(WorkerConfig(url=_url(guarded_server, "w1"), name="w1", slots=2), {}),
        Bus(_url(guarded_server, "guest"), name="guest") as guest,
        agentflow.Client(_url(guarded_server, "web"), name="web") as client,
    ):
        answer = await guest.request("af.default.task.submitted.guest", b'{"shell":"echo hi"}', 5.0)
        position = json.loads(answer)["seq"]
        async with asyncio.timeout(20):
            assert await client.task(f"at-{position}-0").result() == "hi"
