"""What the contract asks of an event beyond its types, limit by limit."""

from __future__ import annotations

from typing import Any, Final

import pytest

from agentflow import events
from agentflow.checks import check, priority_of, unsound
from agentflow.events import Event, Reason
from agentflow.limits import (
    ATTEMPTS_MAX,
    FUNCTIONS_MAX,
    INTEGER_MAX,
    LABELS_MAX,
    LOCK_NAME_LENGTH_MAX,
    NON_RETRYABLE_MAX,
    PERMITS_MAX,
    PRIORITIES,
    SCRIPT_LENGTH_MAX,
    SECONDS_MAX,
    TAIL_LENGTH_MAX,
    TEXT_LENGTH_MAX,
    WORKFLOW_PARTS_MAX,
)

LONG: Final = "x" * (TEXT_LENGTH_MAX + 1)
TAIL: Final = "x" * (TAIL_LENGTH_MAX + 1)
REF: Final = events.ObjectRef(name="blob", size=1, sha256="0" * 64)


def reason(event: Event) -> Reason | None:
    bad = check(event)
    return bad.reason if bad else None


def with_work(terms: dict[str, Any]) -> dict[str, Any]:
    return terms if terms.keys() & {"function", "shell", "argv"} else {"function": "f", **terms}


def submitted(**terms: Any) -> events.TaskSubmitted:
    return events.TaskSubmitted(**with_work(terms))


def flow(**terms: Any) -> events.WorkflowSubmitted:
    known: dict[str, Any] = {"task_id": "a"}
    return events.WorkflowSubmitted(tasks=[events.WorkflowTask(**(known | with_work(terms)))])


def joined(**terms: Any) -> events.WorkerJoined:
    known: dict[str, Any] = {"instance": "i", "slots": 1}
    return events.WorkerJoined(**(known | terms))


def acquired(**terms: Any) -> events.LockAcquired:
    known: dict[str, Any] = {"name": "l", "token": 1, "holder": "h"}
    return events.LockAcquired(**(known | terms))


NAME: Final = "x" * LOCK_NAME_LENGTH_MAX


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


GOOD: Final[list[Event]] = [
    submitted(),
    submitted(id="a", notify="token", title="t" * TEXT_LENGTH_MAX),
    submitted(shell="s" * SCRIPT_LENGTH_MAX, env={"A": 1}, cwd="/tmp"),
    submitted(argv=["true", {"$result": "a"}]),
    submitted(args=nested(30), kwargs={"a": nested(29)}),
    submitted(priority=0),
    submitted(priority=1000),
    submitted(priority="urgent"),
    submitted(timeout_s=SECONDS_MAX, queue_timeout_s=SECONDS_MAX),
    submitted(needs=events.Needs(cpu=0.5, memory_mb=1, gpus=1, group="g", labels={"a": "b"})),
    submitted(retry=events.Retry(max_attempts=ATTEMPTS_MAX, backoff_factor=1.0, jitter=1.0)),
    submitted(retry=events.Retry(non_retryable=["E"] * NON_RETRYABLE_MAX)),
    submitted(object=REF),
    flow(args=nested(28)),
    flow(dependencies=["not even an id"]),
    events.WorkflowSubmitted(id="f", parts=WORKFLOW_PARTS_MAX, notify="token"),
    events.WorkflowPart(workflow="f", part=WORKFLOW_PARTS_MAX - 1, tasks=[]),
    events.TaskCancelRequested(id="a"),
    events.TaskCancelRequested(id="at-5-0"),
    events.TaskCancelRequested(id="at-5-0/a", reason="r" * TEXT_LENGTH_MAX),
    events.WorkflowCancelRequested(id="f"),
    events.TaskReprioritized(id="f/a", priority="low"),
    events.TaskReprioritized(id="a", priority=1000),
    joined(),
    joined(functions=["f"] * FUNCTIONS_MAX, labels={str(n): "" for n in range(LABELS_MAX)}),
    events.TaskCompleted(id="a", attempt=1, incarnation=1, object=REF, stdout=TAIL[1:], stderr=TAIL[1:]),
    events.TaskFailed(id="a", attempt=1, incarnation=1, error="error", traceback=TAIL[1:]),
    events.TaskAssigned(id="a", attempt=1, incarnation=1, object=REF),
    events.LeaderElected(epoch=1, master="m1"),
    events.LeaderElected(epoch=1, master="m1", level=2),
    events.PolicyChanged(policy=events.Policy()),
    events.PolicyChanged(policy=events.Policy(version=10**9 - 1, ageing_per_s=0.0, ahead_ms=0, decline_ms=0)),
    events.EventRejected(seq=1, index=-1, client="c", reason="r"),
    events.TaskStop(id="a", attempt=1, incarnation=1),
    submitted(lock=NAME),
    flow(lock="any text: ä / *"),
    events.WorkerDrainRequested(worker="w1", reason="r" * TEXT_LENGTH_MAX),
    events.LockOpened(generation=1),
    acquired(),
    acquired(name=NAME, token=INTEGER_MAX, holder="h" * TEXT_LENGTH_MAX, mode="shared"),
    acquired(mode="semaphore", permits=PERMITS_MAX, ttl_s=86_400),
    acquired(metadata={"k": "v" * (TEXT_LENGTH_MAX - 1)}),
    acquired(metadata={str(n): "" for n in range(LABELS_MAX)}),
    events.LockReleased(name=NAME, token=1),
    events.LockLost(name="any text: ä / *", token=1, holder="h", reason="r" * TEXT_LENGTH_MAX),
    events.MasterJoined(instance="i"),
    events.MasterJoined(instance="i" * TEXT_LENGTH_MAX, level=99, host="h" * TEXT_LENGTH_MAX, pid=1),
    events.MasterLeft(instance="i" * TEXT_LENGTH_MAX),
]


@pytest.mark.parametrize("event", GOOD, ids=lambda event: repr(event)[:70])
def test_within_the_limits(event: Event) -> None:
    assert check(event) is None


@pytest.mark.parametrize("text", ["a.b", "a b", "*", ">", "at-1-0", "x" * 129, "x" * 300, "a/b", "\0", "ä"])
def test_bad_ids(text: str) -> None:
    assert reason(submitted(id=text)) is Reason.BAD_ID
    assert reason(flow(task_id=text)) is Reason.BAD_ID
    assert reason(events.WorkflowSubmitted(id=text)) is Reason.BAD_ID
    assert reason(events.WorkflowPart(workflow=text, part=0, tasks=[])) is Reason.BAD_ID


@pytest.mark.parametrize("text", ["", "a.b", "a/b/c", "/", "a/", "/a", "at-", "at-at-1", "at-5-0/"])
def test_bad_targets(text: str) -> None:
    assert reason(events.TaskCancelRequested(id=text)) is Reason.BAD_ID
    assert reason(events.WorkflowCancelRequested(id=text)) is Reason.BAD_ID
    assert reason(events.TaskReprioritized(id=text, priority=1)) is Reason.BAD_ID


BAD_WORK: Final[list[dict[str, Any]]] = [
    {"function": ""},
    {"function": "f", "shell": "true"},
    {"function": "f", "argv": ["true"]},
    {"shell": "true", "argv": ["true"]},
    {"shell": "true", "args": [1]},
    {"shell": "true", "kwargs": {"a": 1}},
    {"shell": "s" * (SCRIPT_LENGTH_MAX + 1)},
    {"shell": "true", "cwd": LONG},
    {"env": {"": 1}},
    {"env": {"A=B": 1}},
    {"title": LONG},
    {"lock": NAME + "x"},
    {"function": LONG},
    {"priority": -1},
    {"priority": 1001},
    {"priority": "highest"},
    {"timeout_s": -1.0},
    {"timeout_s": SECONDS_MAX + 1},
    {"queue_timeout_s": -0.5},
    {"needs": events.Needs(cpu=-0.1)},
    {"needs": events.Needs(cpu=1e10)},
    {"needs": events.Needs(memory_mb=-1)},
    {"needs": events.Needs(gpus=-1)},
    {"needs": events.Needs(group=LONG)},
    {"needs": events.Needs(labels={LONG: ""})},
    {"needs": events.Needs(labels={"a": LONG})},
    {"needs": events.Needs(labels={str(n): "" for n in range(LABELS_MAX + 1)})},
    {"retry": events.Retry(max_attempts=0)},
    {"retry": events.Retry(max_attempts=ATTEMPTS_MAX + 1)},
    {"retry": events.Retry(backoff_s=-1.0)},
    {"retry": events.Retry(backoff_s_max=SECONDS_MAX * 2)},
    {"retry": events.Retry(backoff_factor=0.5)},
    {"retry": events.Retry(backoff_factor=1e4)},
    {"retry": events.Retry(jitter=1.5)},
    {"retry": events.Retry(jitter=-0.1)},
    {"retry": events.Retry(non_retryable=["E"] * (NON_RETRYABLE_MAX + 1))},
    {"object": events.ObjectRef(name="a.b", size=1, sha256="0" * 64)},
    {"object": events.ObjectRef(name="a", size=-1, sha256="0" * 64)},
    {"object": events.ObjectRef(name="a", size=1, sha256="0")},
]


@pytest.mark.parametrize("terms", BAD_WORK, ids=lambda terms: repr(terms)[:60])
def test_bad_work_is_bad_alone_and_in_a_workflow(terms: dict[str, Any]) -> None:
    assert reason(submitted(**terms)) is Reason.BAD_VALUE
    assert reason(flow(**terms)) is Reason.BAD_VALUE


def test_a_bad_task_of_a_workflow_is_named() -> None:
    bad = check(flow(task_id="build", priority=-1))
    assert bad is not None
    assert bad.detail == "task build: priority: expected 0 to 1000, found '-1'"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nested(32), Reason.TOO_DEEP),
        (["a\0"], Reason.BAD_TEXT),
        (["\ud800"], Reason.BAD_TEXT),
        ([INTEGER_MAX + 1], Reason.BAD_NUMBER),
        ([float("nan")], Reason.BAD_NUMBER),
        ([float("-inf")], Reason.BAD_NUMBER),
    ],
    ids=["deep", "nul", "surrogate", "integer", "nan", "infinite"],
)
@pytest.mark.parametrize("field", ["args", "kwargs", "argv", "env"])
def test_unsound_arguments(field: str, value: Any, expected: Reason) -> None:
    terms = {field: {"a": value[0]} if field in {"kwargs", "env"} else value}
    assert reason(submitted(**terms)) is expected
    assert reason(flow(**terms)) is expected


BAD_OTHERS: Final[list[Event]] = [
    submitted(notify="a.b"),
    submitted(notify="x" * 65),
    events.WorkflowSubmitted(notify="*"),
    events.WorkflowSubmitted(parts=-1),
    events.WorkflowSubmitted(parts=WORKFLOW_PARTS_MAX + 1),
    events.WorkflowSubmitted(name=LONG),
    events.WorkflowSubmitted(description=LONG),
    events.WorkflowPart(workflow="f", part=-1, tasks=[]),
    events.WorkflowPart(workflow="f", part=WORKFLOW_PARTS_MAX, tasks=[]),
    events.TaskCancelRequested(id="a", reason=LONG),
    events.WorkflowCancelRequested(id="a", reason=LONG),
    events.TaskReprioritized(id="a", priority=-1),
    events.TaskReprioritized(id="a", priority="highest"),
    joined(slots=0),
    joined(ahead=-1),
    joined(cpu=-1.0),
    joined(memory_mb=-1),
    joined(gpus=-1),
    joined(functions=["f"] * (FUNCTIONS_MAX + 1)),
    joined(functions=[LONG]),
    joined(instance=LONG),
    joined(host=LONG),
    joined(group=LONG),
    joined(labels={"a": LONG}),
    events.TaskCompleted(id="a", attempt=1, incarnation=1, stdout=TAIL),
    events.TaskCompleted(id="a", attempt=1, incarnation=1, stderr=TAIL),
    events.TaskCompleted(
        id="a", attempt=1, incarnation=1, object=events.ObjectRef(name="", size=1, sha256="")
    ),
    events.TaskFailed(id="a", attempt=1, incarnation=1, error=LONG),
    events.TaskFailed(id="a", attempt=1, incarnation=1, error="e", message=LONG),
    events.TaskFailed(id="a", attempt=1, incarnation=1, error="e", traceback=TAIL),
    events.TaskAssigned(
        id="a", attempt=1, incarnation=1, object=events.ObjectRef(name="", size=1, sha256="")
    ),
    events.LeaderElected(epoch=0, master="m1"),
    events.LeaderElected(epoch=1, master="m 1"),
    events.LeaderElected(epoch=1, master="m1", level=0),
    events.PolicyChanged(policy=events.Policy(strategy="best")),
    events.PolicyChanged(policy=events.Policy(ageing_per_s=-1.0)),
    events.PolicyChanged(policy=events.Policy(ahead_ms=-1)),
    events.PolicyChanged(policy=events.Policy(decline_ms=-1)),
    events.PolicyChanged(policy=events.Policy(losses_max=0)),
    events.PolicyChanged(policy=events.Policy(version=0)),
    events.PolicyChanged(policy=events.Policy(version=10**9)),
    events.EventRejected(seq=0, index=0, client="c", reason="r"),
    events.WorkerDrainRequested(worker=""),
    events.WorkerDrainRequested(worker="w 1"),
    events.WorkerDrainRequested(worker="*"),
    events.WorkerDrainRequested(worker="w1", reason=LONG),
    events.LockOpened(generation=0),
    acquired(name=""),
    acquired(name=NAME + "x"),
    acquired(token=0),
    acquired(token=-1),
    acquired(holder=LONG),
    acquired(mode="none"),
    acquired(mode="Exclusive"),
    acquired(permits=0),
    acquired(permits=PERMITS_MAX + 1),
    acquired(ttl_s=0),
    acquired(ttl_s=86_401),
    acquired(metadata={"k": "v" * TEXT_LENGTH_MAX}),
    acquired(metadata={"k": "v" * 3_000, "l": "v" * 3_000}),
    acquired(metadata={str(n): "" for n in range(LABELS_MAX + 1)}),
    events.LockReleased(name="", token=1),
    events.LockReleased(name="l", token=0),
    events.LockReleased(name="l", token=1, holder=LONG),
    events.LockLost(name=NAME + "x", token=1),
    events.LockLost(name="l", token=0),
    events.LockLost(name="l", token=1, holder=LONG),
    events.LockLost(name="l", token=1, reason=LONG),
    events.MasterJoined(instance=""),
    events.MasterJoined(instance=LONG),
    events.MasterJoined(instance="i", level=0),
    events.MasterJoined(instance="i", host=LONG),
    events.MasterLeft(instance=""),
    events.MasterLeft(instance=LONG),
]


@pytest.mark.parametrize("event", BAD_OTHERS, ids=lambda event: repr(event)[:70])
def test_beyond_the_limits(event: Event) -> None:
    assert reason(event) is Reason.BAD_VALUE


@pytest.mark.parametrize("event", BAD_OTHERS, ids=lambda event: repr(event)[:70])
def test_a_refusal_is_short_and_says_what_was_expected(event: Event) -> None:
    bad = check(event)
    assert bad is not None
    assert "expected" in bad.detail
    assert len(bad.detail) < 300


@pytest.mark.parametrize(
    "value", [0, -1, INTEGER_MAX, 1.5, -0.0, True, None, "", "ä😀", [], {}, {"a": [1, {}]}]
)
def test_sound_values(value: Any) -> None:
    assert unsound(value, 5) is None


def test_room_is_how_many_levels_may_still_open() -> None:
    assert unsound(1, 0) is None
    assert unsound([], 0) is Reason.TOO_DEEP
    assert unsound([1], 1) is None
    assert unsound({"a": [1]}, 1) is Reason.TOO_DEEP
    assert unsound({"a": [1]}, 2) is None


def test_priorities_by_name() -> None:
    assert {name: priority_of(name) for name in PRIORITIES} == PRIORITIES
    assert priority_of(7) == 7
