"""The log of a run, judged and folded with the real code, as rows."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Final, Protocol

from agentflow import frames, ids, wire
from agentflow.checks import Bad
from agentflow.domain.fold import fold
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.state import Kind, Namespace
from agentflow.events import (
    EventRejected,
    LeaderElected,
    Role,
    TaskAssigned,
    TaskFailed,
    TaskSubmitted,
    Work,
    WorkerJoined,
    WorkflowSubmitted,
)
from agentflow.frames import Judged
from agentflow.log.port import Message
from tests.chaos.watch import Chain

NUMBER_VARIABLE: Final = "CHAOS_NUMBER"
INDEXES: Final = 8_192
"""Positions are sequence times this, plus index, plus one."""
_ENDS: Final = frozenset(
    {"task.completed", "task.failed", "task.cancelled", "task.timed_out", "task.quarantined"}
)
_SUBMITS: Final = frozenset({TaskSubmitted.kind, WorkflowSubmitted.kind})
_LOCKS: Final = "lock."

Asked = MutableMapping[int, list[dict[str, Any]]]
"""What masters answered, by the sequence they had folded."""


class Rows(Protocol):
    """Where rows go."""

    def add(self, table: str, row: tuple[Any, ...]) -> None:
        """One row of a table."""
        ...


def position(seq: int, index: int) -> int:
    """A position as one number."""
    return seq * INDEXES + index + 1


class Folding:
    """Folds message after message; what comes of each goes into rows."""

    def __init__(self, namespace: str, rows: Rows, asked: Asked, live: Sequence[int], canary: str) -> None:
        self.state: Final = Namespace(namespace)
        self._rows = rows
        self._asked = asked
        self._live = live
        self._canary = canary.encode()
        self._chain = Chain()
        self._open: dict[str, list[str]] = {}
        """Tasks of the workflows that have not ended."""

    def take(self, message: Message) -> None:
        """One message."""
        judged = frames.judge(message.subject, message.data, message.headers)
        verdicts = fold(self.state, message.seq, message.time_ns, judged)
        self._enter_message(message, judged)
        first = -1 if judged.whole is not None else 0
        for index, verdict in enumerate(verdicts, first):
            item = judged.items[index] if index >= 0 else judged.whole
            self._enter_event(message, judged, index, item, verdict)
        self._enter_ended()
        self._compare(message.seq)

    def rest(self) -> None:
        """What is left at the end, and the answers that no position explains."""
        state = self.state
        left = ("tasks", "workflows", "cancels", "struck", "answers", "announcements", "parts")
        for name in left:
            self._rows.add("rest", (name, len(getattr(state, name))))
        self._rows.add("rest", ("queue", state.queue.size))
        self._rows.add("rest", ("running", state.running))

    # Messages and events ---------------------------------------------------------------

    def _enter_message(self, message: Message, judged: Judged) -> None:
        headers = message.headers or {}
        epoch = judged.decision.epoch if judged.decision is not None else 0
        if judged.kind == LeaderElected.kind and judged.items and isinstance(judged.items[0], LeaderElected):
            epoch = judged.items[0].epoch
        writer, _, _ = headers.get(wire.MSG_ID, "").rpartition(".")
        name, _, term = writer.rpartition(".")
        seq = message.seq
        row = (
            seq,
            message.time_ns // 1_000_000,
            message.subject.split(".")[1],
            judged.kind,
            name,
            term,
            epoch if judged.role is Role.LEADER else 0,
            1 if judged.whole is not None else len(judged.items),
            self._chain.add(message),
            self._live[seq - 1] if seq <= len(self._live) else None,
            self._canary in message.data or self._canary in repr(headers).encode(),
        )
        self._rows.add("msg", row)

    def _enter_event(self, message: Message, judged: Judged, index: int, item: Any, verdict: Any) -> None:
        seq, kind = message.seq, judged.kind
        applied = verdict.kind is Kind.APPLIED
        if type(item) is Bad:
            item = None
        task = getattr(item, "id", None)
        ends = applied and kind in _ENDS and self.state.status(item.id)[1] == (seq, index)
        decision = judged.decision
        about = (item.seq, item.index) if type(item) is EventRejected else (None, None)
        row = (
            position(seq, index),
            seq,
            index,
            message.time_ns // 1_000_000,
            kind,
            judged.actor,
            task,
            getattr(item, "attempt", None),
            getattr(item, "incarnation", None),
            decision.epoch if decision is not None else None,
            decision.basis if decision is not None else None,
            str(verdict.kind),
            str(verdict.reason) if verdict.reason is not None else None,
            getattr(item, "error", None),
            ends,
            item.suspect if type(item) is TaskAssigned else False,
            getattr(item, "run_us", None),
            item.retryable if type(item) is TaskFailed else None,
            *about,
        )
        self._rows.add("ev", row)
        if item is not None and kind not in _COMMON:
            self._enter_more(seq, index, judged, item, verdict)
        if kind in _SUBMITS:
            self._enter_submission(seq, index, judged.actor, item, verdict)

    def _enter_more(self, seq: int, index: int, judged: Judged, item: Any, verdict: Any) -> None:
        if verdict.kind is Kind.APPLIED and type(item) is WorkerJoined:
            self._rows.add("worker", (judged.actor, seq, item.slots, item.ahead, item.cpu, item.pid))
        elif judged.kind.startswith(_LOCKS):
            row = (
                position(seq, index),
                judged.kind,
                getattr(item, "name", ""),
                getattr(item, "token", 0),
                getattr(item, "holder", ""),
                getattr(item, "mode", ""),
                getattr(item, "permits", 0),
                str(verdict.kind),
            )
            self._rows.add("lock", row)

    # Submissions -----------------------------------------------------------------------

    def _enter_submission(self, seq: int, index: int, client: str, item: Any, verdict: Any) -> None:
        is_workflow = type(item) is WorkflowSubmitted
        task = None if item is None else item.id or ids.derived(seq, index)
        reason = str(verdict.reason) if verdict.reason is not None else None
        number = None if item is None else _number_of(item)
        self._rows.add(
            "submitted", (seq, index, client, number, task, str(verdict.kind), reason, is_workflow)
        )
        if verdict.kind is not Kind.APPLIED or task is None:
            return
        if type(item) is WorkflowSubmitted:
            self._enter_workflow(seq, index, item)
        elif type(item) is TaskSubmitted:
            self._rows.add("task", _task_row(task, seq, index, None, item))

    def _enter_workflow(self, seq: int, index: int, flow: WorkflowSubmitted) -> None:
        members: list[str] = []
        for work in flow.tasks:
            task = ids.in_workflow(flow.id, work.task_id)
            members.append(task)
            self._rows.add("task", _task_row(task, seq, index, flow.id, work))
            for upstream in work.dependencies:
                self._rows.add("dep", (task, ids.in_workflow(flow.id, upstream)))
        self._open[flow.id] = members

    def _enter_ended(self) -> None:
        """Workflows that have just ended, and their tasks that were skipped."""
        state = self.state
        if not state.ended:
            return
        ended, state.ended = state.ended, []
        for each in ended:
            if not isinstance(each.state, WorkflowState):
                continue
            self._rows.add("workflow_ended", (each.id, str(each.state)))
            for task in self._open.pop(each.id, ()):
                found, where = state.status(task)
                if found == State.SKIPPED:
                    self._rows.add("skipped", (task, position(*where)))

    # Answers ---------------------------------------------------------------------------

    def _compare(self, seq: int) -> None:
        """What masters said when they had folded just this much."""
        for answer in self._asked.pop(seq, ()):
            for task, state, end_seq, end_index in answer["statuses"]:
                fold_state, where = self.state.status(task)
                fold_seq, fold_index = where or (0, 0)
                row = (
                    answer["master"],
                    seq,
                    task,
                    state,
                    end_seq,
                    end_index,
                    str(fold_state),
                    fold_seq,
                    fold_index,
                )
                self._rows.add("answer", row)


_COMMON: Final = frozenset(
    {"task.submitted", "task.assigned", "task.completed", "task.started", "task.failed"}
)


def _number_of(item: TaskSubmitted | WorkflowSubmitted) -> int | None:
    """The number its client gave it."""
    if isinstance(item, WorkflowSubmitted):
        given: Any = item.name
    else:
        given = item.args[0] if item.args else item.env.get(NUMBER_VARIABLE)
    try:
        return int(given)
    except (TypeError, ValueError):
        return None


def _task_row(task: str, seq: int, index: int, workflow: str | None, work: Work) -> tuple[Any, ...]:
    retry = work.retry
    return (
        task,
        seq,
        index,
        workflow,
        work.function or "shell",
        retry.max_attempts if retry is not None else 1,
        retry.backoff_s * 1000 if retry is not None else 0.0,
        retry.backoff_factor if retry is not None else 1.0,
        retry.backoff_s_max * 1000 if retry is not None else 0.0,
        retry.jitter if retry is not None else 0.0,
        int(work.timeout_s * 1000),
        work.needs.cpu if work.needs is not None else 0.0,
    )
