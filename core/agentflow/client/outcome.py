"""How a task or workflow ended, as a client sees it."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct

from agentflow.domain import life
from agentflow.errors import SubmissionRejected, TaskCancelled, TaskError, TaskFailed, TaskSkipped
from agentflow.events import ObjectRef, WorkflowCompleted
from agentflow.events import TaskCancelled as TaskCancelledEvent
from agentflow.events import TaskCompleted as TaskCompletedEvent
from agentflow.events import TaskFailed as TaskFailedEvent
from agentflow.events import TaskQuarantined as TaskQuarantinedEvent
from agentflow.events import TaskTimedOut as TaskTimedOutEvent
from agentflow.notices import REJECTED, Notice

_NULL: Final = Raw(b"null")
FINAL: Final = frozenset({*life.FINAL, REJECTED})


class Outcome(Struct, frozen=True, gc=False):
    """The end of a task or workflow."""

    id: str
    state: str
    """completed, failed, skipped, cancelled, or rejected."""
    result: Raw = _NULL
    """JSON text."""
    object: ObjectRef | None = None
    """Where the result is, if it is too large for the log."""
    error: str = ""
    """What kind of failure."""
    message: str = ""
    seq: int = 0
    """Position of the event that ended it."""
    index: int = 0

    def raise_for_state(self) -> None:
        """Raise the matching `TaskError`, or SubmissionRejected, unless it completed."""
        match self.state:
            case "completed":
                return
            case "cancelled":
                raise TaskCancelled(self.id, "cancelled", self.message)
            case "skipped":
                raise TaskSkipped(self.id, "skipped", self.message)
            case "rejected":
                raise SubmissionRejected(self.id, self.error, self.message)
            case _:
                raise TaskFailed(self.id, self.error or "failed", self.message)

    def value(self, wanted: Any = Any) -> Any:
        """The decoded result. Raises TaskError if it is not of the wanted type."""
        try:
            return msgspec.json.decode(self.result, type=wanted, strict=False)
        except msgspec.ValidationError as error:
            raise TaskError(self.id, "result", f"the result is not what was expected: {error}") from error


def from_notice(notice: Notice) -> Outcome | None:
    """The outcome a notice tells; None if it has to be read in the log."""
    if notice.fetch:
        return None
    result = notice.result
    return Outcome(
        notice.id,
        notice.state,
        _NULL if result is UNSET else result,
        notice.object,
        notice.error,
        notice.message,
        notice.seq,
        notice.index,
    )


def from_event(task_id: str, state: str, event: Any, seq: int, index: int) -> Outcome:
    """The outcome of a task that is in `state` because of an event at a position.

    The event may be about something else: a skipped task ends with what it depended on.
    """
    own = getattr(event, "id", None) == task_id
    match event:
        case TaskCompletedEvent() if own:
            result = _NULL if event.result is UNSET else event.result
            return Outcome(task_id, state, result, event.object, seq=seq, index=index)
        case TaskFailedEvent() if own:
            return Outcome(task_id, state, _NULL, None, event.error, event.message, seq, index)
        case TaskCancelledEvent() if own:
            return Outcome(task_id, state, _NULL, None, "cancelled", event.reason, seq, index)
        case TaskTimedOutEvent() if own:
            message = "it waited longer than its queue timeout"
            return Outcome(task_id, state, _NULL, None, "queue_timeout", message, seq, index)
        case TaskQuarantinedEvent() if own:
            return Outcome(
                task_id, state, _NULL, None, f"quarantined: {event.reason}", event.detail, seq, index
            )
        case WorkflowCompleted():
            return Outcome(task_id, state, seq=seq, index=index)
        case _:
            cause = getattr(event, "id", "") or "a task it depends on"
            message = f"{cause} did not complete" if state == "skipped" else ""
            return Outcome(task_id, state, _NULL, None, "", message, seq, index)


def rejected(task_id: str, reason: str, detail: str, seq: int, index: int) -> Outcome:
    """The outcome of a submission at a position that was not accepted."""
    return Outcome(task_id, REJECTED, _NULL, None, reason, detail, seq, index)
