"""Rows of a history for what a state of the fold knows, where the log before it was trimmed.

What a fold does not keep stays empty: titles, names, times before the state, earlier attempts.
The messages that tell may be there all the same, in the live log or kept for open work; `fill`
reads those of the rows that are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from agentflow.domain.life import State
from agentflow.domain.state import Namespace, Node, Payload, Task
from agentflow.events import Needs, TaskSubmitted, WorkerJoined, WorkflowSubmitted
from agentflow.frames import decode_any
from agentflow_projections.history_rows import (
    Attempt,
    TaskRow,
    WorkerRow,
    WorkerState,
    WorkflowRow,
    dependents_of,
    runs_of,
    runs_of_task,
)
from agentflow_projections.past import LoggedPast
from agentflow_projections.submissions import Submissions


def task_rows(state: Namespace) -> Iterator[TaskRow]:
    """Open tasks, and those of open workflows that ended, in the order they were accepted."""
    dependencies: dict[str, list[str]] = {}
    tasks = sorted(state.tasks.values(), key=lambda task: task.number)
    for task in tasks:
        if task.node is not None:
            for dependent in task.node.dependents:
                dependencies.setdefault(dependent.id, []).append(task.node.task_id)
    return (_task_row(task, dependencies.get(task.id, [])) for task in tasks)


def _task_row(task: Task, dependencies: list[str]) -> TaskRow:
    terms, node = task.terms, task.node
    runs_kind, runs = runs_of_task(task)
    attempts = list(_attempts(task))
    return TaskRow(
        id=task.id,
        task_id=node.task_id if node is not None else task.id,
        workflow=node.workflow.id if node is not None else "",
        runs_kind=runs_kind,
        runs=runs,
        client=terms.client,
        seq=task.seq,
        index=task.index,
        priority=task.priority,
        attempts_max=terms.retry.max_attempts if terms.retry is not None else 1,
        dependencies=dependencies,
        state=State(task.state),
        submitted_ms=0,
        ready_ms=task.ready_ms,
        due_ms=task.due_ms if task.state is State.PENDING else 0,
        attempts=attempts,
        tries_before=task.attempt - len(attempts),
        is_lacking=True,
        result=_result(node),
        error="" if task.state is State.COMPLETED else task.error,
        cancel_requested=task.cancel is not None,
        cancel_reason=task.cancel or "",
        live=None if node is not None and node.end_seq else task,
    )


def _attempts(task: Task) -> Iterator[Attempt]:
    """Of all its attempts the one that goes on, or that completed it."""
    node = task.node
    if task.worker is not None:
        yield Attempt(task.attempt, task.worker.name, task.worker.incarnation, 0)
    elif task.state is State.COMPLETED and node is not None:
        yield Attempt(task.attempt, "", 0, 0, outcome="completed", seq=node.end_seq, index=node.end_index)


def _result(node: Node | None) -> msgspec.Raw | None:
    if node is None or node.result is None or not node.result.value:
        return None
    return msgspec.Raw(node.result.value)


def workflow_rows(state: Namespace, tasks: Mapping[str, TaskRow]) -> Iterator[WorkflowRow]:
    """Open workflows, out of the rows of their tasks, as far as there are any."""
    for workflow in state.workflows.values():
        rows = {name: tasks[task.id] for name, task in workflow.tasks.items() if task.id in tasks}
        yield WorkflowRow(
            id=workflow.id,
            client=workflow.client,
            seq=workflow.seq,
            index=workflow.index,
            submitted_ms=0,
            tasks=rows,
            dependents=dependents_of(rows.values()),
        )


def worker_rows(state: Namespace) -> Iterator[tuple[str, WorkerRow]]:
    """The workers that are there, by name."""
    for worker in state.workers.values():
        yield (
            worker.name,
            WorkerRow(
                name=worker.name,
                incarnation=worker.incarnation,
                state=WorkerState.DRAINING if worker.draining else WorkerState.ACTIVE,
                slots=worker.slots,
                group=worker.group,
                labels=dict(worker.labels),
                cpu=worker.cpu,
                memory_mb=worker.memory_mb,
                gpus=worker.gpus,
                functions=sorted(worker.functions),
                host=worker.host,
                pid=0,
                is_lacking=True,
                level=worker.level,
                joined_ms=worker.joined_ms,
                live=worker,
            ),
        )


def work_of(task: Task) -> TaskSubmitted:
    """What a task was submitted as, but for its title; for one whose arguments the fold holds."""
    terms, payload = task.terms, task.payload or Payload()
    demand = terms.demand
    needs = Needs(
        cpu=demand.cpu,
        memory_mb=demand.memory_mb,
        gpus=demand.gpus,
        group=demand.group,
        labels=dict(demand.labels),
    )
    return TaskSubmitted(
        function=terms.function,
        shell=terms.shell,
        argv=decode_any(payload.argv) if payload.argv else [],
        args=decode_any(task.args) if task.args else [],
        kwargs=decode_any(payload.kwargs) if payload.kwargs else {},
        env=decode_any(payload.env) if payload.env else {},
        cwd=terms.cwd,
        object=payload.object,
        priority=terms.priority,
        needs=needs if needs != Needs() else None,
        retry=terms.retry,
        timeout_s=terms.timeout_s,
        queue_timeout_s=terms.queue_timeout_ms / 1000,
        lock=demand.lock,
    )


async def fill(past: LoggedPast, rows: Iterable[TaskRow]) -> None:
    """Complete rows by the submissions they come from, as far as these are still there."""
    lacking = [row for row in rows if row.is_lacking]
    submissions = Submissions(await past.read(row.seq for row in lacking))
    for row in lacking:
        work = submissions.work(row.seq, row.index, row.task_id)
        if work is not None:
            row.title, row.is_lacking = work.title, False
            row.submitted_ms = submissions.time_ms(row.seq)
            row.runs_kind, row.runs = runs_of(work)


async def fill_workflow(past: LoggedPast, row: WorkflowRow) -> None:
    """Complete a workflow and its tasks."""
    await fill(past, row.tasks.values())
    submissions = Submissions(await past.read([row.seq] if not row.submitted_ms else []))
    event = submissions.event(row.seq, row.index)
    if isinstance(event, WorkflowSubmitted):
        row.name, row.description = event.name, event.description
        row.submitted_ms = submissions.time_ms(row.seq)


async def fill_workers(past: LoggedPast, rows: Iterable[WorkerRow]) -> None:
    """Complete workers by what they said when they joined."""
    lacking = [row for row in rows if row.is_lacking]
    submissions = Submissions(await past.read(row.incarnation for row in lacking))
    for row in lacking:
        joined = submissions.event(row.incarnation, 0)
        if isinstance(joined, WorkerJoined):
            row.pid, row.functions, row.is_lacking = joined.pid, list(joined.functions), False
