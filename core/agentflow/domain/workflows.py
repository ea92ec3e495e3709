"""Workflows: from a submitted DAG to linked tasks, and what their ends add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentflow import ids
from agentflow.domain import dag
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.state import At, Namespace, Node, Workflow
from agentflow.domain.tasks import new_task
from agentflow.events import Reason, WorkflowSubmitted, WorkflowTask
from agentflow.limits import WORKFLOW_EDGES_MAX, WORKFLOW_TASKS_MAX
from agentflow.references import uses


def fault(tasks: Sequence[WorkflowTask]) -> tuple[Reason, str] | None:
    """Why these tasks are no workflow; None if they are one."""
    if not tasks:
        return Reason.BAD_DAG, "a workflow needs at least one task"
    if len(tasks) > WORKFLOW_TASKS_MAX:
        return Reason.TOO_LARGE, f"{len(tasks)} tasks; a workflow has at most {WORKFLOW_TASKS_MAX}"
    edges = sum(len(task.dependencies) for task in tasks)
    if edges > WORKFLOW_EDGES_MAX:
        return Reason.TOO_LARGE, f"{edges} dependencies; a workflow has at most {WORKFLOW_EDGES_MAX}"
    faults = dag.validate([(task.task_id, task.dependencies) for task in tasks])
    if faults:
        return Reason.BAD_DAG, "; ".join(map(dag.describe, faults[:3]))[:1000]
    for task in tasks:
        strangers = set(uses(task)).difference(task.dependencies)
        if strangers:
            wanted = ", ".join(sorted(strangers))[:200]
            return Reason.BAD_DAG, f"{task.task_id} uses the result of {wanted} without depending on it"
    return None


def build(
    state: Namespace,
    event: WorkflowSubmitted,
    workflow_id: str,
    submitted: Sequence[tuple[At, WorkflowTask]],
    digest: int,
    at: At,
) -> Workflow:
    """The workflow and its linked tasks, not entered anywhere yet.

    `submitted` holds each task with the position of the event that brought it.
    """
    workflow = Workflow(
        id=workflow_id,
        seq=at.seq,
        index=at.index,
        digest=digest,
        client=at.actor,
        notify=event.notify,
        tasks={},
        open=len(submitted),
        counts={},
    )
    for where, work in submitted:
        task = new_task(state, work, ids.in_workflow(workflow_id, work.task_id), where)
        task.node = Node(workflow, work.task_id, len(dict.fromkeys(work.dependencies)), [], uses(work))
        workflow.tasks[work.task_id] = task
    for _, work in submitted:
        for dependency in dict.fromkeys(work.dependencies):
            node = workflow.tasks[dependency].node
            assert node is not None
            node.dependents.append(workflow.tasks[work.task_id])
    return workflow


def outcome(counts: Mapping[State, int]) -> WorkflowState:
    """What a workflow's ended tasks add up to."""
    if counts.get(State.FAILED):
        return WorkflowState.FAILED
    if counts.get(State.CANCELLED):
        return WorkflowState.CANCELLED
    return WorkflowState.COMPLETED
