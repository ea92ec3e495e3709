"""AgentFlow: tasks and DAG workflows on a pool of workers, event-sourced on NATS JetStream.

A function becomes a task, and a client hands over calls of it:

    import agentflow

    @agentflow.task
    async def add(a: int, b: int) -> int:
        return a + b

    async with agentflow.Client() as client:
        handle = await client.submit(add, 1, 2)
        assert await handle.result() == 3
"""

from typing import TYPE_CHECKING, Any

from agentflow.client.client import Client, LoggedEvent
from agentflow.client.function import AsyncFunction, Function, SyncFunction, registered, task
from agentflow.client.handle import Handle, WorkflowHandle
from agentflow.client.outcome import Outcome
from agentflow.client.workflow import Step, Workflow
from agentflow.context import TaskContext, current
from agentflow.errors import (
    AgentFlowError,
    AppendRefused,
    AppendUnknown,
    Disconnected,
    InvalidRequest,
    LockLost,
    LockNotHeld,
    LockTimeout,
    LogGone,
    NonRetryable,
    ObjectMissing,
    OperatingError,
    Rejection,
    StreamMismatch,
    SubmissionRejected,
    TaskCancelled,
    TaskError,
    TaskFailed,
    TaskSkipped,
)
from agentflow.events import Needs, Retry

if TYPE_CHECKING:
    from agentflow.client.files import WorkflowFile, load_workflow
    from agentflow.client.locks import Held, Lock, LockHolder, LockInfo

__version__ = "0.1.0"

__all__ = [
    "AgentFlowError",
    "AppendRefused",
    "AppendUnknown",
    "AsyncFunction",
    "Client",
    "Disconnected",
    "Function",
    "Handle",
    "Held",
    "InvalidRequest",
    "Lock",
    "LockHolder",
    "LockInfo",
    "LockLost",
    "LockNotHeld",
    "LockTimeout",
    "LogGone",
    "LoggedEvent",
    "Needs",
    "NonRetryable",
    "ObjectMissing",
    "OperatingError",
    "Outcome",
    "Rejection",
    "Retry",
    "Step",
    "StreamMismatch",
    "SubmissionRejected",
    "SyncFunction",
    "TaskCancelled",
    "TaskContext",
    "TaskError",
    "TaskFailed",
    "TaskSkipped",
    "Workflow",
    "WorkflowFile",
    "WorkflowHandle",
    "current",
    "load_workflow",
    "registered",
    "task",
]


def __getattr__(name: str) -> Any:
    """Load what reads workflow files, and locks, when asked for: many programs never do (PEP 562)."""
    if name in {"WorkflowFile", "load_workflow"}:
        from agentflow.client import files  # noqa: PLC0415

        return getattr(files, name)
    if name in {"Held", "Lock", "LockHolder", "LockInfo"}:
        from agentflow.client import locks  # noqa: PLC0415

        return getattr(locks, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
