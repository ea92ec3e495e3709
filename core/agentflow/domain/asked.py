"""What clients ask for: tasks, workflows, cancellations, other priorities.

A client is told no when what it asks cannot be (see `rejected`); what it has asked before is
a duplicate. An id that was used before is known as long as it is remembered; a UUIDv7 tells
by its time whether it might have been forgotten since.

A workflow too large for one message comes in parts, one directly after the other, and its
submission directly after the last; anything else between them, and they are forgotten.
"""

from __future__ import annotations

from typing import Final

from agentflow import ids
from agentflow.checks import priority_of
from agentflow.domain import workflows
from agentflow.domain.life import FINAL, State, WorkflowState
from agentflow.domain.state import APPLIED, DUPLICATE, At, Kind, Namespace, Task, Verdict
from agentflow.domain.steps import leave_queue, make_ready, node_of, step
from agentflow.domain.tasks import digest_of_workflow, new_task, release_terms
from agentflow.events import (
    Reason,
    TaskCancelRequested,
    TaskReprioritized,
    TaskSubmitted,
    WorkerDrainRequested,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.limits import EARLY_IDS_MAX, ID_AHEAD_MS_MAX, OPEN_TASKS_MAX, WORKFLOW_TASKS_MAX


def task_submitted(state: Namespace, event: TaskSubmitted, at: At) -> Verdict:
    """A task: ready at once, if its id is new and there is room."""
    task_id = event.id or ids.derived(at.seq, at.index)
    task = new_task(state, event, task_id, at, notify=event.notify)
    if event.id:
        verdict = _known(state, task_id, task.digest)
        if verdict is not None:
            release_terms(state, task.terms)
            return verdict
    verdict = _overloaded(state, 1)
    if verdict is not None:
        release_terms(state, task.terms)
        return verdict
    _accept(state, task)
    make_ready(state, task)
    return APPLIED


def workflow_submitted(state: Namespace, event: WorkflowSubmitted, at: At) -> Verdict:
    """A workflow: its tasks that depend on nothing are ready at once."""
    belong = _come_with(state, event.id, at)
    parts, state.parts = state.parts, []
    if event.parts != len(parts) or not belong:
        return rejected(Reason.BAD_VALUE, f"{event.parts} parts announced, {len(parts)} came directly before")
    submitted = [(where, task) for where, part in parts for task in part.tasks]
    submitted += [(at, task) for task in event.tasks]
    tasks = [task for _, task in submitted]
    workflow_id = event.id or ids.derived(at.seq, at.index)
    fault = workflows.fault(tasks)
    if fault is not None:
        return rejected(*fault)
    digest = digest_of_workflow(event, tasks)
    verdict = (_known(state, workflow_id, digest) if event.id else None) or _overloaded(state, len(tasks))
    if verdict is not None:
        return verdict
    workflow = workflows.build(state, event, workflow_id, submitted, digest, at)
    state.workflows[workflow_id] = workflow
    for task in workflow.tasks.values():
        _accept(state, task)
        if node_of(task).waiting:
            step(state, task, State.PENDING)
        else:
            make_ready(state, task)
    return APPLIED


def _accept(state: Namespace, task: Task) -> None:
    state.accepted += 1
    task.number = state.accepted
    state.tasks[task.id] = task


def workflow_part(state: Namespace, event: WorkflowPart, at: At) -> Verdict:
    """The first tasks of a workflow too large for one message: kept until its submission follows."""
    if event.part != len(state.parts) or not _come_with(state, event.workflow, at):
        state.parts.clear()
        return rejected(
            Reason.BAD_VALUE, f"part {event.part} of {event.workflow} does not follow the part before it"
        )
    count = sum(len(part.tasks) for _, part in state.parts) + len(event.tasks)
    if count > WORKFLOW_TASKS_MAX:
        state.parts.clear()
        return rejected(Reason.TOO_LARGE, f"{count} tasks; a workflow has at most {WORKFLOW_TASKS_MAX}")
    state.parts.append((_copy(at), event))
    state.parts_seq = at.seq
    return APPLIED


def _come_with(state: Namespace, workflow_id: str, at: At) -> bool:
    """Whether the parts directly before, if any, are of that workflow and said by the same actor."""
    return all(part.workflow == workflow_id and where.actor == at.actor for where, part in state.parts[:1])


def _copy(at: At) -> At:
    return At(at.seq, at.index, at.server_ms, at.actor)


def _known(state: Namespace, new_id: str, digest: int) -> Verdict | None:
    """What to say of an id that was used before, or cannot be judged any more."""
    known = state.tasks.get(new_id) or state.workflows.get(new_id) or state.closed.get(new_id)
    if known is not None:
        if known.digest == digest:
            return DUPLICATE
        return rejected(Reason.CONFLICT, f"{new_id} was submitted before with another body")
    # Compared as text first, since most are neither old nor ahead: that spares reading their time.
    if state.closed.oldest < new_id < state.newest:
        return None
    return _out_of_time(state, new_id)


def _out_of_time(state: Namespace, new_id: str) -> Verdict | None:
    made_ms = ids.uuid7_time_ms(new_id)
    if made_ms is None:
        return None
    if made_ms < state.closed.horizon_ms:
        return rejected(Reason.TOO_OLD, f"{new_id} is older than the ids remembered: was it accepted before?")
    if made_ms <= state.latest_ms:
        state.newest = ids.uuid7_prefix(state.latest_ms + 1)
        return None
    if made_ms > state.latest_ms + ID_AHEAD_MS_MAX or len(state.closed.early) >= EARLY_IDS_MAX:
        return rejected(Reason.FROM_THE_FUTURE, f"{new_id} is from the future: is the client's clock right?")
    state.closed.ahead_ms = max(state.closed.ahead_ms, made_ms)
    return None


def _overloaded(state: Namespace, more: int) -> Verdict | None:
    if len(state.tasks) + more > OPEN_TASKS_MAX:
        return rejected(Reason.OVERLOADED, f"{len(state.tasks)} tasks are open; at most {OPEN_TASKS_MAX}")
    if not state.policy.accepting:
        return rejected(Reason.OVERLOADED, "the log is nearly full")
    return None


def task_cancel_requested(state: Namespace, event: TaskCancelRequested, at: At) -> Verdict:
    """A task is not wanted any more."""
    task = state.tasks.get(event.id)
    if task is None or task.state in FINAL:
        return _not_open(state, event.id)
    if task.cancel is not None:
        return DUPLICATE
    _request_cancel(state, task, event.reason or f"requested by {at.actor}")
    return APPLIED


def workflow_cancel_requested(state: Namespace, event: WorkflowCancelRequested, at: At) -> Verdict:
    """No open task of a workflow is wanted any more."""
    workflow = state.workflows.get(event.id)
    if workflow is None:
        return _not_open(state, event.id)
    wanted = [task for task in workflow.tasks.values() if task.state not in FINAL and task.cancel is None]
    for task in wanted:
        _request_cancel(state, task, event.reason or f"requested by {at.actor}")
    return APPLIED if wanted else DUPLICATE


def _request_cancel(state: Namespace, task: Task, reason: str) -> None:
    """From here on it waits for nothing but the leader's confirmation."""
    task.cancel = reason
    state.cancels[task.id] = task
    leave_queue(state, task)


def task_reprioritized(state: Namespace, event: TaskReprioritized, _at: At) -> Verdict:
    """A waiting task gets another priority, and with it another place in the queue."""
    task = state.tasks.get(event.id)
    if task is None or task.state in FINAL:
        return _not_open(state, event.id)
    if task.state is State.RUNNING:
        return rejected(
            Reason.CLOSED, f"{event.id} is {task.state}: only a waiting task can be reprioritized"
        )
    priority = priority_of(event.priority)
    if priority == task.priority:
        return DUPLICATE
    queued = task.ticket != 0
    if queued:
        state.queue.remove(task)
    task.priority = priority
    if queued:
        state.queue.push(task)
    return APPLIED


def worker_drain_requested(state: Namespace, event: WorkerDrainRequested, _at: At) -> Verdict:
    """A worker gets nothing new from here on; it reads the request itself, and ends."""
    worker = state.workers.get(event.worker)
    if worker is None:
        return rejected(Reason.UNKNOWN_ID, f"no worker is called {event.worker}")
    if worker.draining:
        return DUPLICATE
    worker.draining = True
    state.workers_version += 1
    return APPLIED


def _not_open(state: Namespace, wanted: str) -> Verdict:
    known = state.tasks.get(wanted) or state.closed.get(wanted)
    if known is not None and known.state in _ENDED:
        return rejected(Reason.CLOSED, f"{wanted} is {known.state} already")
    if known is not None or wanted in state.workflows:
        what, other = ("task", "workflow") if known is not None else ("workflow", "task")
        return rejected(Reason.UNKNOWN_ID, f"{wanted} is a {what}, no {other}")
    return rejected(Reason.UNKNOWN_ID, f"no open task or workflow is called {wanted}")


_ENDED: Final = FINAL.union({WorkflowState.COMPLETED, WorkflowState.FAILED, WorkflowState.CANCELLED})


def rejected(reason: Reason, detail: str) -> Verdict:
    """The verdict on what a client may not have."""
    return Verdict(Kind.REJECTED, reason, detail)
