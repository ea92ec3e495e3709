"""References: where a task's arguments name the result of another.

{"$result": "<task_id>"} or {"$result": "<task_id>", "at": "<JSON pointer>"}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from agentflow.events import Work

RESULT_KEY: Final = "$result"
AT_KEY: Final = "at"


def uses(work: Work) -> tuple[str, ...]:
    """Task ids whose results the work's arguments name, in order of appearance."""
    found: dict[str, None] = {}
    for value in (work.args, work.kwargs, work.argv, work.env):
        if value:
            found.update(dict.fromkeys(_references(value)))
    return tuple(found)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        named = value.get(RESULT_KEY)
        if isinstance(named, str) and value.keys() <= {RESULT_KEY, AT_KEY}:
            yield named
            return
        value = value.values()
    elif not isinstance(value, list):
        return
    for item in value:
        yield from _references(item)
