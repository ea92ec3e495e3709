"""The life of a task, as one table.

A task waits (`pending`) for its dependencies or for the end of a backoff, waits (`ready`)
for a worker, is assigned to one (`running`), and ends in one of four final states. Every
step has exactly one cause: an event about the task itself, or a change of something it
depends on (causes with a space in their name), which every fold derives alike.

The documentation's picture is rendered from this table; a test compares the two.
"""

from __future__ import annotations

import enum
from typing import Final


class State(enum.StrEnum):
    """Where a task is."""

    PENDING = "pending"
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


FINAL: Final = frozenset({State.COMPLETED, State.FAILED, State.SKIPPED, State.CANCELLED})

START: Final = "[*]"
"""What a task was before it was submitted."""

TABLE: Final[dict[tuple[str, str], tuple[State, ...]]] = {
    (START, "task.submitted"): (State.READY,),
    (START, "workflow.submitted"): (State.READY, State.PENDING),
    (State.PENDING, "dependency completed"): (State.READY,),
    (State.PENDING, "dependency not completed"): (State.SKIPPED,),
    (State.PENDING, "task.retried"): (State.READY,),
    (State.PENDING, "task.cancelled"): (State.CANCELLED,),
    (State.READY, "task.assigned"): (State.RUNNING,),
    (State.READY, "task.timed_out"): (State.FAILED,),
    (State.READY, "task.cancelled"): (State.CANCELLED,),
    (State.READY, "task.quarantined"): (State.FAILED,),
    (State.RUNNING, "task.started"): (State.RUNNING,),
    (State.RUNNING, "task.completed"): (State.COMPLETED,),
    (State.RUNNING, "task.failed"): (State.FAILED, State.PENDING, State.READY),
    (State.RUNNING, "task.declined"): (State.READY,),
    (State.RUNNING, "worker lost"): (State.READY,),
    (State.RUNNING, "worker left"): (State.READY,),
}
"""(state, cause) -> the states it may lead to."""


class WorkflowState(enum.StrEnum):
    """Where a workflow is."""

    RUNNING = "running"
    COMPLETED = "completed"
    """Every task completed."""
    FAILED = "failed"
    """A task failed."""
    CANCELLED = "cancelled"
    """No task failed, and one was cancelled."""


def mermaid() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for (state, cause), targets in TABLE.items():
        lines += [f"    {state} --> {target}: {cause}" for target in targets]
    lines += [f"    {state} --> [*]" for state in State if state in FINAL]
    return "\n".join(lines)
