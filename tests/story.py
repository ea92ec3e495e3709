"""Logs told event by event, and the history that follows them."""

from __future__ import annotations

from agentflow import wire
from agentflow.events import (
    Event,
    LeaderElected,
    TaskAssigned,
    WorkerJoined,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.frames import Decision, encode
from agentflow.log.port import Message
from agentflow_projections.history import History, Keep
from agentflow_projections.history_rows import TaskRow

BEGIN_NS = 1_700_000_000_000_000_000
STEP_NS = 100_000_000
"""Messages of these logs are 100 ms apart."""


class Story:
    """A log under way, and its history."""

    def __init__(self, *, keep: Keep | None = None) -> None:
        self.history = History("default", keep=keep)
        self.seq = 0
        self.say("m1", LeaderElected(epoch=1, master="m1"))

    def say(self, actor: str, *events: Event) -> int:
        kind = events[0].kind
        actor = wire.ELECTED_ACTOR if kind == LeaderElected.kind else actor
        return self.publish(wire.event("default", kind, actor), encode(events))

    def publish(self, subject: str, data: bytes) -> int:
        self.seq += 1
        headers = {wire.DECISION: Decision(1, self.seq - 1, 0, 1).header()}
        self.history.apply(Message(self.seq, BEGIN_NS + self.seq * STEP_NS, subject, data, headers))
        return self.seq

    def join(self, name: str = "w1", slots: int = 2) -> int:
        return self.say(name, WorkerJoined(instance="x", slots=slots))

    def assign(self, incarnation: int, *ids: str, attempt: int = 1, worker: str = "w1") -> None:
        events = [TaskAssigned(id=each, attempt=attempt, incarnation=incarnation) for each in ids]
        self.say(worker, *events)

    def task(self, task_id: str) -> TaskRow:
        return self.history.tasks[task_id]

    def states(self) -> dict[str, str]:
        return {row.task_id: str(row.state) for row in self.history.tasks.values()}


def chain(workflow: str = "flow") -> WorkflowSubmitted:
    tasks = [
        WorkflowTask(task_id="a", shell="make", title="Make it"),
        WorkflowTask(task_id="b", shell="test", dependencies=["a"]),
        WorkflowTask(task_id="c", shell="ship", dependencies=["b"]),
        WorkflowTask(task_id="d", shell="else"),
    ]
    return WorkflowSubmitted(id=workflow, name="Release", tasks=tasks)
