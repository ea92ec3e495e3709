"""What is submitted for a workflow that was read from a file.

Apart from the builder, so that a program that reads no files does not load what reads them.
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from agentflow.client.shapes import Argv, Shell, TaskFile, WorkflowFile
from agentflow.client.shapes import Function as FunctionRun
from agentflow.events import Needs, Retry, WorkflowSubmitted, WorkflowTask


def from_file(file: WorkflowFile, workflow_id: str, notify: str) -> WorkflowSubmitted:
    """What is submitted for a workflow read from a file."""
    return WorkflowSubmitted(
        id=workflow_id,
        name=file.name,
        description=file.description,
        tasks=[_task_from_file(task) for task in file.tasks],
        notify=notify,
    )


def _task_from_file(task: TaskFile) -> WorkflowTask:
    return WorkflowTask(
        task_id=task.task_id,
        dependencies=list(task.dependencies),
        title=task.title,
        priority=task.priority,
        env=task.env,
        cwd=task.cwd,
        needs=Needs(**structs.asdict(task.needs)) if task.needs else None,
        retry=Retry(**structs.asdict(task.retry)) if task.retry else None,
        timeout_s=float(task.timeout_s),
        queue_timeout_s=float(task.queue_timeout_s),
        lock=task.lock,
        **_run(task),
    )


def _run(task: TaskFile) -> dict[str, Any]:
    match task.run:
        case FunctionRun(name=name, args=args, kwargs=kwargs):
            return {"function": name, "args": args, "kwargs": kwargs}
        case Shell(script=script):
            return {"shell": script}
        case Argv(argv=argv):
            return {"argv": argv}
