"""Which task is running here.

A task's function asks `current()` for what it needs to know about itself, whether it runs on the worker's
event loop, in one of its threads or in a child process:

    from agentflow.context import current

    def charge(order: str) -> None:
        key = current().task_id      # the same in every attempt: an idempotency key

Threads and processes that the function itself starts are outside of the task.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Generator


class TaskContext(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt being run.

    `attempt` counts from 1. `deadline` is when the attempt times out, in seconds of Unix time.
    `lock` names the lock the task runs under, if it asked for one, and `lock_token` is its
    fencing token: hand it to whatever is changed under the lock, and let that refuse lower ones.
    """

    task_id: str
    attempt: int
    namespace: str
    worker: str
    workflow_id: str | None = None
    deadline: float | None = None
    lock: str = ""
    lock_token: int | None = None


_current: ContextVar[TaskContext] = ContextVar("agentflow_task")


def current() -> TaskContext:
    """The task this code runs in; `RuntimeError` if it runs in none."""
    try:
        return _current.get()
    except LookupError:
        message = (
            "agentflow.context.current() was called outside of a task: it knows only code that a worker runs,"
            " not threads or processes started by that code"
        )
        raise RuntimeError(message) from None


def enter(task: TaskContext) -> Token[TaskContext]:
    """Make `task` the current one until `leave`; for workers."""
    return _current.set(task)


def leave(token: Token[TaskContext]) -> None:
    """End what `enter` began."""
    _current.reset(token)


@contextmanager
def running(task: TaskContext) -> Generator[None]:
    """Make `task` the current one; for workers, and for tests of functions that call `current()`."""
    token = enter(task)
    try:
        yield
    finally:
        leave(token)
