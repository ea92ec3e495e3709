"""The story of one task: what happened to it, and why, told by the fold as it reads the log.

Every sentence is about one event that the fold counted, or did not count, and says what the
fold made of it; nothing is decided here.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from agentflow import ids
from agentflow.checks import Bad
from agentflow.domain.explain import Placement
from agentflow.domain.fold import fold
from agentflow.domain.life import State
from agentflow.domain.plan import Silence
from agentflow.domain.state import APPLIED, At, Kind, Namespace, Task, Verdict
from agentflow.domain.steps import node_of
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskQuarantined,
    TaskReprioritized,
    TaskRetried,
    TaskStarted,
    TaskStop,
    TaskSubmitted,
    TaskTimedOut,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowCancelRequested,
    WorkflowSubmitted,
)
from agentflow.frames import Decision, Judged

_MESSAGE_MAX: Final = 200


class Moment(Struct, kw_only=True):
    """Something that happened to the task."""

    seq: int
    index: int
    time_ms: int
    """Log time."""
    kind: str
    actor: str
    state: str
    """The task's state from here on; empty: it is none."""
    text: str
    attempt: int = 0
    verdict: str = str(Kind.APPLIED)
    decision: Decision | None = None
    """What the leader knew, if it was the leader's decision."""
    silences: list[Silence] = []
    """Workers given up by the same plan."""
    placement: Placement | None = None
    """Why the attempt went where it went."""


class Story:
    """Folds a log, and tells what happened to one task in it."""

    def __init__(self, state: Namespace, wanted: str) -> None:
        self.state: Final = state
        self.wanted: Final = wanted
        self.moments: Final[list[Moment]] = []
        self.task: Task | None = state.tasks.get(wanted)
        """The task once it is known, also after its end."""
        self._workflow = ids.workflow_of(wanted)
        self._decision: Decision | None = None
        self._silences: list[Silence] = []
        self._priority = self.task.priority if self.task is not None else 0
        self._cancel = self.task.cancel if self.task is not None else None
        self._steps: list[tuple[Task, State]] = []
        state.steps = self._steps

    def apply(self, seq: int, time_ns: int, judged: Judged) -> list[Verdict]:
        """Fold one message."""
        if judged.decision != self._decision:
            self._decision = judged.decision
            self._silences = []
        verdicts = fold(self.state, seq, time_ns, judged, self._observe)
        self.state.ended.clear()
        return verdicts

    def _observe(self, at: At, event: Event | Bad, verdict: Verdict) -> None:
        stepped = self._take_steps()
        if type(event) is WorkerLost and verdict is APPLIED:
            self._silences.append(Silence(event.worker, event.incarnation, event.reason))
        if not stepped and not self._is_about(event, at):
            return
        if verdict.kind is not Kind.APPLIED:
            self._tell(at, event, self._not_applied(event, at, verdict), str(verdict.kind))
            return
        text = _text(self, event, at)
        if text:
            self._tell(at, event, text)
        if self.task is not None:
            self._priority, self._cancel = self.task.priority, self.task.cancel

    def _take_steps(self) -> bool:
        """Whether the task took a step because of the event."""
        wanted = self.wanted
        found = next((task for task, _ in self._steps if task.id == wanted), None)
        self._steps.clear()
        if found is None:
            return False
        self.task = found
        return True

    def _is_about(self, event: Event | Bad, at: At) -> bool:
        if isinstance(event, TaskSubmitted | WorkflowSubmitted) and not event.id:
            return self.wanted == ids.derived(at.seq, at.index)
        named = getattr(event, "id", "")
        if named == self.wanted:
            return True
        return isinstance(event, WorkflowCancelRequested | WorkflowSubmitted) and named == self._workflow

    def _not_applied(self, event: Event | Bad, at: At, verdict: Verdict) -> str:
        what = f"{event.kind} of {at.actor}" if not isinstance(event, Bad) else f"an event of {at.actor}"
        match verdict.kind:
            case Kind.SUPERSEDED:
                return f"{what} came too late to count"
            case Kind.DUPLICATE:
                return f"{what} said what was known: nothing changed"
            case kind:
                return f"{what} was {kind}: {verdict.reason}: {verdict.detail}"

    def _tell(self, at: At, event: Event | Bad, text: str, verdict: str = str(Kind.APPLIED)) -> None:
        task = self.task
        moment = Moment(
            seq=at.seq,
            index=at.index,
            time_ms=self.state.clock_ms,
            kind="" if isinstance(event, Bad) else event.kind,
            actor=at.actor,
            state=str(task.state) if task is not None else "",
            text=text,
            attempt=task.attempt if task is not None else 0,
            verdict=verdict,
            decision=self._decision,
        )
        if isinstance(event, TaskAssigned):
            moment.silences = list(self._silences)
        self.moments.append(moment)

    @property
    def priority_before(self) -> int:
        """Its priority before the event that is being told."""
        return self._priority

    @property
    def cancel_before(self) -> str | None:
        """Whether it was to be cancelled before the event that is being told."""
        return self._cancel


def _text(story: Story, event: Any, at: At) -> str:
    """What an event that counted did to the task; empty: nothing worth a word."""
    task = story.task
    if task is None:
        return ""
    if isinstance(event, TaskCompleted | TaskFailed | TaskCancelled | TaskQuarantined | TaskTimedOut):
        return _end(task, event, at, story.state) if event.id == task.id else _followed(task, event)
    if isinstance(event, WorkerLost | WorkerLeft | WorkerJoined):
        return _lost(task, event, at, story.state)
    return _step(story, task, event, at)


def _step(story: Story, task: Task, event: Any, at: At) -> str:
    match event:
        case TaskSubmitted():
            return f"submitted by {at.actor}; ready from here on"
        case WorkflowSubmitted():
            waiting = node_of(task).waiting
            then = f"waits for {waiting} dependencies" if waiting else "ready from here on"
            return f"submitted by {at.actor} as part of workflow {node_of(task).workflow.id}; {then}"
        case TaskAssigned():
            return f"attempt {event.attempt} assigned to {at.actor}"
        case TaskStarted():
            return f"attempt {event.attempt} begun by {at.actor}"
        case TaskDeclined():
            pause_s = story.state.policy.decline_ms / 1000
            return f"{at.actor} declined it{_said(event.reason)}: queued again in front, and {at.actor} is not asked for {pause_s:g} s"
        case TaskStop():
            return f"{at.actor} asked to stop attempt {event.attempt}{_said(event.reason)}"
        case TaskRetried():
            return "its backoff is over: ready again"
        case TaskReprioritized():
            return f"{at.actor} changed its priority from {story.priority_before} to {task.priority}"
        case TaskCancelRequested() | WorkflowCancelRequested() if story.cancel_before is None:
            what = "its workflow" if isinstance(event, WorkflowCancelRequested) else "it"
            return f"{at.actor} asked for {what} to be cancelled{_said(event.reason)}"
        case _:
            return ""


def _end(task: Task, event: Any, at: At, state: Namespace) -> str:
    """What became of an attempt, or of the task."""
    match event:
        case TaskCompleted():
            return f"attempt {event.attempt} completed by {at.actor} after {event.run_us / 1000:g} ms"
        case TaskFailed():
            return f"attempt {event.attempt} failed at {at.actor}{_said(f'{event.error}: {event.message}')}; {_afterwards(task, event, state)}"
        case TaskTimedOut():
            waited_s = task.terms.queue_timeout_ms / 1000
            return f"failed: no worker began it within its queue timeout of {waited_s:g} s"
        case TaskQuarantined():
            return f"failed: quarantined{_said(event.detail or event.reason)}"
        case _:
            return f"cancelled{_said(task.cancel or '')}"


def _afterwards(task: Task, event: TaskFailed, state: Namespace) -> str:
    """Why it is tried again after a failure, or why not."""
    retry, spent = task.terms.retry, task.failures + task.losses
    if event.error == "stopped":
        return "that costs no attempt"
    if task.state is State.PENDING:
        assert retry is not None
        pause_s = (task.due_ms - state.clock_ms) / 1000
        return f"{spent} of {retry.max_attempts} attempts are spent, the next follows in {pause_s:.3g} s"
    if task.cancel is not None:
        return "not tried again: it was to be cancelled"
    if retry is None:
        return "not tried again: no retries were asked for"
    if not event.retryable:
        return "not tried again: the failure is said to be for good"
    if event.error in retry.non_retryable:
        return f"not tried again: {event.error} is not to be retried"
    return f"not tried again: all {retry.max_attempts} attempts are spent"


def _followed(task: Task, event: Any) -> str:
    """What the end of another task of its workflow did to it."""
    if task.state is State.READY:
        return f"{event.id} completed, the last of its dependencies: ready from here on"
    if task.state is State.SKIPPED:
        return f"skipped, since {task.error}"
    return ""


def _lost(task: Task, event: Any, at: At, state: Namespace) -> str:
    """It was held by a worker that is gone."""
    match event:
        case WorkerLost():
            gone = f"{event.worker} was given up{_said(event.reason)}"
        case WorkerJoined():
            gone = f"{at.actor} started anew: what it had is lost"
        case _:
            return f"{at.actor} left before it ended: queued again in front, which costs no attempt"
    if task.started:
        limit = state.policy.losses_max
        return f"{gone}; attempt {task.attempt} had begun, which is loss {task.losses} of {limit}: queued again in front"
    return f"{gone}; whether attempt {task.attempt} had begun is not known, so the task is a suspect: queued again in front"


def _said(text: str) -> str:
    text = text.strip().removesuffix(":")
    return f" ({text[:_MESSAGE_MAX]})" if text else ""
