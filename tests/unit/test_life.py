"""The life of a task: the table says all that happens, and all it says happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import pytest

from agentflow import events
from agentflow.domain.life import FINAL, START, TABLE, State, mermaid
from agentflow.domain.state import Namespace
from agentflow.frames import encode, judge
from tests.unit.given import (
    NAMESPACE,
    Logged,
    Scene,
    Step,
    assigned,
    cancel_requested,
    cancelled,
    completed,
    declined,
    elected,
    failed,
    flow,
    fold_message,
    joined,
    left,
    lost,
    quarantined,
    retried,
    started,
    submitted,
    timed_out,
)
from tests.unit.histories import History

Transition: TypeAlias = tuple[str, str, str]
HISTORIES: Final = 20
STEPS: Final = 120

_LEADS_TO: Final = {(state, cause, target) for (state, cause), targets in TABLE.items() for target in targets}
_RETRY: Final = events.Retry(max_attempts=2)


def states_of(state: Namespace) -> dict[str, str]:
    return {task.id: str(task.state) for task in state.tasks.values()}


def observed(messages: list[Logged]) -> Iterator[Transition]:
    """Every change of a task's state in a log of frames of one event, with its cause."""
    state = Namespace(NAMESPACE)
    for message in messages:
        before = states_of(state)
        attempts = {task.id: (task.attempt, task.started) for task in state.tasks.values()}
        fold_message(state, message)
        judged = judge(message.subject, message.data, message.headers)
        after = states_of(state)
        for task in dict.fromkeys([*before, *after]):
            was, now = before.get(task, START), after.get(task) or str(state.status(task)[0])
            known = state.tasks.get(task)
            restarted = known is not None and attempts.get(task) != (known.attempt, known.started)
            if was != now or (was == State.RUNNING and restarted):
                event = judged.items[0] if judged.items else None
                yield was, cause_of(judged.kind, getattr(event, "id", ""), task, now), now


def cause_of(kind: str, about: str, task: str, now: str) -> str:
    """The event, if it is about the task; else what changed for it."""
    match kind:
        case "task.submitted" | "workflow.submitted":
            return kind
        case "worker.left":
            return "worker left"
        case "worker.lost" | "worker.joined":
            return "worker lost"
        case _:
            pass
    if about == task:
        return kind
    return "dependency completed" if now == State.READY else "dependency not completed"


def each_alone(messages: list[Logged]) -> list[Logged]:
    """The same log in frames of one event, so that each can be watched."""
    scene = Scene()
    for message in messages:
        judged = judge(message.subject, message.data, message.headers)
        scene.now_ms = message.time_ns // 1_000_000
        for item in judged.items:
            if hasattr(item, "kind"):
                scene.write(message.subject, b"[" + encode(item) + b"]", message.headers)
    return scene.messages


@pytest.mark.parametrize("part", range(4))
def test_whatever_happens_is_in_the_table(part: int) -> None:
    for seed in range(part, HISTORIES, 4):
        history = History(seed)
        history.say_nonsense = history.garble = seed % 2 == 0
        for transition in observed(each_alone(history.run(STEPS))):
            assert transition in _LEADS_TO, (seed, transition)


STORIES: Final[dict[Transition, list[Step]]] = {
    (START, "task.submitted", "ready"): [submitted("a")],
    (START, "workflow.submitted", "ready"): [flow("f", {"a": []})],
    (START, "workflow.submitted", "pending"): [flow("f", {"a": [], "b": ["a"]})],
    ("pending", "dependency completed", "ready"): [
        flow("f", {"a": [], "b": ["a"]}),
        assigned("f/a"),
        completed("f/a"),
    ],
    ("pending", "dependency not completed", "skipped"): [
        flow("f", {"a": [], "b": ["a"], "c": []}),
        assigned("f/a"),
        failed("f/a"),
    ],
    ("pending", "task.retried", "ready"): [
        submitted("a", retry=_RETRY),
        assigned("a"),
        failed("a"),
        retried("a"),
    ],
    ("pending", "task.cancelled", "cancelled"): [
        submitted("a", retry=_RETRY),
        assigned("a"),
        failed("a"),
        cancel_requested("a"),
        cancelled("a"),
    ],
    ("ready", "task.assigned", "running"): [submitted("a"), assigned("a")],
    ("ready", "task.timed_out", "failed"): [submitted("a", queue_timeout_s=1.0), timed_out("a")],
    ("ready", "task.cancelled", "cancelled"): [submitted("a"), cancel_requested("a"), cancelled("a")],
    ("ready", "task.quarantined", "failed"): [submitted("a"), quarantined("a")],
    ("running", "task.started", "running"): [submitted("a"), assigned("a"), started("a")],
    ("running", "task.completed", "completed"): [submitted("a"), assigned("a"), completed("a")],
    ("running", "task.failed", "failed"): [submitted("a"), assigned("a"), failed("a")],
    ("running", "task.failed", "pending"): [submitted("a", retry=_RETRY), assigned("a"), failed("a")],
    ("running", "task.failed", "ready"): [submitted("a"), assigned("a"), failed("a", "stopped")],
    ("running", "task.declined", "ready"): [submitted("a"), assigned("a"), declined("a")],
    ("running", "worker lost", "ready"): [submitted("a"), assigned("a"), lost("w1")],
    ("running", "worker left", "ready"): [submitted("a"), assigned("a"), left("w1")],
}
"""For each entry of the table, events that lead there."""


def test_there_is_a_story_for_each_entry_of_the_table() -> None:
    assert STORIES.keys() == _LEADS_TO


@pytest.mark.parametrize("transition", STORIES, ids=" ".join)
def test_whatever_is_in_the_table_can_happen(transition: Transition) -> None:
    scene = Scene().given(elected(), joined("w1"), *STORIES[transition])
    assert transition in set(observed(scene.messages))


def test_final_states_are_never_left() -> None:
    assert not [state for state, _ in TABLE if state in FINAL]
    assert {target for targets in TABLE.values() for target in targets} == set(State)


def test_the_picture_shows_every_entry() -> None:
    picture = mermaid()
    assert picture.startswith("stateDiagram-v2\n")
    for state, cause, target in _LEADS_TO:
        assert f"    {state} --> {target}: {cause}" in picture.splitlines()
    assert "    completed --> [*]" in picture.splitlines()
