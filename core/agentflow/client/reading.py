"""From a file's plain data to a workflow, with everything that is wrong told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, assert_never, cast

from agentflow.client.sections import (
    Problem,
    Section,
    converted,
    report,
    shaped,
    shown,
    suggestion,
)
from agentflow.client.shapes import (
    Argv,
    FileShape,
    Function,
    Run,
    Shell,
    TaskFile,
    TaskShape,
    Terms,
    WorkflowFile,
    WorkflowShape,
)
from agentflow.client.sources import Source
from agentflow.domain import dag
from agentflow.ids import is_id
from agentflow.limits import (
    DEPTH_MAX,
    ID_LENGTH_MAX,
    PRIORITIES,
    PRIORITY_MAX,
    WORKFLOW_EDGES_MAX,
    WORKFLOW_TASKS_MAX,
)

PROBLEMS_MAX: Final = 10
"""Most problems told about one file."""
VALUE_DEPTH_MAX: Final = DEPTH_MAX - 3
"""Deepest nesting in args, kwargs, env and argv: a task lies three levels down in its event."""

# What people write who come from elsewhere.
_MEANT: Final = {
    "id": "task_id",
    "name": "title",
    "after": "dependencies",
    "depends_on": "dependencies",
    "requires": "dependencies",
    "command": "shell",
    "script": "shell",
    "run": "shell",
    "cmd": "argv",
    "environment": "env",
    "working_directory": "cwd",
    "resources": "needs",
    "retries": "retry",
    "timeout": "timeout_s",
    "queue_timeout": "queue_timeout_s",
    "max_retries": "max_attempts",
    "attempts": "max_attempts",
    "backoff": "backoff_s",
    "memory": "memory_mb",
    "gpu": "gpus",
    "cpus": "cpu",
}
_NOTHING_TO_RUN: Final = (
    "has nothing to run; add one of\n"
    '    shell: "echo hello"\n'
    '    argv: ["program", "argument"]\n'
    "    function: module.name"
)
_MERGED: Final = ("env", "needs", "retry")
_PROCESS_ONLY: Final = ("env", "cwd")
_POINTER: Final = re.compile(r"(/([^~/]|~[01])*)*")
_FUNCTION: Final = re.compile(r"[^\s\x00-\x1f]+")


def read(source: Source) -> WorkflowFile:
    """Read a whole file. Raises InvalidRequest with all that is wrong, PROBLEMS_MAX items at most."""
    problems: list[Problem] = []
    try:
        workflow = _read_file(source, problems)
    except Problem as problem:
        raise report(source, [problem]) from None
    if problems:
        raise report(source, problems)
    return workflow


def _read_file(source: Source, problems: list[Problem]) -> WorkflowFile:
    """The whole file. What is wrong with single tasks is added to `problems`."""
    top = Section(source, _top(source), "")
    file = shaped(top, FileShape)
    if not file.workflow:
        raise top.problem("workflow", "expected a mapping with name and tasks, found nothing")
    section = top.child("workflow")
    workflow = shaped(section, WorkflowShape)
    if workflow.id and not is_id(workflow.id):
        raise _bad_id(section, "id", workflow.id)
    return WorkflowFile(
        source=source.name,
        tasks=_tasks(section, workflow.tasks, _defaults(top), problems),
        id=workflow.id,
        name=workflow.name,
        description=workflow.description,
        app=file.app,
    )


def _top(source: Source) -> dict[str, Any]:
    """The file's data, which must be a mapping, with the workflow at its place."""
    expected = "expected `workflow:` with name and tasks below it"
    found: object = source.data
    if not isinstance(found, dict):
        raise Problem(0, f"{expected}, found {shown(found)}")
    data = cast("dict[str, Any]", found)
    if "tasks" in data and "workflow" not in data:
        raise Problem(source.line(data, "tasks"), f"{expected}, found `tasks:`; put it below `workflow:`")
    return data


def _defaults(top: Section) -> dict[str, Any]:
    """The defaults as written, once they are known to be sound."""
    if top.data.get("defaults") is None:
        return {}
    section = top.child("defaults")
    terms = shaped(section, Terms, _MEANT)
    _priority(section, terms.priority)
    if any(references(list(_env(section, terms.env).values()))):
        raise section.problem("env", "`$result` belongs into a task: not every task can wait for that one")
    return section.data


def _tasks(
    section: Section, items: Sequence[Any], defaults: dict[str, Any], problems: list[Problem]
) -> tuple[TaskFile, ...]:
    """All tasks that are sound; adds to `problems` what is wrong with the others, or the graph."""
    if not items:
        raise section.problem("tasks", "expected at least one task, found none")
    if len(items) > WORKFLOW_TASKS_MAX:
        raise section.problem("tasks", f"expected at most {WORKFLOW_TASKS_MAX:,} tasks, found {len(items):,}")
    tasks: list[TaskFile] = []
    for number, item in enumerate(items, start=1):
        try:
            tasks.append(_task(_task_section(section, item, number), defaults))
        except Problem as problem:
            problems.append(problem)
        if len(problems) == PROBLEMS_MAX:
            break
    if not problems:
        problems.extend(_graph_problems(section, tasks))
    return tuple(tasks)


def _graph_problems(section: Section, tasks: Sequence[TaskFile]) -> list[Problem]:
    """What is wrong with the graph, at most PROBLEMS_MAX."""
    edges = sum(len(task.dependencies) for task in tasks)
    if edges > WORKFLOW_EDGES_MAX:
        found = f"expected at most {WORKFLOW_EDGES_MAX:,} dependencies in all, found {edges:,}"
        return [section.problem("tasks", found)]
    faults = dag.validate([(task.task_id, task.dependencies) for task in tasks])[:PROBLEMS_MAX]
    lines = {task.task_id: task.line for task in tasks}
    return [_fault_problem(fault, lines) for fault in faults]


def _fault_problem(fault: dag.Fault, lines: Mapping[str, int]) -> Problem:
    """A fault of the graph, on the line of a task it is about: of duplicates, the last."""
    text = dag.describe(fault)
    match fault:
        case dag.UnknownDependency():
            return Problem(lines[fault.task], text + suggestion(fault.dependency, lines))
        case dag.DuplicateTask():
            return Problem(lines[fault.task], f"{text}; give each task its own")
        case dag.SelfDependency():
            return Problem(lines[fault.task], f"{text}; take it out of its dependencies and `$result`s")
        case dag.Cycle():
            return Problem(lines[fault.path[0]], f"{text}; break it at one of them")
    assert_never(fault)


def _task_section(section: Section, item: object, number: int) -> Section:
    """A task's mapping, called by its id where it has one."""
    if not isinstance(item, dict):
        raise section.problem("tasks", f"task number {number}: expected a mapping, found {shown(item)}")
    data = cast("dict[str, Any]", item)
    task_id = data.get("task_id")
    return Section(section.source, data, f"task {shown(task_id)}" if task_id else f"task number {number}")


def _task(section: Section, defaults: dict[str, Any]) -> TaskFile:
    """One task."""
    own = shaped(section, TaskShape, _MEANT)
    if not own.task_id:
        raise section.problem(
            None, "expected `task_id:`, found none; it is how other tasks and people name it"
        )
    if not is_id(own.task_id):
        raise _bad_id(section, "task_id", own.task_id)
    run = _run(section, own)
    terms = _with_defaults(section, own, defaults, run)
    env = _env(section, terms.env)
    implied = references([*_values(run), env])
    return TaskFile(
        task_id=own.task_id,
        run=run,
        title=own.title,
        description=own.description,
        dependencies=tuple(dict.fromkeys([*own.dependencies, *implied])),
        env=env,
        cwd=terms.cwd,
        needs=terms.needs,
        retry=terms.retry,
        timeout_s=terms.timeout_s,
        queue_timeout_s=terms.queue_timeout_s,
        priority=_priority(section, terms.priority),
        lock=terms.lock,
        line=section.source.line(section.data),
    )


def _with_defaults(section: Section, own: TaskShape, defaults: dict[str, Any], run: Run) -> Terms:
    """The task's terms with the defaults below them; env, needs and retry key by key."""
    if not defaults:
        return own
    below = {key: value for key, value in defaults.items() if value is not None}
    if isinstance(run, Function):
        below = {key: value for key, value in below.items() if key not in _PROCESS_ONLY}
    above = {key: value for key, value in section.data.items() if value is not None}
    merged: dict[str, Any] = {
        key: {**below[key], **above[key]} for key in _MERGED if key in below and key in above
    }
    return converted(section, {**below, **above, **merged}, Terms)


def _values(run: Run) -> list[Any]:
    """Where a run may use results."""
    match run:
        case Function():
            return [run.args, run.kwargs]
        case Shell():
            return []
        case Argv():
            return run.argv
    assert_never(run)


def _bad_id(section: Section, key: str, found: str) -> Problem:
    expected = f"1 to {ID_LENGTH_MAX} of A-Z a-z 0-9 _ -, not beginning with 'at-'"
    return section.problem(key, f"expected {expected}, found {shown(found)}")


def _priority(section: Section, priority: int | str) -> int:
    """A priority as a number."""
    if isinstance(priority, str) and priority in PRIORITIES:
        return PRIORITIES[priority]
    if isinstance(priority, int) and 0 <= priority <= PRIORITY_MAX:
        return priority
    hint = suggestion(str(priority), PRIORITIES)
    expected = f"expected {', '.join(PRIORITIES)} or a whole number from 0 to {PRIORITY_MAX}"
    raise section.problem("priority", f"{expected}, found {shown(priority)}{hint}")


# What to run ----------------------------------------------------------------------------


def _run(section: Section, task: TaskShape) -> Run:
    """What the task runs: exactly one of three."""
    given = [key for key in ("function", "shell", "argv") if getattr(task, key)]
    if not given:
        raise section.problem(None, _NOTHING_TO_RUN)
    if len(given) > 1:
        raise section.problem(given[1], f"expected one thing to run, found {' and '.join(given)}; keep one")
    if task.function:
        return _function(section, task)
    if task.args or task.kwargs:
        raise section.problem(
            "args" if task.args else "kwargs", f"only a function takes them; give {_values_go(given[0])}"
        )
    if task.shell:
        return Shell(task.shell)
    return Argv([_text_value(section, "argv", value) for value in task.argv])


def _values_go(key: str) -> str:
    return "a script its values in `env:`" if key == "shell" else "a program its arguments in `argv:`"


def _function(section: Section, task: TaskShape) -> Function:
    if not _FUNCTION.fullmatch(task.function):
        raise section.problem("function", f"expected a name like module.name, found {task.function!r}")
    for key in ("env", "cwd"):
        if section.data.get(key):
            raise section.problem(key, "only shell and argv have it; give a function its values in `kwargs:`")
    _check_value(section, "args", task.args)
    _check_value(section, "kwargs", task.kwargs)
    return Function(task.function, task.args, task.kwargs)


def _env(section: Section, env: Mapping[str, Any]) -> dict[str, Any]:
    """The variables a process gets beside its worker's."""
    for name in env:
        if not name or "=" in name:
            raise section.problem("env", f"expected names without '=', found {shown(name)}")
    return {name: _text_value(section, f"env: {name}", value) for name, value in env.items()}


def _text_value(section: Section, key: str, value: object) -> object:
    """What becomes text in the end. Of numbers only whole ones are sure to look as they were written."""
    if isinstance(value, bool | float) or value is None:
        raise section.problem(key, f"expected text, found {shown(value)}; put it in quotes")
    _check_value(section, key, value)
    return str(value) if isinstance(value, int) else value


def _check_value(section: Section, key: str, value: object, room: int = VALUE_DEPTH_MAX) -> None:
    """Raise unless references inside a value are well formed and it is not nested too deeply."""
    if not isinstance(value, dict | list):
        return
    if room == 0:
        raise section.problem(key, f"expected at most {VALUE_DEPTH_MAX} levels of nesting, found more")
    if isinstance(value, dict) and "$result" in value:
        _check_reference(section, key, cast("dict[str, Any]", value))
        return
    items = (
        cast("dict[str, object]", value).values() if isinstance(value, dict) else cast("list[object]", value)
    )
    for item in items:
        _check_value(section, key, item, room - 1)


def _check_reference(section: Section, key: str, reference: dict[str, Any]) -> None:
    """Raise unless a reference names a task and, with `at`, a part of its result."""
    task, at = reference["$result"], reference.get("at", "")
    if reference.keys() - {"$result", "at"}:
        found = ", ".join(reference)
        raise section.problem(key, f"expected only `at` beside `$result`, found {found}")
    if not isinstance(task, str) or not task:
        raise section.problem(key, f"expected a task id after `$result`, found {shown(task)}")
    if not isinstance(at, str) or not _POINTER.fullmatch(at):
        raise section.problem(key, f"at: expected a JSON pointer like /wheel/path, found {shown(at)}")


def references(value: object) -> Iterator[str]:
    """The ids of the tasks whose results a value uses, as they come."""
    if isinstance(value, list):
        for item in cast("list[object]", value):
            yield from references(item)
    elif isinstance(value, dict):
        mapping = cast("dict[str, object]", value)
        if "$result" in mapping:
            yield cast("str", mapping["$result"])
        else:
            for item in mapping.values():
                yield from references(item)
