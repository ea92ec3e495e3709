"""A namespace's state as bytes: equal states give equal bytes, in every process.

Everything that decides what comes next is in it. Left out are indexes: workers a line may
use, lines set aside, timers that no longer count, the bound that spares reading ids; and the
level that a fold may follow, which is not in the log.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
from msgspec import Struct

from agentflow.domain.queue import Line
from agentflow.domain.state import Memory, Namespace, Task, Timer, Worker, Workflow

_INDEXES: Final = {
    "newest",
    "knows",
    "ended",
    "steps",
    "queue",
    "terms",
    "unused_terms",
    "backoffs",
    "deadlines",
    "closed",
    "workers_version",
}


def dump(state: Namespace) -> bytes:
    """The state, as JSON."""
    shown = {name: _plain(value) for name, value in vars(state).items() if name not in _INDEXES}
    shown["queue"] = _queue(state)
    shown["terms"] = [[terms.users, _plain(terms)] for terms in state.terms.values() if terms.users]
    shown["closed"] = _closed(state.closed)
    shown["backoffs"] = _timers(state.backoffs, Task.backs_off_until)
    shown["deadlines"] = _timers(state.deadlines, lambda task, _: task.awaits_first_start)
    return msgspec.json.encode(shown)


def digest(state: Namespace) -> str:
    return hashlib.sha256(dump(state)).hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON, tasks and workers named where they are referred to."""
    match value:
        case dict():
            return [[_plain(key), _entry(item)] for key, item in value.items()]
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted(value)
        case bytes() | msgspec.Raw():
            return bytes(value).decode()
        case Task():
            return f"task {value.id}"
        case Workflow():
            return f"workflow {value.id}"
        case Worker():
            return f"worker {value.name} {value.incarnation}"
        case Line():
            return f"line {value.number}"
        case Struct():
            return _entry(value)
        case _:
            return value


def _entry(value: Any) -> Any:
    """What is kept under a name, field by field."""
    if isinstance(value, Struct):
        return {field: _plain(getattr(value, field)) for field in value.__struct_fields__}
    return _plain(value)


def _queue(state: Namespace) -> Any:
    queue = state.queue
    lines = sorted(queue.all_waiting(), key=lambda line: line.number)
    return [queue.size, queue.tickets, [_line(line) for line in lines]]


def _line(line: Line) -> Any:
    lanes = [[priority, [task.id for task in lane]] for priority, lane in sorted(line.lanes.items())]
    return [line.number, line.suspect, line.size, _entry(line.demand), lanes]


def _timers(timers: list[Timer], counts: Any) -> Any:
    return sorted({(due_ms, order, task.id) for due_ms, order, task in timers if counts(task, due_ms)})


def _closed(memory: Memory) -> Any:
    return {name: _plain(getattr(memory, name)) for name in Memory.__slots__ if name != "oldest"}
