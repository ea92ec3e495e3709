"""A call of a task's function, and what becomes of it wherever it runs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from agentflow.context import TaskContext, enter, leave, running
from agentflow_nodes.worker.outcome import Outcome, completed, failed


class Call(msgspec.Struct, frozen=True):
    """A function and all it takes to run it anywhere."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    task: TaskContext | None
    non_retryable: tuple[str, ...]


def judge(call: Call) -> Outcome:
    """Run the call in this thread and say how it ended."""
    try:
        with _as_task(call.task):
            value = call.function(*call.args, **call.kwargs)
            return completed(asyncio.run(value) if inspect.iscoroutine(value) else value)
    except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome, SystemExit too
        return failed(_without_our_frame(error), call.non_retryable)


async def judge_async(call: Call) -> Outcome:
    """Run the call in this task and say how it ended; only a cancellation from outside is raised."""
    token = None if call.task is None else enter(call.task)
    try:
        value = call.function(*call.args, **call.kwargs)
        return completed(await value if inspect.isawaitable(value) else value)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return failed(_without_our_frame(error), call.non_retryable)
    except BaseException as error:  # noqa: BLE001 - a SystemExit that reaches the loop would end the worker
        return failed(_without_our_frame(error), call.non_retryable)
    finally:
        if token is not None:
            leave(token)


def _as_task(task: TaskContext | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if task is None else running(task)


def _without_our_frame(error: BaseException) -> BaseException:
    trace = error.__traceback__
    return error if trace is None else error.with_traceback(trace.tb_next)


def settle(over: asyncio.Future[Outcome], outcome: Outcome) -> None:
    """The first outcome counts."""
    if not over.done():
        over.set_result(outcome)
