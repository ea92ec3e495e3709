"""What the contract asks of an event, asked of all events of a frame at one go.

Most frames hold many events of one kind that differ in their ids and arguments only. What
such events must have in common is looked at once, and the rest a column at a time: that takes
a third of the time. It is asked only of frames in canonical form, whose text is sound for that
reason. No answer but yes means anything: whoever gets a no looks at each event by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Final

import msgspec
from msgspec import UNSET

from agentflow import ids
from agentflow.checks import check
from agentflow.events import TaskAssigned, TaskCompleted, TaskSubmitted
from agentflow.limits import INTEGER_MAX

SORTS_MAX: Final = 8
"""Submissions of more sorts than this are looked at one by one."""

_terms: Final = attrgetter(
    *("function", "shell", "cwd", "title", "priority", "timeout_s", "queue_timeout_s", "lock", "notify")
)
_SIMPLE: Final = frozenset({str, int, float, bool, type(None)})
_decode: Final = msgspec.json.Decoder().decode
_encode: Final = msgspec.json.Encoder().encode


def certainly_valid(kind: str, events: Sequence[Any]) -> bool:
    """Whether nothing is wrong with any event of a canonical frame. False says nothing."""
    asked = _ASKED.get(kind)
    return asked is not None and asked(events)


def _submitted(events: Sequence[Any]) -> bool:
    for event in events:
        if event.kwargs or event.argv or event.env or event.needs or event.retry or event.object:
            return False
    sorts = {_terms(event): event for event in events}
    return (
        len(sorts) <= SORTS_MAX
        and ids.are_ids([event.id for event in events])
        and all(check(event) is None for event in sorts.values())
        and _are_simple(chain.from_iterable([event.args for event in events]))
    )


def _assigned(events: Sequence[Any]) -> bool:
    for event in events:
        if event.object or event.inputs or not (event.kwargs is event.argv is event.env is UNSET):
            return False
    args = _canonical([event.args for event in events if event.args is not UNSET])
    return args is not None and set(map(type, args)) <= {list} and _are_simple(chain.from_iterable(args))


def _completed(events: Sequence[Any]) -> bool:
    for event in events:
        if event.object or event.stdout or event.stderr:
            return False
    results = _canonical([event.result for event in events if event.result is not UNSET])
    return results is not None and _are_simple(results)


_ASKED: Final[dict[str, Callable[[Sequence[Any]], bool]]] = {
    TaskSubmitted.kind: _submitted,
    TaskAssigned.kind: _assigned,
    TaskCompleted.kind: _completed,
}


def _canonical(raw: Sequence[Any]) -> list[Any] | None:
    """Values passed on undecoded, decoded; None unless each is canonical text."""
    joined = b"[" + b",".join(raw) + b"]"
    values: list[Any] = _decode(joined)
    return values if _encode(values) == joined else None


def _are_simple(values: Iterable[Any]) -> bool:
    """Whether values of canonical text are numbers in range, text and the like, and none is nested."""
    found = list(values)
    kinds = set(map(type, found))
    if not kinds <= _SIMPLE:
        return False
    numbers = [value for value in found if type(value) is int] if int in kinds else []
    return not numbers or (min(numbers) >= -INTEGER_MAX and max(numbers) <= INTEGER_MAX)
