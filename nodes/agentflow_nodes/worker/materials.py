"""Materials: what an assignment needs beyond itself, fetched and put in place.

Arguments too large for the fold lie in the submission, those too large for the log in the
object store; results of dependencies lie wherever their outcome put them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agentflow import frames
from agentflow.errors import ObjectMissing, Rejection
from agentflow.events import (
    Input,
    ObjectRef,
    TaskAssigned,
    TaskCompleted,
    TaskSubmitted,
    Work,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.ids import TASK_SEPARATOR
from agentflow.log.port import Log
from agentflow.objects.kept import read_message
from agentflow.objects.port import Objects
from agentflow.references import AT_KEY, RESULT_KEY

_decode: Final = frames.decode_any


class Materials(Struct, frozen=True):
    """What is run, with every value in place."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    argv: Sequence[Any]
    env: Mapping[str, Any]


class BadInput(Rejection):
    """A reference points at nothing."""


def plain(assigned: TaskAssigned) -> bool:
    """Whether everything is in the assignment itself."""
    return not assigned.seq and not assigned.inputs and assigned.object is None


def inline(assigned: TaskAssigned) -> Materials:
    """The materials of a plain assignment."""
    return Materials(
        _decoded(assigned.args, []),
        _decoded(assigned.kwargs, {}),
        _decoded(assigned.argv, []),
        _decoded(assigned.env, {}),
    )


async def gather(log: Log, objects: Objects, assigned: TaskAssigned) -> Materials:
    """Fetch and put in place. Raises ObjectMissing, Disconnected, BadInput."""
    found = inline(assigned)
    if assigned.seq:
        work = await submission(log, assigned.id, assigned.seq, assigned.index, objects)
        found = Materials(work.args, work.kwargs, work.argv, work.env)
    if assigned.object is not None:
        given = _decoded_object(await objects.get(assigned.object), assigned.object)
        if not isinstance(given, dict):
            raise BadInput(f"object {assigned.object.name} holds no arguments")
        found = msgspec.structs.replace(found, args=given.get("args", []), kwargs=given.get("kwargs", {}))
    if not assigned.inputs:
        return found
    results = {task_id: await _result(log, objects, given) for task_id, given in assigned.inputs.items()}
    return Materials(
        _filled(found.args, results),
        _filled(found.kwargs, results),
        _filled(found.argv, results),
        _filled(found.env, results),
    )


def _decoded(raw: Raw | UnsetType, default: Any) -> Any:
    return default if raw is UNSET else _decode(raw)


def _decoded_object(data: bytes, ref: ObjectRef) -> Any:
    try:
        return _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadInput(f"object {ref.name} holds no JSON: {error}") from error


async def _item(log: Log, objects: Objects | None, seq: int, index: int) -> Any:
    message = await (log.read(seq) if objects is None else read_message(log, objects, seq))
    if message is None:
        raise ObjectMissing(f"the log no longer holds position {seq}")
    items = frames.judge(message.subject, message.data, message.headers).items
    if not 0 <= index < len(items):
        raise ObjectMissing(f"the message at {seq} has no event {index}")
    return items[index]


async def submission(log: Log, task_id: str, seq: int, index: int, objects: Objects | None = None) -> Work:
    """What was submitted for a task at a position, or kept of it when that was trimmed.

    Raises ObjectMissing if it is not there.
    """
    item = await _item(log, objects, seq, index)
    if isinstance(item, TaskSubmitted):
        return item
    if isinstance(item, WorkflowSubmitted | WorkflowPart):
        wanted = task_id.rpartition(TASK_SEPARATOR)[2]
        for task in item.tasks:
            if task.task_id == wanted:
                return task
    raise ObjectMissing(f"the submission of {task_id} is not at {seq}, {index}")


async def _result(log: Log, objects: Objects, given: Input) -> Any:
    if given.value is not UNSET:
        return _decode(given.value)
    item = await _item(log, objects, given.seq, given.index)
    if not isinstance(item, TaskCompleted):
        raise ObjectMissing(f"no result lies at {given.seq}, {given.index}")
    if item.object is not None:
        return _decoded_object(await objects.get(item.object), item.object)
    return _decoded(item.result, None)


def _filled(value: Any, results: Mapping[str, Any]) -> Any:
    """The value with every reference replaced by the result it names."""
    if isinstance(value, dict):
        named = value.get(RESULT_KEY)
        if isinstance(named, str) and value.keys() <= {RESULT_KEY, AT_KEY}:
            return _pointed(results[named], value.get(AT_KEY, ""), named)
        return {key: _filled(item, results) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, results) for item in value]
    return value


def _pointed(value: Any, pointer: str, task_id: str) -> Any:
    """The part of a result that a JSON pointer names (RFC 6901)."""
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise BadInput(f"the result of {task_id} has nothing at {pointer!r}") from error
    return value


def as_text(value: Any) -> str:
    """A value as an environment variable or program argument: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else frames.encode(value).decode()
