"""Workflows built in Python, beside those read from files.

A task's result, once there, is an argument of another:

    flow = agentflow.Workflow("release")
    source = flow.add(fetch, "main")
    wheel = flow.add(build, source)
    flow.shell("publish", "twine upload $WHEEL", env={"WHEEL": wheel})
    handle = await client.submit_workflow(flow)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Generic, ParamSpec, TypeVar

from msgspec import structs

from agentflow.client.function import Function
from agentflow.client.values import as_json
from agentflow.errors import InvalidRequest
from agentflow.events import WorkflowSubmitted, WorkflowTask
from agentflow.references import AT_KEY, RESULT_KEY, uses

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_NOT_IN_IDS: Final = re.compile(r"[^A-Za-z0-9_-]+")


class Step(Generic[R_co]):
    """A task of a workflow being built; as an argument of another it stands for its result."""

    def __init__(self, task_id: str, at: str = "") -> None:
        self.task_id: Final = task_id
        self._at = at

    def __getitem__(self, key: str | int) -> Step[Any]:
        """A part of the result: `plan["shards"][0]`."""
        escaped = str(key).replace("~", "~0").replace("/", "~1")
        return Step(self.task_id, f"{self._at}/{escaped}")

    def reference(self) -> dict[str, str]:
        """How it is written in an event."""
        return {RESULT_KEY: self.task_id, AT_KEY: self._at} if self._at else {RESULT_KEY: self.task_id}

    def __repr__(self) -> str:
        return f"<result of {self.task_id}{self._at}>"


class Workflow:
    """A DAG of tasks being built. Task ids are chosen from names unless given."""

    def __init__(self, name: str = "", *, id: str = "", description: str = "") -> None:  # noqa: A002 - the contract's word
        self.id = id
        self.name = name
        self.description = description
        self._tasks: dict[str, WorkflowTask] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, function: Function[..., R], *args: Any, **kwargs: Any) -> Step[R]:
        """Run a task function; arguments that are steps become dependencies."""
        task_id = self._free_id(function.__name__)
        return self._enter(
            WorkflowTask(
                task_id=task_id,
                function=function.name,
                args=_plain(args),
                kwargs=_plain(kwargs),
                **function.wire_options,
            )
        )

    def shell(
        self, task_id: str, script: str, *, env: Mapping[str, Any] | None = None, **options: Any
    ) -> Step[Any]:
        """Run a shell script. Values of `env` may be steps."""
        return self._enter(
            WorkflowTask(task_id=task_id, shell=script, env=_plain(dict(env or {})), **options)
        )

    def argv(
        self, task_id: str, argv: Sequence[Any], *, env: Mapping[str, Any] | None = None, **options: Any
    ) -> Step[Any]:
        """Run a program. Elements of `argv` and values of `env` may be steps."""
        return self._enter(
            WorkflowTask(task_id=task_id, argv=_plain(argv), env=_plain(dict(env or {})), **options)
        )

    def after(self, step: Step[Any], *others: Step[Any]) -> None:
        """Let a task wait for others whose results it does not use."""
        task = self._tasks[step.task_id]
        wanted = [other.task_id for other in others if other.task_id not in task.dependencies]
        self._tasks[step.task_id] = structs.replace(task, dependencies=[*task.dependencies, *wanted])

    def _enter(self, task: WorkflowTask) -> Step[Any]:
        if task.task_id in self._tasks:
            raise InvalidRequest(f"the workflow has a task {task.task_id!r} already")
        used = uses(task)
        strangers = [name for name in used if name not in self._tasks]
        if strangers:
            raise InvalidRequest(
                f"{task.task_id} uses results of other workflows' tasks: {', '.join(strangers)}"
            )
        dependencies = list(dict.fromkeys([*task.dependencies, *used]))
        self._tasks[task.task_id] = structs.replace(task, dependencies=dependencies)
        return Step(task.task_id)

    def _free_id(self, name: str) -> str:
        base = _NOT_IN_IDS.sub("-", name) or "task"
        number, task_id = 1, base
        while task_id in self._tasks:
            number += 1
            task_id = f"{base}-{number}"
        return task_id

    def event(self, workflow_id: str, notify: str) -> WorkflowSubmitted:
        """What is submitted."""
        return WorkflowSubmitted(
            id=workflow_id,
            name=self.name,
            description=self.description,
            tasks=list(self._tasks.values()),
            notify=notify,
        )


def _plain(value: Any) -> Any:
    """A value with every step in it replaced by its reference."""
    if isinstance(value, Step):
        return value.reference()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in _ordered(value)]
    return as_json(value)


def _ordered(value: Iterable[Any]) -> Iterable[Any]:
    return sorted(value, key=repr) if isinstance(value, set | frozenset) else value
