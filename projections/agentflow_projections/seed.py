"""Rows for what a state of the fold knows, where the log before it cannot be read.

A history that begins with a snapshot has no rows for what was open then. These stand for it:
each open task, workflow, worker and lock as it is in the state, at the position that the state
names. What a fold does not keep (names, titles, earlier attempts) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from agentflow.domain.state import Namespace, Task, Workflow
from agentflow.events import WorkflowSubmitted
from agentflow_projections.columns import Row
from agentflow_projections.history_rows import runs_of, runs_of_task
from agentflow_projections.rows import INDEXES
from agentflow_projections.submissions import NONE, Submissions

CAUSE: Final = "task.snapshot"
_encode: Final = msgspec.json.Encoder(order="deterministic").encode


def seed(state: Namespace, submissions: Submissions = NONE) -> dict[str, list[Row]]:
    """The rows, by table; tables without any are left out.

    Of `submissions` that are still there, tasks and workflows get the names and times that the state does not keep.
    """
    tasks = list(state.tasks.values())
    workflows = {each.id: each.seq * INDEXES + each.index for each in state.workflows.values()}
    found: dict[str, list[Row]] = {
        "task_submissions": [_submission(state, task, workflows, submissions) for task in tasks],
        "task_changes": [_change(state, task) for task in tasks],
        "task_priorities": [
            (task.number, _pos(task), _since(state, task), task.priority)
            for task in tasks
            if task.priority != task.terms.priority
        ],
        "task_cancels": [
            (task.number, _pos(task), _since(state, task), task.cancel)
            for task in tasks
            if task.cancel is not None
        ],
        "task_dependencies": [
            (dependent.number, task.number)
            for task in tasks
            if task.node is not None
            for dependent in task.node.dependents
        ],
        "workflow_submissions": [
            _workflow(state, each, workflows[each.id], submissions) for each in state.workflows.values()
        ],
        **_nodes(state),
    }
    return {table: rows for table, rows in found.items() if rows}


def _nodes(state: Namespace) -> dict[str, list[Row]]:
    """Workers, masters, the leader, its policy and the locks."""
    now_ms, pos = state.clock_ms, state.elected_seq * INDEXES
    policy = _encode(state.policy).decode()
    return {
        "worker_joins": [_joined(worker) for worker in state.workers.values()],
        "worker_changes": [
            (
                worker.incarnation,
                worker.incarnation * INDEXES,
                worker.joined_ms,
                "draining" if worker.draining else "active",
                None,
            )
            for worker in state.workers.values()
        ],
        "elections": [(state.epoch, pos, now_ms, state.leader, state.level)] if state.epoch else [],
        "policies": [(state.policy.version, pos, now_ms, policy)] if state.epoch else [],
        "master_changes": [
            (
                each.name,
                each.seq * INDEXES,
                each.joined_ms,
                "joined",
                each.instance,
                each.level,
                each.host,
                each.pid,
            )
            for each in state.masters.values()
        ],
        "lock_changes": list(_locks(state)),
    }


def _joined(worker: Any) -> Row:
    return (
        worker.incarnation,
        worker.name,
        worker.joined_ms,
        worker.slots,
        worker.ahead,
        worker.group or None,
        _text_of(dict(worker.labels)),
        worker.cpu,
        worker.memory_mb,
        worker.gpus,
        sorted(worker.functions),
        worker.host or None,
        None,
        worker.level,
    )


def _locks(state: Namespace) -> Iterator[Row]:
    pos = state.seq * INDEXES
    for name, holdings in state.locks.items():
        for each in holdings.values():
            held = (each.holder or None, each.client, each.mode, each.permits, each.ttl_s)
            yield (
                name,
                each.token,
                pos,
                each.since_ms,
                "acquired",
                *held,
                _text_of(dict(each.metadata)),
                None,
            )


def _workflow(state: Namespace, workflow: Workflow, pos: int, submissions: Submissions) -> Row:
    event = submissions.event(workflow.seq, workflow.index)
    name, description = None, None
    if isinstance(event, WorkflowSubmitted):
        name, description = event.name or None, event.description or None
    logged_ms = submissions.time_ms(workflow.seq) or state.clock_ms
    return (pos, workflow.id, logged_ms, name, description, workflow.client, len(workflow.tasks))


def _submission(state: Namespace, task: Task, workflows: dict[str, int], submissions: Submissions) -> Row:
    terms, node = task.terms, task.node
    demand = terms.demand
    work = submissions.work(task.seq, task.index, node.task_id if node is not None else "")
    kind, runs = runs_of_task(task) if work is None else runs_of(work)
    return (
        task.number,
        task.id,
        _pos(task),
        submissions.time_ms(task.seq) or _since(state, task),
        workflows[node.workflow.id] if node is not None else None,
        node.task_id if node is not None else None,
        (work.title or None) if work is not None else None,
        kind,
        runs,
        terms.client,
        terms.priority,
        terms.retry.max_attempts if terms.retry is not None else 1,
        terms.timeout_s or None,
        terms.queue_timeout_ms / 1000 or None,
        demand.cpu or None,
        demand.memory_mb or None,
        demand.gpus or None,
        demand.group or None,
        _text_of(dict(demand.labels)),
        demand.lock or None,
    )


def _change(state: Namespace, task: Task) -> Row:
    worker = task.worker.incarnation if task.worker is not None else None
    head = (task.number, _pos(task), _since(state, task), task.state, CAUSE, task.attempt, worker)
    return (*head, None, None, task.error or None, None)


def _pos(task: Task) -> int:
    return task.seq * INDEXES + task.index


def _since(state: Namespace, task: Task) -> int:
    """When it became ready, as far as that is known: when it was submitted, the fold does not keep."""
    return task.ready_ms or state.clock_ms


def _text_of(value: dict[str, str]) -> str | None:
    return _encode(value).decode() if value else None
