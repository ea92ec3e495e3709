"""Every error AgentFlow raises.

    AgentFlowError
    ├── Rejection              the domain says no; repeating the call changes nothing
    │   ├── InvalidRequest     the request breaks the contract (types, limits, ids, DAG)
    │   ├── SubmissionRejected the leader answered the submission with `event.rejected`
    │   └── TaskError          the awaited task or workflow did not complete
    │       ├── TaskFailed
    │       ├── TaskCancelled
    │       └── TaskSkipped
    └── OperatingError         network, disk, server: may be tried again
        ├── Disconnected       no connection to NATS within the time allowed
        ├── AppendRefused      the log refused a write (fence, full, permissions)
        ├── AppendUnknown      a write's fate is not known yet
        ├── StreamMismatch     the stream exists with a configuration we do not expect
        ├── LogGone            the log was deleted, recreated or went backwards
        │   └── LogTrimmed     what is wanted was archived and trimmed away: a snapshot has it
        ├── LockTimeout        the lock was not free within the time allowed
        ├── LockLost           the lock is held no longer, though it was not released
        ├── LockNotHeld        what only a lock's holder may do was asked by somebody else
        └── ObjectMissing      a large argument or result is not in the object store

A bug is an `AssertionError`: it crashes loudly and is caught nowhere.

`NonRetryable` stands apart: AgentFlow never raises it, tasks do.
"""

from __future__ import annotations


class AgentFlowError(Exception):
    """Base of everything raised on purpose."""


class Rejection(AgentFlowError):
    """The domain says no."""


class InvalidRequest(Rejection):
    """A request breaks the contract: nothing was sent."""


class SubmissionRejected(Rejection):
    """The leader answered a submission with `event.rejected`.

    `reason` is a `agentflow.events.Reason` value, `detail` says what was found.
    """

    def __init__(self, task_id: str, reason: str, detail: str) -> None:
        super().__init__(f"{task_id} was rejected: {reason}: {detail}")
        self.task_id = task_id
        self.reason = reason
        self.detail = detail


class TaskError(Rejection):
    """An awaited task or workflow ended without completing."""

    def __init__(self, task_id: str, kind: str, message: str) -> None:
        super().__init__(f"{task_id}: {kind}: {message}")
        self.task_id = task_id
        self.kind = kind
        self.message = message


class TaskFailed(TaskError):
    """The task's last attempt failed, or no attempt was left."""


class TaskCancelled(TaskError):
    """The task was cancelled."""


class TaskSkipped(TaskError):
    """A task this one depends on did not complete."""


class OperatingError(AgentFlowError):
    """The world around us failed; the call may be tried again."""


class Disconnected(OperatingError):
    """No connection to NATS within the time allowed."""


class AppendRefused(OperatingError):
    """The log refused a write. `code` is the JetStream error code."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"the log refused the write ({code}): {detail}")
        self.code = code
        self.detail = detail


class AppendUnknown(OperatingError):
    """A write was sent and never acknowledged: it may or may not be in the log."""


class StreamMismatch(OperatingError):
    """The stream exists, but is not configured as AgentFlow needs it."""


class LogGone(OperatingError):
    """The log was deleted, recreated, purged under us, or went backwards."""


class LogTrimmed(LogGone):
    """What is wanted of the log was archived, and trimmed away since: a snapshot of the fold stands for it."""


class LockTimeout(OperatingError):
    """The lock was not free within the time allowed; the contender has left the line."""


class LockLost(OperatingError):
    """A lock is held no longer, though it was not released: its time to live ran out, or it was taken away.

    Whoever holds it now has a higher token than `token`.
    """

    def __init__(self, name: str, token: int, reason: str) -> None:
        super().__init__(f"lock {name!r} (token {token}) was lost: {reason}")
        self.name = name
        self.token = token
        self.reason = reason


class LockNotHeld(OperatingError):
    """What only a lock's holder may do (release, renew, extend) was asked without holding it."""


class ObjectMissing(OperatingError):
    """An object named by an event is missing, or its bytes do not hash to its digest."""


class NonRetryable(Exception):
    """Raise it in a task to fail it at once, without another attempt."""
