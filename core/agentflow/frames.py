"""Frames: bytes to events and back. The one place where bytes are judged.

A message's data is a frame: a JSON array of events of one kind, or a lone JSON object.
`judge` says what every fold, worker, client and query makes of it. Its verdict is a pure
function of subject, headers and data; it does not raise and does not depend on who calls.
(Should a caller leave less of Python's stack than parsing takes, about 200 calls, the
RecursionError is the caller's: a wrong verdict would be worse.)

Two ways lead to the same verdict. What our own nodes and clients write is canonical: it
is what encoding its decoded form gives again. One comparison of bytes then proves that
there are no duplicate keys, no unknown fields, no odd numbers or escapes. Whatever is not
canonical is parsed a second time, strictly, event by event. A property test holds the two
ways against each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
from msgspec import UNSET, Raw, Struct
from msgspec.structs import replace

from agentflow import wire
from agentflow.bulk import certainly_valid
from agentflow.checks import Bad, check, unsound
from agentflow.events import KINDS, ROLES, SINCE, Event, Reason, Role, WorkflowPart, WorkflowSubmitted
from agentflow.limits import (
    DEPTH_MAX,
    FRAME_BYTES_MAX,
    FRAME_DEPTH_MAX,
    FRAME_EVENTS_MAX,
    ID_LENGTH_MAX,
    INPUT_DEPTH_MAX,
    LEVEL,
    LEVEL_FIRST,
)


class Decision(Struct, frozen=True, gc=False):
    """What a leader knew when it decided: the header `Af-Decision`."""

    epoch: int
    basis: int
    """Sequence up to which it had folded."""
    now_ms: int
    """Log time it planned for."""
    policy: int
    """Version of the policy."""

    def header(self) -> str:
        """The header's value."""
        return f"{self.epoch} {self.basis} {self.now_ms} {self.policy}"


class Judged(Struct, frozen=True, gc=False):
    """What one message says."""

    kind: str
    actor: str
    role: Role | None
    """Who may say it; None if the kind is unknown."""
    items: Sequence[Event | Bad]
    """The events, or what is wrong with one, by index."""
    whole: Bad | None = None
    """What is wrong with the message as a whole; `items` is empty then."""
    decision: Decision | None = None
    level: int = LEVEL_FIRST
    """The contract level it is written in."""


class TooLarge(ValueError):
    """An event does not fit a frame, even alone."""


_encoder: Final = msgspec.json.Encoder()
encode: Final = _encoder.encode
decode_any: Final = msgspec.json.Decoder().decode


@cache
def _many(kind: str) -> msgspec.json.Decoder[list[Event]]:
    """Decodes an array of events of a kind. Made when first needed: there are many kinds."""
    return msgspec.json.Decoder(list[KINDS[kind]])  # type: ignore[valid-type]


@cache
def _one(kind: str) -> msgspec.json.Decoder[Event]:
    """Decodes one event of a kind."""
    return msgspec.json.Decoder(KINDS[kind])


_DECISION: Final = re.compile(r"([0-9]{1,18}) ([0-9]{1,18}) ([0-9]{1,18}) ([0-9]{1,9})")
# It matches from any quote on, to the end if need be: one that could fail would be tried
# again from every later quote.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_OPENING: Final = frozenset(b"[{")
_NUL_ESCAPE: Final = b"\\u0000"
_ARRAY: Final = ord("[")
_DIGITS_MAX: Final = 20
_DETAIL_LENGTH_MAX: Final = 500


def judge(subject: str, data: bytes, headers: Mapping[str, str] | None, *, canonical: bool = False) -> Judged:
    """What a message says. `canonical`: `is_canonical` said so, and it need not be looked at again."""
    kind, actor, role, bad = _route(subject)
    if role is None:
        return Judged(kind, actor, role, (), bad)
    since = SINCE[kind]
    version = headers.get(wire.VERSION) if headers is not None else None
    level = LEVEL_FIRST if version is None else _LEVELS.get(version)
    if level is not None and since > level:
        return Judged(kind, actor, None, (), unknown_kind(kind))
    if bad is not None:
        return Judged(kind, actor, role, (), bad, None, since)
    if level is None:
        detail = f"{wire.VERSION} is {str(version)[:40]!r}; this release reads 1 to {LEVEL}"
        return Judged(kind, actor, role, (), Bad(Reason.UNKNOWN_VERSION, detail), None, since)
    decision = _decision(headers.get(wire.DECISION)) if headers is not None else None
    if role is Role.LEADER and decision is None and kind != "leader.elected":
        unfenced = Bad(Reason.UNFENCED, f"no valid {wire.DECISION} header")
        return Judged(kind, actor, role, (), unfenced, None, level)
    items = _items(kind, data, level, canonical=canonical)
    if isinstance(items, Bad):
        return Judged(kind, actor, role, (), items, None, level)
    return Judged(kind, actor, role, items, None, decision, level)


_LEVELS: Final = {str(level): level for level in range(LEVEL_FIRST, LEVEL + 1)}


def _items(kind: str, data: bytes, level: int, *, canonical: bool) -> Sequence[Event | Bad] | Bad:
    """The events of a frame, or what is wrong with each, or with all of it."""
    no_lock = level == LEVEL_FIRST and kind in _NAME_LOCKS
    events = _decoded(kind, data) if canonical else _canonical(kind, data)
    if events is None:
        return _strict(kind, data, no_lock=no_lock)
    return [_without_lock(event) for event in events] if no_lock and b'"lock"' in data else events


_NAME_LOCKS: Final = frozenset({"task.submitted", "task.assigned", "workflow.submitted", "workflow.part"})
"""Kinds to which level 2 added `lock`; in a message of level 1 it is as unknown as any other field."""


def _without_lock(event: Any) -> Any:
    if isinstance(event, WorkflowSubmitted | WorkflowPart):
        return replace(event, tasks=[_without_lock(task) for task in event.tasks])
    return replace(event, lock="") if event.lock else event


def unknown_kind(kind: str) -> Bad:
    """What is wrong with a message of a kind that its level does not know."""
    return Bad(Reason.UNKNOWN_KIND, f"no event is called {kind[:80]!r}")


@lru_cache(maxsize=4096)
def _route(subject: str) -> tuple[str, str, Role | None, Bad | None]:
    route = wire.parse_event(subject)
    if route is None:
        return "", "", None, Bad(Reason.BAD_SUBJECT, "expected af.<namespace>.<entity>.<event>.<actor>")
    role = ROLES.get(route.kind)
    if role is None:
        return (
            route.kind,
            route.actor,
            None,
            unknown_kind(route.kind),
        )
    if not wire.is_name(route.actor):
        return route.kind, "", role, Bad(Reason.BAD_SUBJECT, f"the actor is no name: {route.actor[:80]!r}")
    return route.kind, route.actor, role, None


def _decision(header: str | None) -> Decision | None:
    found = _DECISION.fullmatch(header) if header is not None else None
    return Decision(*map(int, found.groups())) if found else None


# The fast way ------------------------------------------------------------------------


def is_canonical(subject: str, data: bytes) -> bool:
    """Whether a message holds a canonical, valid frame: `judge` may be told so, and only decodes it then."""
    kind, _, role, _ = _route(subject)
    return role is not None and _canonical(kind, data) is not None


def _decoded(kind: str, data: bytes) -> list[Event]:
    return _many(kind).decode(data) if data[0] == _ARRAY else [_one(kind).decode(data)]


def _canonical(kind: str, data: bytes) -> list[Event] | None:
    """The events of a canonical, valid frame; None for anything that wants a closer look."""
    if not data or len(data) > FRAME_BYTES_MAX or _NUL_ESCAPE in data:
        return None
    try:
        if data[0] == _ARRAY:
            events: list[Event] = _many(kind).decode(data)
            same = encode(events) == data
        else:
            events = [_one(kind).decode(data)]
            same = encode(events[0]) == data
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not same or not 0 < len(events) <= FRAME_EVENTS_MAX:
        return None
    if len(events) > 1 and certainly_valid(kind, events):
        return events
    raw_is_canonical = _RAW_IS_CANONICAL.get(kind)
    for event in events:
        if check(event) is not None or (raw_is_canonical is not None and not raw_is_canonical(event)):
            return None
    return events


def _assigned_is_canonical(event: Any) -> bool:
    for raw in (event.args, event.kwargs, event.argv, event.env):
        if raw is not UNSET and not _is_canonical(raw, DEPTH_MAX - 1):
            return False
    inputs = event.inputs
    return not inputs or all(
        given.value is UNSET or _is_canonical(given.value, INPUT_DEPTH_MAX) for given in inputs.values()
    )


def _completed_is_canonical(event: Any) -> bool:
    return event.result is UNSET or _is_canonical(event.result, DEPTH_MAX - 1)


def _is_canonical(raw: Raw, room: int) -> bool:
    try:
        value = decode_any(raw)
        return encode(value) == bytes(raw) and unsound(value, room) is None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


_RAW_IS_CANONICAL: Final[dict[str, Callable[[Any], bool]]] = {
    "task.assigned": _assigned_is_canonical,
    "task.completed": _completed_is_canonical,
}
"""Fields passed on undecoded have not been compared by encoding the event."""


# The strict way ----------------------------------------------------------------------


class _Duplicated(dict[str, Any]):
    """An object in which a key stood twice."""


def _strict(kind: str, data: bytes, *, no_lock: bool) -> list[Event | Bad] | Bad:
    if len(data) > FRAME_BYTES_MAX:
        return Bad(Reason.TOO_LARGE, f"{len(data)} bytes; at most {FRAME_BYTES_MAX}")
    depth = nesting(data)
    if depth > FRAME_DEPTH_MAX:
        return Bad(Reason.TOO_DEEP, f"nested {depth} deep; at most {DEPTH_MAX} in an event")
    try:
        value = _parse(data)
    except ValueError as error:
        return Bad(Reason.NOT_JSON, _short(error))
    if isinstance(value, dict):
        return [_strict_event(kind, value, no_lock=no_lock)]
    if not isinstance(value, list) or not value:
        return Bad(Reason.NOT_A_FRAME, "expected a JSON object or a non-empty array of them")
    if len(value) > FRAME_EVENTS_MAX:
        return Bad(Reason.TOO_LARGE, f"{len(value)} events; at most {FRAME_EVENTS_MAX} in a frame")
    return [_strict_event(kind, item, no_lock=no_lock) for item in value]


def _parse(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=_refuse_constant,
        parse_int=_integer,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Duplicated(found)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int | float:
    # An integer too long to be in range is not converted: that is quadratic in its length.
    return int(text) if len(text) <= _DIGITS_MAX else float("inf")


def _strict_event(kind: str, value: Any, *, no_lock: bool) -> Event | Bad:
    if not isinstance(value, dict):
        return Bad(Reason.NOT_A_FRAME, f"expected a JSON object, found {type(value).__name__}")
    shown = _shown_id(value)
    reason = unsound(value, DEPTH_MAX, duplicated=_Duplicated)
    if reason is not None:
        return Bad(reason, _EXPLAINED[reason], shown)
    if no_lock:
        _drop_lock(value)
    try:
        event = _one(kind).decode(encode(value))
    except (msgspec.MsgspecError, ValueError) as error:
        return Bad(Reason.BAD_TYPE, _short(error), shown)
    bad = check(event)
    return event if bad is None else Bad(bad.reason, bad.detail, shown)


def _drop_lock(value: dict[str, Any]) -> None:
    """Leave out a field that the message's level does not know, whatever it holds."""
    value.pop("lock", None)
    tasks = value.get("tasks")
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, dict):
            task.pop("lock", None)


_EXPLAINED: Final = {
    Reason.TOO_DEEP: f"nested deeper than {DEPTH_MAX}",
    Reason.DUPLICATE_KEY: "an object has the same key twice",
    Reason.BAD_NUMBER: "a number is out of range: integers within 64 bits, floats finite",
    Reason.BAD_TEXT: "a string holds U+0000 or a lone surrogate",
}


def _shown_id(value: dict[str, Any]) -> str:
    """The id an event gives, if it can be repeated in an answer."""
    given = value.get("id", value.get("workflow"))
    return given[:ID_LENGTH_MAX] if isinstance(given, str) and unsound(given, 0) is None else ""


def nesting(data: bytes) -> int:
    """How deep brackets nest in a JSON text, those inside strings left out."""
    deepest = depth = 0
    for byte in _STRING.sub(b"", data).translate(None, _NOT_BRACKETS):
        depth += 1 if byte in _OPENING else -1
        deepest = max(deepest, depth)
    return deepest


def _short(error: BaseException) -> str:
    return str(error).encode("utf-8", "replace").decode("utf-8")[:_DETAIL_LENGTH_MAX]


# Writing -----------------------------------------------------------------------------


class Filled(NamedTuple):
    """A frame's data and how many events it holds."""

    data: bytes
    length: int


FIXED_LEVELS: Final = {kind: level for kind, level in SINCE.items() if kind not in _NAME_LOCKS}
"""The level of kinds that need the same whatever they say."""


def level_of(events: Sequence[Event]) -> int:
    """The contract level a frame of these events, which are of one kind, must be written in."""
    kind = events[0].kind
    if kind in _NAME_LOCKS and any(map(_names_lock, events)):
        return 2
    return SINCE[kind]


def _names_lock(event: Any) -> bool:
    tasks = getattr(event, "tasks", None)
    return bool(event.lock) if tasks is None else any(task.lock for task in tasks)


def level_headers(events: Sequence[Event]) -> dict[str, str] | None:
    """The header that names the level of a frame, if it needs one."""
    level = level_of(events)
    return None if level == LEVEL_FIRST else {wire.VERSION: str(level)}


def compose(events: Sequence[Event]) -> list[Filled]:
    """The frames that carry `events`, in order, within the limits.

    Raises TooLarge if an event does not fit a frame alone.
    """
    starts = range(0, len(events), FRAME_EVENTS_MAX)
    return [frame for start in starts for frame in _fill(events[start : start + FRAME_EVENTS_MAX])]


def _fill(events: Sequence[Event]) -> list[Filled]:
    data = encode(events)
    if len(data) <= FRAME_BYTES_MAX:
        return [Filled(data, len(events))]
    if len(events) == 1:
        raise TooLarge(f"the event takes {len(data)} bytes; at most {FRAME_BYTES_MAX} fit a frame")
    middle = len(events) // 2
    return _fill(events[:middle]) + _fill(events[middle:])
