"""Python values on their way into an event: as JSON will give them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from msgspec import structs

from agentflow import frames
from agentflow.checks import check
from agentflow.errors import InvalidRequest
from agentflow.events import TaskSubmitted, Work
from agentflow.limits import INLINE_BYTES_MAX

if TYPE_CHECKING:
    from agentflow.objects import ObjectStore

W = TypeVar("W", bound=Work)

_PLAIN: Final = frozenset({int, str, bool, float, type(None)})


def as_json(value: Any) -> Any:
    """The value with dataclasses, Structs, sets, dates and the like made of dicts, lists and text.

    Raises InvalidRequest for what JSON cannot carry.
    """
    if type(value) in _PLAIN:
        return value
    try:
        return _lists(msgspec.to_builtins(value, str_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"a {type(value).__qualname__} is given that is no JSON: {error}") from error


def _lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return value


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, as JSON will give them back. Raises InvalidRequest."""
    return [as_json(value) for value in args], {name: as_json(value) for name, value in kwargs.items()}


async def outsourced(work: W, objects: ObjectStore) -> W:
    """The work, with arguments too large for the log put into the object store instead.

    Raises InvalidRequest for arguments that are no JSON.
    """
    if not work.args and not work.kwargs:
        return work
    try:
        if len(frames.encode((work.args, work.kwargs))) <= INLINE_BYTES_MAX:
            return work
        data = frames.encode({"args": work.args, "kwargs": work.kwargs})
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{work.function or 'the task'}: the arguments are no JSON: {error}") from error
    bad = check(work) if isinstance(work, TaskSubmitted) else None
    if bad is not None:
        raise InvalidRequest(f"{bad.reason}: {bad.detail}")
    return structs.replace(work, args=[], kwargs={}, object=await objects.put(data))
