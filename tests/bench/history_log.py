"""Logs for the history's bench, with what a client, a leader and workers write, to the byte.

The leader's decisions are those of `plan` on the fold of what came before, so a log can be
written at the speed of folding it, without a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from msgspec import Raw

from agentflow import wire
from agentflow.domain.plan import plan
from agentflow.domain.state import Namespace
from agentflow.events import (
    ROLES,
    Event,
    LeaderElected,
    Retry,
    Role,
    TaskAssigned,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
    WorkerJoined,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.frames import Decision, compose
from agentflow.log.port import Message

FRAME_EVENTS: Final = 100
FRAME_NS: Final = 2_000_000
"""Time from one frame to the next."""
WORKERS: Final = 4
_FAILS: Final = 97
"""In a mixed log one outcome of so many is a failure."""
_FLOWS: Final = 20
"""In a mixed log one frame of so many is a workflow."""
_KINDS: Final = ("exit", "timeout", "error")
_RETRY: Final = Retry(max_attempts=2, backoff_s=0.0)

Fold = Callable[[Message], object]


class Writer:
    """Writes one namespace's log, frame by frame. `fold` takes each message into `state`."""

    def __init__(self, state: Namespace, fold: Fold, *, begin_ns: int = 0, mixed: bool = False) -> None:
        """Time begins at `begin_ns` and moves on with each frame; 0: it is what the clock says."""
        self.state: Final = state
        self.tasks = 0
        self.events = 0
        self._fold = fold
        self._begin_ns = begin_ns
        self._mixed = mixed
        self._outcomes = 0
        self._frames = 0

    def begin(self) -> Iterator[Message]:
        """A leader and the workers."""
        yield from self._say("leader.elected", wire.ELECTED_ACTOR, [LeaderElected(epoch=1, master="m1")])
        for number in range(1, WORKERS + 1 if self._mixed else 2):
            joined = WorkerJoined(
                instance=f"i{number}", slots=8, ahead=500, functions=["bench.noop"], host=f"host{number}"
            )
            yield from self._say("worker.joined", f"w{number}", [joined])

    def work(self, tasks: int, *, leave: int = 0) -> Iterator[Message]:
        """So many tasks, submitted and worked off; the last `leave` of them only submitted."""
        while self.tasks < tasks - leave:
            yield from self._submit(min(FRAME_EVENTS, tasks - leave - self.tasks))
            yield from self._work_off()
        while self.tasks < tasks:
            yield from self._submit(min(FRAME_EVENTS, tasks - self.tasks))

    def _submit(self, count: int) -> Iterator[Message]:
        self._frames += 1
        if self._mixed and self._frames % _FLOWS == 0:
            yield from self._submit_flow(count)
            return
        retry = _RETRY if self._mixed else None
        said = [
            TaskSubmitted(
                id=self._id(number), function="bench.noop", args=[number], notify="4f1c", retry=retry
            )
            for number in range(self.tasks, self.tasks + count)
        ]
        self.tasks += count
        yield from self._say("task.submitted", "bench", said)

    def _submit_flow(self, count: int) -> Iterator[Message]:
        """One task, many that depend on it."""
        first = WorkflowTask(task_id="first", function="bench.noop")
        others = [
            WorkflowTask(task_id=f"s{number}", function="bench.noop", dependencies=["first"])
            for number in range(count - 1)
        ]
        flow = WorkflowSubmitted(id=self._id(self.tasks), name="fan", tasks=[first, *others], notify="4f1c")
        self.tasks += count
        yield from self._say("workflow.submitted", "bench", [flow])

    def _id(self, number: int) -> str:
        made = f"{self._now_ns() // 1_000_000:012x}"
        return f"{made[:8]}-{made[8:]}-7{number & 0xFFF:03x}-8{number >> 12 & 0xFFF:03x}-{number * 2654435761 & 0xFFFFFFFFFFFF:012x}"

    def _now_ns(self) -> int:
        return self._begin_ns + self.state.seq * FRAME_NS if self._begin_ns else time.time_ns()

    def _work_off(self) -> Iterator[Message]:
        """What the leader plans is done, until nothing is left to plan."""
        while True:
            state = self.state
            made = plan(state, self._now_ns() // 1_000_000)
            if not made.decisions:
                return
            decision = Decision(state.epoch, state.seq, state.clock_ms, state.policy.version).header()
            for (kind, actor), decided in made.decisions.items():
                yield from self._say(kind, actor, decided, {wire.DECISION: decision})
            for (kind, actor), decided in made.decisions.items():
                if kind == TaskAssigned.kind:
                    yield from self._run(actor, decided)

    def _run(self, worker: str, assigned: Sequence[Any]) -> Iterator[Message]:
        now_ms = self._now_ns() // 1_000_000
        completed: list[Event] = []
        failed: list[Event] = []
        for each in assigned:
            self._outcomes += 1
            known: dict[str, Any] = {
                "id": each.id,
                "attempt": each.attempt,
                "incarnation": each.incarnation,
                "started_at_ms": now_ms,
                "run_us": 3 + self._outcomes % 17,
            }
            if self._mixed and self._outcomes % _FAILS == 0:
                error = _KINDS[self._outcomes % len(_KINDS)]
                failed.append(TaskFailed(error=error, message="it did not go well", **known))
            else:
                completed.append(TaskCompleted(result=Raw(b"%d" % self._outcomes), **known))
        for kind, said in ((TaskCompleted.kind, completed), (TaskFailed.kind, failed)):
            for start in range(0, len(said), FRAME_EVENTS):
                yield from self._say(kind, worker, said[start : start + FRAME_EVENTS])

    def _say(
        self, kind: str, actor: str, said: Sequence[Event], headers: dict[str, str] | None = None
    ) -> Iterator[Message]:
        assert (ROLES[kind] is Role.LEADER and kind != "leader.elected") == (headers is not None)
        subject = wire.event(self.state.name, kind, actor)
        for start in range(0, len(said), FRAME_EVENTS):
            for data, length in compose(said[start : start + FRAME_EVENTS]):
                message = Message(self.state.seq + 1, self._now_ns(), subject, data, headers)
                self._fold(message)
                self.state.ended.clear()
                self.events += length
                yield message
