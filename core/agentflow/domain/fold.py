"""The fold: what each event makes of the state.

`fold` is total and deterministic and never raises on history: what makes no sense is
answered with a verdict and changes nothing. Everything else in the project that knows the
state of a task knows it from here.

What an event means stands with those who say it: what clients ask for in `asked`, what the
leader decides in `decided`, what workers say in `reported`, and what these share in `steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from agentflow.checks import Bad
from agentflow.domain.asked import (
    rejected,
    task_cancel_requested,
    task_reprioritized,
    task_submitted,
    worker_drain_requested,
    workflow_cancel_requested,
    workflow_part,
    workflow_submitted,
)
from agentflow.domain.decided import DECISIONS, decided
from agentflow.domain.locks import lock_acquired, lock_ended, lock_opened
from agentflow.domain.many import MANY_MIN, all_applied
from agentflow.domain.masters import leader_elected, master_joined, master_left
from agentflow.domain.reported import (
    task_completed,
    task_declined,
    task_failed,
    task_started,
    worker_draining,
    worker_joined,
    worker_left,
)
from agentflow.domain.state import APPLIED, At, Ended, Kind, Namespace, Verdict
from agentflow.events import (
    SINCE,
    Event,
    EventRejected,
    LeaderElected,
    LockAcquired,
    LockLost,
    LockOpened,
    LockReleased,
    MasterJoined,
    MasterLeft,
    Reason,
    Role,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskReprioritized,
    TaskStarted,
    TaskSubmitted,
    WorkerDraining,
    WorkerDrainRequested,
    WorkerJoined,
    WorkerLeft,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.frames import Judged, unknown_kind
from agentflow.limits import ANSWERS_MAX, LEVEL_FIRST

Observe = Callable[[At, "Event | Bad", Verdict], None]
"""Told of each event once it is folded: where it stands, what it says, and what was made of it.

The position is the fold's own and moves on afterwards. Index -1: the message as a whole.
"""


def fold(
    state: Namespace, seq: int, time_ns: int, judged: Judged, observe: Observe | None = None
) -> list[Verdict]:
    """Fold one message; the verdict on each of its events, or on the message as a whole.

    A message at or before the last one folded changes nothing. Frames are folded at one go where
    that is certain to be the same, unless somebody observes each event.
    """
    if seq <= state.seq:
        return []
    server_ms = time_ns // 1_000_000
    _advance_clock(state, server_ms)
    state.seq = seq
    if state.parts and (judged.kind not in _PARTS or seq != state.parts_seq + 1):
        state.parts.clear()
    at = At(seq, 0, server_ms, judged.actor)
    if judged.level != LEVEL_FIRST and judged.level > min(state.level, state.knows):
        at.index = -1
        return _as_a_whole(_too_new(state, judged, at), at, observe)
    if judged.whole is not None:
        at.index = -1
        return _as_a_whole(_refuse(state, judged.role, judged.whole, at), at, observe)
    if judged.decision is not None:
        at.epoch = judged.decision.epoch
    count = len(judged.items)
    if count >= MANY_MIN and observe is None and all_applied(state, judged.kind, judged.items, at):
        return [APPLIED] * count
    return _one_by_one(state, judged, at, observe)


def _one_by_one(state: Namespace, judged: Judged, at: At, observe: Observe | None) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for index, item in enumerate(judged.items):
        at.index = index
        meaning = MEANING.get(type(item))
        if meaning is None:
            assert isinstance(item, Bad)
            verdict = _refuse(state, judged.role, item, at)
        else:
            verdict = meaning(state, item, at)
            if verdict is not APPLIED:
                verdict = _not_applied(state, verdict, item, at)
        verdicts.append(verdict)
        if observe is not None:
            observe(at, item, verdict)
    return verdicts


def _as_a_whole(verdict: Verdict, at: At, observe: Observe | None) -> list[Verdict]:
    if observe is not None:
        observe(at, Bad(verdict.reason or Reason.BAD_VALUE, verdict.detail), verdict)
    return [verdict]


def _advance_clock(state: Namespace, server_ms: int) -> None:
    if not state.seq:
        state.clock_ms = server_ms
    elif server_ms > state.server_ms:
        state.clock_ms += server_ms - state.server_ms
    state.server_ms = server_ms
    state.latest_ms = max(state.latest_ms, server_ms)


def _too_new(state: Namespace, judged: Judged, at: At) -> Verdict:
    """A message of a level that is not in force yet: said by every fold as one that knows no more would."""
    level = min(state.level, state.knows)
    if SINCE[judged.kind] > level:
        return _refuse(state, None, unknown_kind(judged.kind), at)
    detail = f"the message is of level {judged.level}; level {level} is in force"
    return _refuse(state, judged.role, Bad(Reason.UNKNOWN_VERSION, detail), at)


_PARTS: Final = frozenset({WorkflowPart.kind, WorkflowSubmitted.kind})


def _refuse(state: Namespace, role: Role | None, bad: Bad, at: At) -> Verdict:
    if role is Role.CLIENT:
        return _answered(state, rejected(bad.reason, bad.detail), bad.id, at)
    state.quarantined += 1
    return Verdict(Kind.QUARANTINED, bad.reason, bad.detail)


def _not_applied(state: Namespace, verdict: Verdict, event: Any, at: At) -> Verdict:
    """Count it, answer it, and tell a client that waits."""
    if verdict.kind in _TOLD and isinstance(event, TaskSubmitted | WorkflowSubmitted) and event.notify:
        why = (str(verdict.reason), verdict.detail)
        state.ended.append(Ended(event.id, verdict.kind, at.actor, event.notify, at.seq, at.index, why))
    if verdict.kind is Kind.REJECTED:
        given_id = event.workflow if isinstance(event, WorkflowPart) else getattr(event, "id", "")
        return _answered(state, verdict, given_id, at)
    if verdict.kind is Kind.QUARANTINED:
        state.quarantined += 1
    elif verdict.kind is Kind.SUPERSEDED:
        state.superseded += 1
    return verdict


_TOLD: Final = frozenset({Kind.REJECTED, Kind.DUPLICATE})
"""Verdicts on a submission of which its client is told."""


def _answered(state: Namespace, verdict: Verdict, given_id: str, at: At) -> Verdict:
    """The rejection, to be answered; a quarantine if too many wait for their answer already."""
    if len(state.answers) >= ANSWERS_MAX:
        state.quarantined += 1
        return Verdict(Kind.QUARANTINED, verdict.reason, verdict.detail)
    state.rejected += 1
    state.answers[at.seq, at.index] = EventRejected(
        seq=at.seq,
        index=at.index,
        client=at.actor,
        reason=str(verdict.reason),
        detail=verdict.detail,
        id=given_id,
    )
    return verdict


MEANING: Final[dict[type, Callable[[Namespace, Any, At], Verdict]]] = {
    TaskSubmitted: task_submitted,
    TaskStarted: task_started,
    TaskCompleted: task_completed,
    TaskFailed: task_failed,
    TaskDeclined: task_declined,
    TaskCancelRequested: task_cancel_requested,
    TaskReprioritized: task_reprioritized,
    WorkflowSubmitted: workflow_submitted,
    WorkflowPart: workflow_part,
    WorkflowCancelRequested: workflow_cancel_requested,
    WorkerJoined: worker_joined,
    WorkerDraining: worker_draining,
    WorkerDrainRequested: worker_drain_requested,
    WorkerLeft: worker_left,
    MasterJoined: master_joined,
    MasterLeft: master_left,
    LeaderElected: leader_elected,
    LockAcquired: lock_acquired,
    LockReleased: lock_ended,
    LockLost: lock_ended,
    LockOpened: lock_opened,
    **dict.fromkeys(DECISIONS, decided),
}
"""What each kind of event makes of the state, at one position."""
