"""The shape of a workflow file: what it is read into, and what it may say.

Limits are the contract's (`agentflow.limits`), so that what is accepted here is not rejected
by a leader later.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta, Struct

from agentflow.limits import (
    ATTEMPTS_MAX,
    LABELS_MAX,
    LOCK_NAME_LENGTH_MAX,
    NON_RETRYABLE_MAX,
    SCRIPT_LENGTH_MAX,
    SECONDS_MAX,
    TEXT_LENGTH_MAX,
)

RESOURCE_MAX: Final = 1_000_000_000
FACTOR_MAX: Final = 1_000.0

Text: TypeAlias = Annotated[str, Meta(max_length=TEXT_LENGTH_MAX)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]
Amount: TypeAlias = Annotated[int, Meta(ge=0, le=RESOURCE_MAX)]


class Function(Struct, frozen=True, tag=True):
    """Run a function registered at the worker."""

    name: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class Shell(Struct, frozen=True, tag=True):
    """Run a script with /bin/sh."""

    script: str


class Argv(Struct, frozen=True, tag=True):
    """Run a program. Elements are text, or what stands for or holds a result."""

    argv: list[Any]


Run: TypeAlias = Function | Shell | Argv


class Needs(Struct, frozen=True):
    """What a task asks of the worker it runs on."""

    cpu: Annotated[float, Meta(ge=0, le=RESOURCE_MAX)] = 0.0
    memory_mb: Amount = 0
    gpus: Amount = 0
    group: Text = ""
    labels: Annotated[dict[Text, Text], Meta(max_length=LABELS_MAX)] = {}


class Retry(Struct, frozen=True):
    """What happens after a failed attempt. `jitter` is a fraction of the wait."""

    max_attempts: Annotated[int, Meta(ge=1, le=ATTEMPTS_MAX)] = 3
    backoff_s: Seconds = 1.0
    backoff_factor: Annotated[float, Meta(ge=1, le=FACTOR_MAX)] = 2.0
    backoff_s_max: Seconds = 300.0
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.1
    non_retryable: Annotated[list[Text], Meta(max_length=NON_RETRYABLE_MAX)] = []


class TaskFile(Struct, frozen=True, kw_only=True):
    """One task as its file describes it, defaults applied."""

    task_id: str
    run: Run
    title: str = ""
    description: str = ""
    dependencies: tuple[str, ...] = ()
    """As written, then the tasks whose results it uses; each once."""
    env: dict[str, Any] = {}
    """Text, or what stands for or holds a result."""
    cwd: str = ""
    needs: Needs | None = None
    retry: Retry | None = None
    """None: one attempt."""
    timeout_s: float = 0.0
    """0: no limit."""
    queue_timeout_s: float = 0.0
    """0: no limit."""
    priority: int = 500
    lock: str = ""
    """Name of a lock that is held, exclusively, while the task runs."""
    line: int = 0
    """Where it begins in the file; 0 if not known."""


class WorkflowFile(Struct, frozen=True, kw_only=True):
    """A workflow as its file describes it. Its tasks form an acyclic graph."""

    source: str
    """The file's name, for messages."""
    tasks: tuple[TaskFile, ...]
    id: str = ""
    """Empty: to be chosen by who submits it."""
    name: str = ""
    description: str = ""
    app: str | None = None
    """What holds the functions: a module's name or a Python file."""


# What the file may say, as it stands there ------------------------------------------------


class Terms(Struct, frozen=True, kw_only=True):
    """What `defaults` may set for all tasks and a task for itself."""

    env: dict[str, Any] = {}
    cwd: Text = ""
    needs: Needs | None = None
    retry: Retry | None = None
    timeout_s: Seconds = 0.0
    queue_timeout_s: Seconds = 0.0
    priority: int | str = 500
    lock: Annotated[str, Meta(max_length=LOCK_NAME_LENGTH_MAX)] = ""


class TaskShape(Terms, frozen=True, kw_only=True):
    """A task. That it has an id and runs exactly one thing is for the reader to see to."""

    task_id: str = ""
    title: Text = ""
    description: Text = ""
    dependencies: list[str] = []
    function: Text = ""
    shell: Annotated[str, Meta(max_length=SCRIPT_LENGTH_MAX)] = ""
    argv: list[Any] = []
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class WorkflowShape(Struct, frozen=True, kw_only=True):
    """What stands below `workflow:`; its tasks are shaped one by one."""

    id: str = ""
    name: Text = ""
    description: Text = ""
    tasks: list[Any] = []


class FileShape(Struct, frozen=True, kw_only=True):
    """The top of the file."""

    workflow: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    app: Text | None = None
