"""Frames: bytes to events and back. The one place where bytes are judged.

A message's data is a frame: a JSON array of events of one kind, or a lone JSON object.
`judge` says what every fold, worker, client and query makes of it. Its verdict is a pure
function of subject, headers and data; it never raises and never depends on who calls.

Two ways lead to the same verdict. What our own nodes and clients write is canonical: it
is what encoding its decoded form gives again. One comparison of bytes then proves that
there are no duplicate keys, no unknown fields, no odd numbers or escapes. Whatever is not
canonical is parsed a second time, strictly, event by event. A property test holds the two
ways against each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agentflow import wire
from agentflow.checks import Bad, check, unsound
from agentflow.events import KINDS, ROLES, Event, Reason, Role
from agentflow.limits import (
    DEPTH_MAX,
    FRAME_BYTES_MAX,
    FRAME_DEPTH_MAX,
    FRAME_EVENTS_MAX,
    ID_LENGTH_MAX,
    LEVEL,
    TEXT_LENGTH_MAX,
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


class TooLarge(ValueError):
    """An event does not fit a frame, even alone."""


_encoder: Final = msgspec.json.Encoder()
encode: Final = _encoder.encode
decode_any: Final = msgspec.json.Decoder().decode
_many: Final = {kind: msgspec.json.Decoder(list[event]) for kind, event in KINDS.items()}  # type: ignore[valid-type]
_one: Final = {kind: msgspec.json.Decoder(event) for kind, event in KINDS.items()}
_DECISION: Final = re.compile(r"(\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,9})")
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_OPENING: Final = frozenset(b"[{")
_NUL_ESCAPE: Final = b"\\u0000"
_ARRAY: Final = ord("[")


def judge(subject: str, data: bytes, headers: Mapping[str, str] | None) -> Judged:
    """What a message says. Never raises."""
    kind, actor, role, bad = _route(subject)
    if bad is not None or role is None:
        return Judged(kind, actor, role, (), bad)
    decision = None
    if headers is not None:
        if headers.get(wire.VERSION, "1") != str(LEVEL):
            detail = f"{wire.VERSION} is {headers[wire.VERSION][:40]!r}; this release reads level {LEVEL}"
            return Judged(kind, actor, role, (), Bad(Reason.UNKNOWN_VERSION, detail))
        decision = _decision(headers.get(wire.DECISION))
    if role is Role.LEADER and decision is None and kind != "leader.elected":
        return Judged(kind, actor, role, (), Bad(Reason.UNFENCED, f"no valid {wire.DECISION} header"))
    items = _canonical(kind, data)
    if items is not None:
        return Judged(kind, actor, role, items, None, decision)
    strict = _strict(kind, data)
    if isinstance(strict, Bad):
        return Judged(kind, actor, role, (), strict)
    return Judged(kind, actor, role, strict, None, decision)


@lru_cache(maxsize=4096)
def _route(subject: str) -> tuple[str, str, Role | None, Bad | None]:
    route = wire.parse_event(subject)
    if route is None:
        return "", "", None, Bad(Reason.BAD_SUBJECT, "expected af.<namespace>.<entity>.<event>.<actor>")
    role = ROLES.get(route.kind)
    if role is None:
        return route.kind, route.actor, None, Bad(Reason.UNKNOWN_KIND, f"no event is called {route.kind[:80]!r}")
    if not wire.is_name(route.actor):
        return route.kind, route.actor, role, Bad(Reason.BAD_SUBJECT, f"the actor is no name: {route.actor[:80]!r}")
    return route.kind, route.actor, role, None


def _decision(header: str | None) -> Decision | None:
    found = _DECISION.fullmatch(header) if header is not None else None
    return Decision(*map(int, found.groups())) if found else None


# The fast way ------------------------------------------------------------------------


def _canonical(kind: str, data: bytes) -> list[Event] | None:
    """The events of a canonical, valid frame; None for anything that wants a closer look."""
    if not data or len(data) > FRAME_BYTES_MAX or _NUL_ESCAPE in data:
        return None
    try:
        if data[0] == _ARRAY:
            events: list[Event] = _many[kind].decode(data)
            same = encode(events) == data
        else:
            events = [_one[kind].decode(data)]
            same = encode(events[0]) == data
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not same or not 0 < len(events) <= FRAME_EVENTS_MAX:
        return None
    for event in events:
        if check(event) is not None or not _raw_is_canonical(event):
            return None
    return events


def _raw_is_canonical(event: Event) -> bool:
    """Fields passed on undecoded have not been compared yet."""
    values = _RAW.get(type(event))
    if values is None:
        return True
    try:
        return all(value is UNSET or _is_canonical(value) for value in values(event))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False


def _is_canonical(raw: Raw | UnsetType) -> bool:
    assert isinstance(raw, Raw)
    value = decode_any(raw)
    return encode(value) == bytes(raw) and unsound(value, DEPTH_MAX - 1) is None


def _assigned_raws(event: Any) -> Iterable[Raw | UnsetType]:
    yield from (event.args, event.kwargs, event.argv, event.env)
    yield from (given.value for given in event.inputs.values())


_RAW: Final[dict[type, Callable[[Any], Iterable[Raw | UnsetType]]]] = {
    KINDS["task.assigned"]: _assigned_raws,
    KINDS["task.completed"]: lambda event: (event.result,),
}


# The strict way ----------------------------------------------------------------------


class _Duplicated(dict[str, Any]):
    """An object in which a key stood twice."""


def _strict(kind: str, data: bytes) -> list[Event | Bad] | Bad:
    if len(data) > FRAME_BYTES_MAX:
        return Bad(Reason.TOO_LARGE, f"{len(data)} bytes; at most {FRAME_BYTES_MAX}")
    depth = nesting(data)
    if depth > FRAME_DEPTH_MAX:
        return Bad(Reason.TOO_DEEP, f"nested {depth} deep; at most {DEPTH_MAX} in an event")
    try:
        value = _parse(data)
    except (ValueError, RecursionError) as error:
        return Bad(Reason.NOT_JSON, _short(error))
    if isinstance(value, dict):
        return [_strict_event(kind, value)]
    if not isinstance(value, list) or not value:
        return Bad(Reason.NOT_A_FRAME, "expected a JSON object or a non-empty array of them")
    if len(value) > FRAME_EVENTS_MAX:
        return Bad(Reason.TOO_LARGE, f"{len(value)} events; at most {FRAME_EVENTS_MAX} in a frame")
    return [_strict_event(kind, item) for item in value]


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


_DIGITS_MAX: Final = 20


def _integer(text: str) -> int | float:
    # An integer too long to be in range is not converted: that is quadratic in its length.
    return int(text) if len(text) <= _DIGITS_MAX else float("inf")


def _strict_event(kind: str, value: Any) -> Event | Bad:
    if not isinstance(value, dict):
        return Bad(Reason.NOT_A_FRAME, f"expected a JSON object, found {type(value).__name__}")
    given = value.get("id")
    shown = given[:ID_LENGTH_MAX] if isinstance(given, str) and _encodable(given) else ""
    reason = unsound(value, DEPTH_MAX, duplicated=_Duplicated)
    if reason is not None:
        return Bad(reason, _EXPLAINED[reason], shown)
    try:
        event = _one[kind].decode(encode(value))
    except (msgspec.MsgspecError, ValueError) as error:
        return Bad(Reason.BAD_TYPE, _short(error), shown)
    bad = check(event)
    return event if bad is None else Bad(bad.reason, bad.detail, shown)


_EXPLAINED: Final = {
    Reason.TOO_DEEP: f"nested deeper than {DEPTH_MAX}",
    Reason.DUPLICATE_KEY: "an object has the same key twice",
    Reason.BAD_NUMBER: "a number is out of range: integers within 64 bits, floats finite",
    Reason.BAD_TEXT: "a string holds U+0000 or a lone surrogate",
}


def _encodable(text: str) -> bool:
    return "\0" not in text and unsound(text, 1) is None


def nesting(data: bytes) -> int:
    """How deep brackets nest in a JSON text, those inside strings left out."""
    deepest = depth = 0
    for byte in _STRING.sub(b"", data).translate(None, _NOT_BRACKETS):
        depth += 1 if byte in _OPENING else -1
        deepest = max(deepest, depth)
    return deepest


def _short(error: BaseException) -> str:
    return str(error).encode("utf-8", "replace").decode("utf-8")[:TEXT_LENGTH_MAX // 8]


# Writing -----------------------------------------------------------------------------


class Filled(NamedTuple):
    """A frame's data and how many events it holds."""

    data: bytes
    count: int


def compose(events: Sequence[Event]) -> list[Filled]:
    """The frames that carry `events`, in order, each as full as the limits allow.

    Raises TooLarge if an event does not fit a frame alone.
    """
    data = encode(events)
    if len(data) <= FRAME_BYTES_MAX and len(events) <= FRAME_EVENTS_MAX:
        return [Filled(data, len(events))] if events else []
    if len(events) == 1:
        raise TooLarge(f"the event takes {len(data)} bytes; at most {FRAME_BYTES_MAX} fit a frame")
    middle = min(len(events) // 2, FRAME_EVENTS_MAX)
    return compose(events[:middle]) + compose(events[middle:])
