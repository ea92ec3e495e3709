"""A frame's events looked at together: a yes means that nothing is wrong with any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from agentflow import frames, ids
from agentflow.bulk import certainly_valid
from agentflow.events import Event, Retry, TaskAssigned, TaskCompleted, TaskFailed, TaskSubmitted
from agentflow.frames import encode
from agentflow.limits import INTEGER_MAX
from tests.unit.test_frames import any_events


def submitted(number: int = 0, **terms: Any) -> TaskSubmitted:
    given: dict[str, Any] = {"id": f"t{number}", "function": "f", "args": [number, "é"]}
    return TaskSubmitted(**given | terms)


def assigned(number: int = 0, **fields: Any) -> TaskAssigned:
    known: dict[str, Any] = {"id": f"t{number}", "attempt": 1, "incarnation": 7}
    given: dict[str, Any] = {**known, "function": "f", "args": Raw(b"[1,null]")}
    return TaskAssigned(**given | fields)


def completed(number: int = 0, **fields: Any) -> TaskCompleted:
    given: dict[str, Any] = {"id": f"t{number}", "attempt": 1, "incarnation": 7, "result": Raw(b'"done"')}
    return TaskCompleted(**given | fields)


MADE: dict[str, Callable[[int], Event]] = {
    TaskSubmitted.kind: submitted,
    TaskAssigned.kind: assigned,
    TaskCompleted.kind: completed,
}


@pytest.mark.parametrize("kind", MADE)
def test_what_most_frames_hold_is_seen_at_one_go(kind: str) -> None:
    assert certainly_valid(kind, [MADE[kind](number) for number in range(100)])


@pytest.mark.parametrize(
    "event",
    [
        submitted(id="at-1-0"),
        submitted(id="t 1"),
        submitted(id="t1\nt2"),
        submitted(id="é"),
        submitted(id="x" * 129),
        submitted(function=""),
        submitted(shell="true"),
        submitted(args=[INTEGER_MAX + 1]),
        submitted(args=[True, -INTEGER_MAX - 1]),
        submitted(priority=1_001),
        submitted(priority="soon"),
        submitted(timeout_s=-1.0),
        submitted(notify="a b"),
        submitted(title="x" * 5_000),
        submitted(retry=Retry(max_attempts=0)),
        assigned(args=Raw(b"[1, 2]")),
        assigned(args=Raw(b"[1e2]")),
        assigned(args=Raw(b"[9223372036854775808]")),
        completed(result=Raw(b" 1")),
        completed(result=Raw(b"-9223372036854775808")),
        completed(result=Raw(b'{"b":1,"b":2}')),
        completed(stdout="x" * 100_000),
    ],
)
def test_one_among_many_is_enough_to_look_closer(event: Event) -> None:
    made = MADE[event.kind]
    events = [*map(made, range(5)), event, *map(made, range(6, 9))]
    assert not certainly_valid(event.kind, events)


def test_of_other_kinds_nothing_is_said() -> None:
    assert not certainly_valid(
        TaskFailed.kind, [TaskFailed(id="t", attempt=1, incarnation=1, error="e", message="m")] * 2
    )


@pytest.mark.parametrize("kind", MADE)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_yes_is_what_each_event_by_itself_gets(kind: str, data: st.DataObject) -> None:
    said: Sequence[Event] = [*map(MADE[kind], range(3)), data.draw(any_events(kind))]
    written = encode(said)
    fast = frames._canonical(kind, written)
    if fast is not None and certainly_valid(kind, fast):
        assert encode(frames._strict(kind, written, no_lock=False)) == encode(fast)


@given(texts=st.lists(st.text(st.sampled_from("aZ09_-\n é٣"), max_size=3) | st.just("at-1"), max_size=3))
def test_ids_together_are_ids_each(texts: list[str]) -> None:
    assert ids.are_ids(texts) == (bool(texts) and all(map(ids.is_id, texts)))


def test_ids_of_every_length() -> None:
    for length in (1, 128, 129):
        texts = ["x", "y" * length]
        assert ids.are_ids(texts) == all(map(ids.is_id, texts))
