"""Frames: one judge, two ways to one verdict, whoever asks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from agentflow import events, frames, wire
from agentflow.checks import Bad
from agentflow.events import KINDS, ROLES, SINCE, Event, Reason, Role
from agentflow.frames import (
    Decision,
    Judged,
    TooLarge,
    compose,
    encode,
    judge,
    level_headers,
    level_of,
    nesting,
)
from agentflow.limits import (
    DEPTH_MAX,
    FRAME_BYTES_MAX,
    FRAME_DEPTH_MAX,
    FRAME_EVENTS_MAX,
    INPUT_DEPTH_MAX,
    INTEGER_MAX,
)
from tests.unit.histories import History

SUBMITTED: Final = "af.test.task.submitted.cli"
COMPLETED: Final = "af.test.task.completed.w1"
ASSIGNED: Final = "af.test.task.assigned.w1"
DECIDED: Final = {wire.DECISION: "1 1 1 1"}
LEVEL_2: Final = {wire.VERSION: "2"}
GOOD: Final = b'{"id":"a","function":"f"}'


def whole(data: bytes, subject: str = SUBMITTED, headers: Mapping[str, str] | None = None) -> Reason | None:
    bad = judge(subject, data, headers).whole
    return bad.reason if bad else None


def reason(data: bytes, subject: str = SUBMITTED, headers: Mapping[str, str] | None = None) -> Reason | None:
    """Why the only event of a frame is bad."""
    judged = judge(subject, data, headers)
    assert judged.whole is None, judged.whole
    (item,) = judged.items
    return item.reason if isinstance(item, Bad) else None


def arrays(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# What is a frame ---------------------------------------------------------------------


def test_an_array_of_events() -> None:
    judged = judge(SUBMITTED, b'[{"id":"a","function":"f"},{"shell":"true"}]', None)
    assert judged == Judged(
        "task.submitted",
        "cli",
        Role.CLIENT,
        [events.TaskSubmitted(id="a", function="f"), events.TaskSubmitted(shell="true")],
    )


@pytest.mark.parametrize("data", [GOOD, b" " + GOOD, GOOD + b"\n", b"[" + GOOD + b"]"])
def test_a_lone_object_is_a_frame_of_one(data: bytes) -> None:
    assert judge(SUBMITTED, data, {}).items == [events.TaskSubmitted(id="a", function="f")]


def test_unknown_fields_are_ignored() -> None:
    data = b'{"id":"a","function":"f","colour":{"of":["the",1]}}'
    assert judge(SUBMITTED, data, None).items == [events.TaskSubmitted(id="a", function="f")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.NOT_JSON),
        (b"hello", Reason.NOT_JSON),
        (b"{", Reason.NOT_JSON),
        (b'{"shell":"true",}', Reason.NOT_JSON),
        (b"[" + GOOD + b",]", Reason.NOT_JSON),
        (GOOD + GOOD, Reason.NOT_JSON),
        (b"\xef\xbb\xbf" + GOOD, Reason.NOT_JSON),
        (b'{"shell":"\xff"}', Reason.NOT_JSON),
        (b'{"shell":"\xed\xa0\x80"}', Reason.NOT_JSON),
        (b'{"shell":"a\nb"}', Reason.NOT_JSON),
        (b'{"shell":"a\0b"}', Reason.NOT_JSON),
        (b"{'shell':'true'}", Reason.NOT_JSON),
        (b'{"function":"f","args":[NaN]}', Reason.NOT_JSON),
        (b'{"function":"f","args":[-Infinity]}', Reason.NOT_JSON),
        (b'{"function":"f","args":[01]}', Reason.NOT_JSON),
        (b'{"function":"f","args":[+1]}', Reason.NOT_JSON),
        (b'{"function":"f","args":[.5]}', Reason.NOT_JSON),
        (b"[]", Reason.NOT_A_FRAME),
        (b"1", Reason.NOT_A_FRAME),
        (b'"text"', Reason.NOT_A_FRAME),
        (b"null", Reason.NOT_A_FRAME),
        (arrays(FRAME_DEPTH_MAX + 1), Reason.TOO_DEEP),
        (b"[" * 200_000, Reason.TOO_DEEP),
        (b'{"a":' * 80_000, Reason.TOO_DEEP),
        (b" " * (FRAME_BYTES_MAX + 1), Reason.TOO_LARGE),
        (b"[" + b",".join([GOOD] * (FRAME_EVENTS_MAX + 1)) + b"]", Reason.TOO_LARGE),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_frame_is_bad_as_a_whole(data: bytes, expected: Reason) -> None:
    assert whole(data) is expected
    assert judge(SUBMITTED, data, None).items == ()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[1]", Reason.NOT_A_FRAME),
        (b"[[]]", Reason.NOT_A_FRAME),
        (b"[null]", Reason.NOT_A_FRAME),
        (arrays(FRAME_DEPTH_MAX), Reason.NOT_A_FRAME),
        (b'{"id":"a","id":"b","function":"f"}', Reason.DUPLICATE_KEY),
        (b'{"function":"f","kwargs":{"a":1,"a":1}}', Reason.DUPLICATE_KEY),
        (b'{"function":"f","kwargs":{"a":1,"\\u0061":1}}', Reason.DUPLICATE_KEY),
        (b'{"function":"f","nobody":[{"a":1,"a":2}]}', Reason.DUPLICATE_KEY),
        (b'{"function":"f","args":[1e400]}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":[-1e400]}', Reason.BAD_NUMBER),
        (b'{"function":"f","timeout_s":1e400}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":[9223372036854775808]}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":[-9223372036854775808]}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":[18446744073709551616]}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":[' + b"9" * 400_000 + b"]}", Reason.BAD_NUMBER),
        (b'{"function":"f","priority":9223372036854775808}', Reason.BAD_NUMBER),
        (b'{"function":"f","args":["\\ud800"]}', Reason.BAD_TEXT),
        (b'{"function":"f","args":["\\udc00\\ud800"]}', Reason.BAD_TEXT),
        (b'{"function":"f","kwargs":{"\\udfff":1}}', Reason.BAD_TEXT),
        (b'{"shell":"\\u0000"}', Reason.BAD_TEXT),
        (b'{"function":"f","kwargs":{"a\\u0000":1}}', Reason.BAD_TEXT),
        (b'{"function":"f","args":' + arrays(DEPTH_MAX) + b"}", Reason.TOO_DEEP),
        (b'{"function":"f","nobody":' + arrays(DEPTH_MAX) + b"}", Reason.TOO_DEEP),
        (b'{"function":5}', Reason.BAD_TYPE),
        (b'{"function":"f","timeout_s":"5"}', Reason.BAD_TYPE),
        (b'{"function":"f","priority":5.0}', Reason.BAD_TYPE),
        (b'{"function":"f","priority":true}', Reason.BAD_TYPE),
        (b'{"function":"f","args":{}}', Reason.BAD_TYPE),
        (b'{"function":"f","retry":[]}', Reason.BAD_TYPE),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_wrong_with_an_event_is_said_of_the_event(data: bytes, expected: Reason) -> None:
    assert reason(data) is expected


@pytest.mark.parametrize(
    "data",
    [
        b'{"function":"f","args":[9223372036854775807,-9223372036854775807]}',
        b'{"function":"f","args":[1e308,5e-324,1e-400,-0.0,-0,1E5]}',
        b'{"function":"f","args":["\\ud83d\\ude00","\xf0\x9f\x98\x80","\\\\u0000","\xc2\xa0"]}',
        b'{"function":"f","args":' + arrays(DEPTH_MAX - 1) + b"}",
        b'{"function":"f","timeout_s":5}',
        b'{"function":"f","needs":null,"retry":null}',
        b'{"function":"f","args":["[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["]}',
    ],
)
def test_what_is_within_the_limits_is_accepted(data: bytes) -> None:
    assert reason(data) is None


def test_one_bad_among_999_good_ones() -> None:
    items = [b'{"id":"a%d","function":"f"}' % number for number in range(1_000)]
    items[500] = b'{"id":"worst","function":"f","args":["\\ud800"]}'
    judged = judge(SUBMITTED, b"[" + b",".join(items) + b"]", None)
    bad = [(place, item) for place, item in enumerate(judged.items) if isinstance(item, Bad)]
    assert len(judged.items) == 1_000
    assert [(place, item.reason, item.id) for place, item in bad] == [(500, Reason.BAD_TEXT, "worst")]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b'{"id":"mine"}', "mine"),
        (b'{"id":5}', ""),
        (b'{"id":"\\ud800"}', ""),
        (b'{"id":"a\\u0000"}', ""),
        (b'{"id":"%s"}' % (b"x" * 300), "x" * 128),
        (b'{"id":"a.b","function":"f"}', "a.b"),
        (b"[[1]]", ""),
    ],
)
def test_a_refusal_names_the_id_as_far_as_it_can(data: bytes, shown: str) -> None:
    (item,) = judge(SUBMITTED, data, None).items
    assert isinstance(item, Bad)
    assert item.id == shown


def test_a_refusal_of_a_part_names_the_workflow() -> None:
    (item,) = judge("af.test.workflow.part.cli", b'{"workflow":"f","part":-1,"tasks":[]}', None).items
    assert isinstance(item, Bad)
    assert item.id == "f"


# Subjects, versions, decisions ---------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("af.test.task.submitted", Reason.BAD_SUBJECT),
        ("af.test.task.submitted.cli.more", Reason.BAD_SUBJECT),
        ("afq.test.task.submitted.cli", Reason.BAD_SUBJECT),
        ("", Reason.BAD_SUBJECT),
        ("af.test.task.submitted.", Reason.BAD_SUBJECT),
        ("af.test.task.submitted.a b", Reason.BAD_SUBJECT),
        ("af.test.task.submitted." + "x" * 65, Reason.BAD_SUBJECT),
        ("af.test.task.submitted.\udcff", Reason.BAD_SUBJECT),
        ("af.test.task.forgotten.cli", Reason.UNKNOWN_KIND),
        ("af.test.task.Submitted.cli", Reason.UNKNOWN_KIND),
        ("af.test...cli", Reason.UNKNOWN_KIND),
    ],
)
def test_a_bad_subject(subject: str, expected: Reason) -> None:
    judged = judge(subject, GOOD, None)
    assert judged.whole is not None
    assert judged.whole.reason is expected
    assert encode(judged.whole)


UNKNOWN_VERSIONS: Final = ["0", "3", "01", " 1", " 2", "2 ", "x", "", "1" * 5_000, "\udcff"]


@pytest.mark.parametrize("version", UNKNOWN_VERSIONS)
def test_an_unknown_version(version: str) -> None:
    judged = judge(SUBMITTED, GOOD, {wire.VERSION: version})
    assert judged.whole is not None
    assert judged.whole.reason is Reason.UNKNOWN_VERSION
    assert encode(judged.whole)


def test_the_version_is_1_unless_said() -> None:
    assert judge(SUBMITTED, GOOD, {wire.VERSION: "1"}) == judge(SUBMITTED, GOOD, None)
    assert judge(SUBMITTED, GOOD, None).level == 1
    assert judge(SUBMITTED, GOOD, LEVEL_2).level == 2


# Levels --------------------------------------------------------------------------------

ADDED: Final = sorted(kind for kind, since in SINCE.items() if since > 1)


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("headers", [None, {}, {wire.VERSION: "1"}, DECIDED])
@pytest.mark.parametrize("actor", ["x", "a$b"])
def test_a_kind_of_level_2_is_unknown_to_a_message_of_level_1(
    kind: str, headers: dict[str, str] | None, actor: str
) -> None:
    """Exactly as to a release that never heard of it: whoever said it, however badly."""
    judged = judge(wire.event("test", kind, actor), b"not even JSON", headers)
    nobody = judge("af.test.task.unheard_of.x", b"{}", None)
    assert judged.whole is not None
    assert nobody.whole is not None
    assert (judged.role, judged.whole.reason) == (nobody.role, nobody.whole.reason)
    assert judged.whole.reason is Reason.UNKNOWN_KIND
    assert judged.level == 1


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize(
    ("actor", "version", "data", "expected"),
    [
        ("x", "2", b"not JSON", Reason.NOT_JSON),
        ("x", "3", b"{}", Reason.UNKNOWN_VERSION),
        ("a$b", "2", b"{}", Reason.BAD_SUBJECT),
        ("a$b", "3", b"{}", Reason.BAD_SUBJECT),
    ],
)
def test_whatever_is_wrong_with_it_is_said_from_level_2_on(
    kind: str, actor: str, version: str, data: bytes, expected: Reason
) -> None:
    """Marked with the level that knows the kind, so that a fold of level 1 calls it unknown."""
    judged = judge(wire.event("test", kind, actor), data, {wire.VERSION: version})
    assert judged.whole is not None
    assert judged.whole.reason is expected
    assert (judged.level, judged.role) == (2, ROLES[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["1", "2"])
def test_a_bad_actor_of_a_known_kind_is_bad_in_any_version(kind: str, version: str) -> None:
    if SINCE[kind] == 1:
        judged = judge(wire.event("test", kind, "a$b"), b"{}", {wire.VERSION: version})
        assert judged.whole is not None
        assert (judged.whole.reason, judged.level) == (Reason.BAD_SUBJECT, 1)


def test_an_unfenced_message_keeps_its_level() -> None:
    judged = judge(ASSIGNED, b'{"id":"a","attempt":1,"incarnation":1}', LEVEL_2)
    assert judged.whole is not None
    assert (judged.whole.reason, judged.level) == (Reason.UNFENCED, 2)


WORK: Final = b'{"id":"a","function":"f"%s}'
TASK: Final = b'{"tasks":[{"function":"f","task_id":"t"%s}]}'
PART: Final = b'{"workflow":"w","part":0,"tasks":[{"function":"f","task_id":"t"%s}]}'
ASSIGNMENT: Final = b'{"id":"a","attempt":1,"incarnation":1,"function":"f"%s}'
NAMING_LOCKS: Final = [
    (SUBMITTED, WORK),
    ("af.test.workflow.submitted.cli", TASK),
    ("af.test.workflow.part.cli", PART),
    (ASSIGNED, ASSIGNMENT),
]
LOCK_FIELDS: Final = [
    b',"lock":"l"',
    b' , "lock":"l"',
    b',"l\\u006fck":"l"',
    b',"lock":5',
    b',"lock":null',
    b',"lock":["l"]',
    b',"lock":"%s"' % (b"l" * 201),
]


@pytest.mark.parametrize(("subject", "data"), NAMING_LOCKS)
@pytest.mark.parametrize("field", LOCK_FIELDS)
@pytest.mark.parametrize("headers", [DECIDED, DECIDED | {wire.VERSION: "1"}])
def test_level_1_knows_no_lock(subject: str, data: bytes, field: bytes, headers: dict[str, str]) -> None:
    """It is a field like any other that is unknown, whatever it holds."""
    assert judge(subject, data % field, headers) == judge(subject, data % b"", headers)


@pytest.mark.parametrize(("subject", "data"), NAMING_LOCKS)
@pytest.mark.parametrize("field", LOCK_FIELDS[:3])
def test_level_2_knows_it(subject: str, data: bytes, field: bytes) -> None:
    (event,) = judge(subject, data % field, DECIDED | LEVEL_2).items
    assert not isinstance(event, Bad)
    (named,) = getattr(event, "tasks", [event])
    assert named.lock == "l"


@pytest.mark.parametrize(("subject", "data"), NAMING_LOCKS[:3])
@pytest.mark.parametrize("field", LOCK_FIELDS[3:])
def test_level_2_looks_at_it(subject: str, data: bytes, field: bytes) -> None:
    assert reason(data % field, subject, LEVEL_2) in {Reason.BAD_TYPE, Reason.BAD_VALUE}


def test_a_lock_twice_is_bad_even_where_it_is_unknown() -> None:
    assert reason(WORK % b',"lock":"l","lock":"l"') is Reason.DUPLICATE_KEY


@pytest.mark.parametrize("data", [b'{"function":"f","tasks":[{"lock":5},3],"lock":1}', WORK % b',"tasks":7'])
def test_tasks_that_mean_nothing_are_left_alone(data: bytes) -> None:
    assert reason(data) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_written_in_the_level_that_added_its_kind(kind: str) -> None:
    known: dict[str, Any] = {"tasks": [], "lock": "", "name": "l", "policy": events.Policy()}
    made = KINDS[kind]
    required = {field.name for field in msgspec.structs.fields(made) if field.required}
    event = made(
        **{name: known.get(name, 1) for name in made.__struct_fields__ if name in required | {"lock"}}
    )
    assert level_of([event]) == SINCE[kind]
    assert level_headers([event]) == (None if SINCE[kind] == 1 else LEVEL_2)


@pytest.mark.parametrize(
    "said",
    [
        [events.TaskSubmitted(function="f"), events.TaskSubmitted(function="f", lock="l")],
        [events.TaskAssigned(id="a", attempt=1, incarnation=1, lock="l")],
        [events.WorkflowSubmitted(tasks=[events.WorkflowTask(task_id="t", function="f", lock="l")])],
        [
            events.WorkflowPart(
                workflow="w", part=0, tasks=[events.WorkflowTask(task_id="t", shell="true", lock="l")]
            )
        ],
    ],
    ids=lambda said: said[0].kind,
)
def test_and_in_level_2_if_a_lock_is_named(said: list[Event]) -> None:
    assert level_of(said) == 2
    assert level_headers(said) == LEVEL_2
    headers = DECIDED | (level_headers(said) or {})
    assert b'"lock":"l"' in encode(judge(wire.event("n", said[0].kind, "x"), encode(said), headers).items)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "1 1 1",
        "1 1 1 1 1",
        "1  1 1 1",
        "-1 1 1 1",
        "1 1 1 x",
        "1 1 1 1\n",
        "٣ 1 1 1",
        "9" * 19 + " 1 1 1",
    ],
)
def test_a_decision_says_what_it_was_made_of(header: str | None) -> None:
    headers = {} if header is None else {wire.DECISION: header}
    data = b'{"id":"a"}'
    assert whole(data, "af.test.task.timed_out.m1", headers) is Reason.UNFENCED


def test_a_decision_is_read() -> None:
    known = Decision(3, 120, 1_700_000_000_000, 2)
    judged = judge("af.test.task.timed_out.m1", b'[{"id":"a"}]', {wire.DECISION: known.header()})
    assert judged.decision == known


def test_an_election_decides_on_nothing() -> None:
    assert whole(encode([events.LeaderElected(epoch=1, master="m1")]), wire.elected("test")) is None


@pytest.mark.parametrize("kind", [kind for kind, role in ROLES.items() if role is Role.LEADER])
def test_only_an_election_comes_without_a_decision(kind: str) -> None:
    expected = None if kind == "leader.elected" else Reason.UNFENCED
    assert whole(b"[{}]", wire.event("test", kind, "m1")) is expected


def test_an_acknowledgement_made_to_land_on_the_subject_of_elections_is_no_election() -> None:
    data = b'{"stream":"AF_test","seq":12,"domain":"hub"}'
    assert reason(data, wire.elected("test")) is Reason.BAD_TYPE


# Both ways lead to the same verdict ----------------------------------------------------

SCALARS: Final = (
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.sampled_from([INTEGER_MAX, INTEGER_MAX + 1, -INTEGER_MAX, -INTEGER_MAX - 1])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\0", max_size=2), inner, max_size=3)
    ),
)
DEEP: Final = st.builds(lambda depth: json.loads(arrays(depth)), st.integers(26, 34))
ANY: Final = VALUES | DEEP
INTEGERS: Final = st.integers(-(2**64), 2**64) | st.integers(-2, 1_200)
TEXTS: Final = st.sampled_from(
    ["", "a", "at-1-0", "f/a", "a.b", "x" * 200, "x" * 5_000, "\0", "é", "high", "Ä" * 65]
)
RAWS: Final = ANY.map(lambda value: Raw(encode(value))) | st.sampled_from(
    [Raw(b" 1"), Raw(b'{"a":1,"a":2}'), Raw(b"1.0e5")]
)
OBJECTS: Final = st.builds(
    events.ObjectRef, name=TEXTS, size=INTEGERS, sha256=st.sampled_from(["0" * 64, "x"])
)
FIELDS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "argv": st.lists(ANY, max_size=2),
    "args": st.lists(ANY, max_size=2),
    "kwargs": st.dictionaries(TEXTS, ANY, max_size=2),
    "env": st.dictionaries(TEXTS, ANY, max_size=2),
    "object": st.none() | OBJECTS,
    "needs": st.none() | st.builds(events.Needs, cpu=st.floats(-1, 1e10), memory_mb=INTEGERS, group=TEXTS),
    "retry": st.none() | st.builds(events.Retry, max_attempts=INTEGERS, backoff_s=st.floats(-1, 1e9)),
    "priority": INTEGERS | TEXTS,
    "tasks": st.lists(
        st.builds(
            events.WorkflowTask, task_id=TEXTS, function=TEXTS, lock=TEXTS, args=st.lists(ANY, max_size=1)
        ),
        max_size=2,
    ),
    "policy": st.builds(
        events.Policy,
        version=INTEGERS,
        strategy=TEXTS,
        losses_max=INTEGERS,
        ageing_per_s=st.floats(-1, 1e300),
    ),
    "inputs": st.dictionaries(TEXTS, st.builds(events.Input, value=RAWS), max_size=2),
    "labels": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "mode": st.sampled_from(["exclusive", "shared", "semaphore", "none"]),
    "lock": TEXTS,
    "functions": st.lists(TEXTS, max_size=2),
    "non_retryable": st.lists(TEXTS, max_size=2),
    "result": RAWS,
}
_RAW_FIELDS: Final = {"args", "kwargs", "argv", "env"}


def values_of(kind: str, field: str, annotation: Any) -> st.SearchStrategy[Any]:
    if kind == "task.assigned" and field in _RAW_FIELDS:
        return RAWS
    if field in FIELDS:
        return FIELDS[field]
    return {"bool": st.booleans(), "float": st.floats(-1, 1e9)}.get(
        str(annotation), INTEGERS if "Integer" in str(annotation) else TEXTS
    )


@st.composite
def any_events(draw: st.DrawFn, kind: str) -> Event:
    """Events of the right types, whether or not they keep the limits."""
    made = KINDS[kind]
    fields = {
        field: annotation
        for base in reversed(made.__mro__)
        for field, annotation in getattr(base, "__annotations__", {}).items()
        if field in made.__struct_fields__
    }
    required = [field.name for field in msgspec.structs.fields(made) if field.required]
    chosen = {*required, *draw(st.lists(st.sampled_from(sorted(fields)), max_size=4))}
    return made(**{field: draw(values_of(kind, field, fields[field])) for field in sorted(chosen)})


def strict_alone(kind: str, data: bytes) -> Any:
    return frames._strict(kind, data, no_lock=False)


def fast_alone(kind: str, data: bytes) -> Any:
    return frames._canonical(kind, data)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_what_the_fast_way_accepts_the_strict_way_reads_alike(kind: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(any_events(kind), min_size=1, max_size=3))
    written = encode(said) if data.draw(st.booleans()) else encode(said[0])
    fast = fast_alone(kind, written)
    if fast is not None:
        assert encode(strict_alone(kind, written)) == encode(fast)
        assert strict_alone(kind, written) == fast or kind in {"task.assigned", "task.completed"}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_how_a_frame_is_written_makes_no_difference_in_any_level(kind: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(any_events(kind), min_size=1, max_size=3))
    written = encode(said)
    for headers in (DECIDED, DECIDED | LEVEL_2):
        fast = judge(wire.event("n", kind, "x"), written, headers)
        slow = judge(wire.event("n", kind, "x"), written + b" ", headers)
        assert (slow.whole, slow.level, slow.role) == (fast.whole, fast.level, fast.role)
        assert encode(slow.items) == encode(fast.items)


def test_what_is_canonical_takes_the_fast_way() -> None:
    for message in History(5).run(200):
        judged = judge(message.subject, message.data, message.headers)
        if judged.whole is None and not any(isinstance(item, Bad) for item in judged.items):
            assert encode(judged.items) == message.data or strict_alone(judged.kind, message.data)
            assert fast_alone(judged.kind, encode(judged.items)) is not None


def respelled(data: bytes, spell: Callable[[Any], Any]) -> bytes:
    """The same JSON in another spelling."""
    value = spell(json.loads(data))
    return json.dumps(value, indent=1, ensure_ascii=True).encode()


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(item) for key, item in reversed(value.items())}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(3))
def test_spelling_does_not_change_the_verdict(seed: int) -> None:
    history = History(seed)
    history.say_nonsense = history.garble = seed == 2
    for message in history.run(100):
        judged = judge(message.subject, message.data, message.headers)
        if judged.whole is None:
            other = respelled(message.data, reversed_keys)
            again = judge(message.subject, other, message.headers)
            assert [type(item) for item in again.items] == [type(item) for item in judged.items]
            assert reasons(again) == reasons(judged)
            assert sorted_json(again) == sorted_json(judged)


def reasons(judged: Judged) -> list[Reason | None]:
    return [item.reason if isinstance(item, Bad) else None for item in judged.items]


def sorted_json(judged: Judged) -> Any:
    return [json.loads(encode(item)) for item in judged.items if not isinstance(item, Bad)]


def called(depth: int, call: Callable[[], Any]) -> Any:
    return call() if depth == 0 else called(depth - 1, call)


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        b'{"function":"f","args":' + arrays(DEPTH_MAX - 1) + b" }",
        b'{"function":"f","args":' + arrays(DEPTH_MAX) + b"}",
        b'{"function":"f","args":' + arrays(FRAME_DEPTH_MAX - 1) + b"}",
        b'{"function":"f","args":' + arrays(FRAME_DEPTH_MAX) + b"}",
        arrays(500),
        arrays(5_000),
        b"[" * 900,
    ],
    ids=lambda data: f"{data[:12]!r} {len(data)}",
)
@pytest.mark.parametrize("depth", [1, 100, 400, 600])
def test_the_verdict_does_not_depend_on_how_deep_the_caller_is(data: bytes, depth: int) -> None:
    here = judge(SUBMITTED, data, None)
    assert called(depth, lambda: judge(SUBMITTED, data, None)) == here


@pytest.mark.parametrize("depth", [DEPTH_MAX - 1, DEPTH_MAX, FRAME_DEPTH_MAX + 10])
@pytest.mark.parametrize("field", ["args", "result"])
def test_a_caller_at_the_end_of_the_stack_gets_the_same_verdict_or_none(depth: int, field: str) -> None:
    subject = COMPLETED if field == "result" else SUBMITTED
    data = b'{"id":"a","attempt":1,"incarnation":1,"function":"f","%s":%s}' % (field.encode(), arrays(depth))
    here = judge(subject, data, None)
    for left in range(5, 300, 7):
        try:
            there = called(sys.getrecursionlimit() - left - 60, lambda: judge(subject, data, None))
        except RecursionError:
            continue
        assert encode(there.items) == encode(here.items)
        assert there.whole == here.whole


@pytest.mark.parametrize("depth", range(INPUT_DEPTH_MAX - 1, DEPTH_MAX + 2))
@pytest.mark.parametrize("space", [b"", b" "])
def test_how_deep_what_is_passed_on_may_be(depth: int, space: bytes) -> None:
    begin = b'[{"id":"a","attempt":1,"incarnation":1,'
    as_input = begin + b'"inputs":{"x":{"value":%s}}%s}]' % (arrays(depth), space)
    as_args = begin + b'"args":%s%s}]' % (arrays(depth), space)
    as_result = begin + b'"result":%s%s}]' % (arrays(depth), space)
    assert reason(as_input, ASSIGNED, DECIDED) is (None if depth <= INPUT_DEPTH_MAX else Reason.TOO_DEEP)
    assert reason(as_args, ASSIGNED, DECIDED) is (None if depth < DEPTH_MAX else Reason.TOO_DEEP)
    assert reason(as_result, COMPLETED) is (None if depth < DEPTH_MAX else Reason.TOO_DEEP)


@pytest.mark.parametrize("number", [INTEGER_MAX + 1, -INTEGER_MAX - 1, 2**64, 10**30])
@pytest.mark.parametrize("space", [b"", b" "])
def test_integers_of_typed_fields_have_the_same_limit(number: int, space: bytes) -> None:
    data = b'[{"id":"a","attempt":%d,"incarnation":1%s}]' % (number, space)
    assert reason(data, COMPLETED) is Reason.BAD_NUMBER


# Fuzz ------------------------------------------------------------------------------------


def is_sound(judged: Judged) -> bool:
    """Whatever the verdict, it can be written down, and it is one or the other."""
    assert (judged.whole is None) or not judged.items
    assert encode(judged.whole) if judged.whole else True
    return all(encode(item) for item in judged.items)


@given(
    data=st.binary(max_size=60),
    subject=st.sampled_from([*(wire.event("n", kind, "x") for kind in KINDS), wire.elected("n")])
    | st.text(max_size=20),
    headers=st.none() | st.dictionaries(st.sampled_from([wire.VERSION, wire.DECISION]), st.text(max_size=9)),
)
@settings(max_examples=300, deadline=None)
def test_random_bytes(data: bytes, subject: str, headers: dict[str, str] | None) -> None:
    assert is_sound(judge(subject, data, headers))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A frame with something inserted, left out or repeated."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    data = bytearray(encode(draw(st.lists(any_events(kind), min_size=1, max_size=2))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 6)))
        piece = draw(
            st.sampled_from(
                [b"", b'"', b"\\", b"[", b"{", b"}", b",", b"NaN", b"1e999", b"\\ud800", b"\xc3", b"\0"]
            )
            | st.just(bytes(data[start:end]) * 2)
        )
        data[start:end] = piece
    return kind, bytes(data)


@given(found=mutated())
@settings(max_examples=300, deadline=None)
def test_mutated_frames(found: tuple[str, bytes]) -> None:
    kind, data = found
    judged = judge(wire.event("n", kind, "x"), data, DECIDED | LEVEL_2)
    assert is_sound(judged)
    strict = strict_alone(kind, data)
    if isinstance(strict, Bad):
        assert judged.whole == strict
    else:
        assert encode(judged.items) == encode(strict)


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b'\\"' * 250_000,
        b"\\" * 500_000,
        b'"' * 500_000,
        b"[" + b'"\\' * 200_000,
        b"]" * 500_000,
        b"[" + b"0." + b"0" * 500_000 + b"1]",
        b"[" + b"9" * 500_000 + b"]",
        b"[" + b"[]," * 170_000 + b"[]]",
        b'{"a":1,' * 70_000,
    ],
    ids=lambda data: f"{data[:6]!r} {len(data)}",
)
@pytest.mark.timeout(5)
def test_no_half_megabyte_takes_long(data: bytes) -> None:
    judged = judge(SUBMITTED, data, None)
    assert is_sound(judged)
    assert all(isinstance(item, Bad) for item in judged.items)


# Depth and writing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"1", 0),
        (b"[]", 1),
        (b'{"a":[1,{}]}', 3),
        (b'["[[[["]', 1),
        (b'["\\"[[[["]', 1),
        (b'["\\\\",[]]', 2),
        (b"[],[[]]", 2),
        (b'["open [[[[', 1),
    ],
)
def test_nesting(data: bytes, expected: int) -> None:
    assert nesting(data) == expected


@given(value=VALUES | DEEP)
def test_nesting_is_that_of_the_parsed_value(value: Any) -> None:
    assert nesting(encode(value)) == depth_of(value)


def depth_of(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth_of, items), default=0)


def test_composed_frames_hold_the_events_in_order() -> None:
    said: list[Event] = [
        events.TaskSubmitted(id=f"a{number}", shell="x" * (1 + number % 900)) for number in range(12_345)
    ]
    filled = compose(said)
    read = [item for data, _ in filled for item in judge(SUBMITTED, data, None).items]
    assert read == said
    assert all(len(data) <= FRAME_BYTES_MAX and length <= FRAME_EVENTS_MAX for data, length in filled)
    assert sum(length for _, length in filled) == len(said)
    assert len(filled) < 40


def test_nothing_composes_to_nothing() -> None:
    assert compose([]) == []


def test_an_event_too_large_for_a_frame_is_refused() -> None:
    with pytest.raises(TooLarge, match="at most 524288"):
        compose([events.TaskSubmitted(shell="true"), events.TaskSubmitted(shell="x" * FRAME_BYTES_MAX)])
