"""What a worker does with an assignment, told by a leader that this test plays itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.client.function import Function
from agentflow.events import TaskAssigned, TaskStarted
from agentflow.frames import Decision, encode
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Appended, Done, Frame
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker
from tests.eventually import eventually
from tests.servers import NatsServer

NAMESPACE = "default"
TURNS = 200


class Scene:
    """A worker with one function, which notes for whom it ran."""

    def __init__(self, worker: Worker, ran: list[str], log: JetStreamLog) -> None:
        self.worker = worker
        self.ran = ran
        self._log = log

    async def assign(self, task_id: str, *, incarnation: int = 0, suspect: bool = False) -> None:
        """Assign as a leader does; incarnation 0 is the worker's own."""
        assigned = TaskAssigned(
            id=task_id,
            attempt=1,
            incarnation=incarnation or self.worker._incarnation,
            function="noted",
            suspect=suspect,
        )
        subject = wire.event(NAMESPACE, TaskAssigned.kind, "w1")
        headers = {wire.DECISION: Decision(1, 0, 0, 1).header()}
        frame = Frame(subject, encode([assigned]), f"m1.{task_id}", headers)
        assert isinstance(await self._log.append(frame), Done)


@pytest.fixture
async def scene(nats_server: NatsServer, bus: Bus) -> AsyncIterator[Scene]:
    ran: list[str] = []

    async def noted() -> None:
        ran.append(agentflow.current().task_id)

    function: Function[..., Any] = agentflow.task(name="noted")(noted)
    config = WorkerConfig(url=nats_server.url, name="w1", slots=2, drain_s=0.5)
    async with JetStreamLog(bus, NAMESPACE) as log, Worker(config, {"noted": function}) as worker:
        yield Scene(worker, ran, log)


async def test_only_what_names_its_incarnation_runs(scene: Scene) -> None:
    await scene.assign("another-s", incarnation=scene.worker._incarnation + 1_000)
    await scene.assign("its-own")
    await eventually(lambda: scene.ran)
    assert scene.ran == ["its-own"]


async def test_a_suspect_runs_once_its_start_is_acknowledged(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()
    append = scene.worker._log.append

    async def held_up(frame: Frame, **options: Any) -> Appended:
        if TaskStarted.kind in frame.subject:
            asked.set()
            await answered.wait()
        return await append(frame, **options)

    monkeypatch.setattr(scene.worker._log, "append", held_up)
    await scene.assign("killer", suspect=True)
    await asked.wait()
    for _ in range(TURNS):
        await asyncio.sleep(0)
    assert scene.ran == [], "it runs, and nobody would know if it killed us now"
    answered.set()
    await eventually(lambda: scene.ran)
