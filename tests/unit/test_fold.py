"""The fold: what each event makes of the state, and what is made of each that should not be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events, wire
from agentflow.domain import state as states
from agentflow.domain.fold import MEANING
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.state import APPLIED, DUPLICATE, SUPERSEDED, Kind, Memory, Namespace, Verdict
from agentflow.domain.tasks import UNUSED_TERMS_MAX
from agentflow.events import KINDS, Reason
from agentflow.frames import encode
from agentflow.limits import (
    ANSWERS_MAX,
    FOLD_BYTES_MAX,
    ID_AHEAD_MS_MAX,
    OPEN_TASKS_MAX,
    WORKFLOW_PARTS_MAX,
    WORKFLOW_TASKS_MAX,
)
from tests.unit.dump import dump
from tests.unit.given import (
    BEGIN_MS,
    FUNCTION,
    MASTER,
    NAMESPACE,
    Scene,
    Step,
    assigned,
    cancel_requested,
    cancelled,
    completed,
    decided_in,
    decides,
    declined,
    draining,
    elected,
    failed,
    flow,
    flow_cancel_requested,
    fold_all,
    fold_message,
    given,
    joined,
    left,
    lost,
    policy,
    quarantined,
    reprioritized,
    retried,
    says,
    started,
    stop,
    submitted,
    tasks_of,
    timed_out,
)
from tests.unit.histories import History, uuid_at

RETRY: Final = events.Retry(max_attempts=3, backoff_s=2.0, jitter=0.0)


def refused(verdict: Verdict) -> Reason | None:
    """Why a client's event was rejected."""
    assert verdict.kind is Kind.REJECTED, verdict
    return verdict.reason


def at_work(*steps: Step, slots: int = 1) -> Scene:
    """A leader, a worker, and what came next."""
    return given(elected(), joined("w1", slots=slots), *steps)


# Submissions ---------------------------------------------------------------------------


def test_a_submitted_task_is_ready() -> None:
    scene = given(submitted("a", priority="high", args=[1, {"b": None}]))
    task = scene.task("a")
    assert (task.state, task.priority, task.args, task.attempt) == (State.READY, 750, b'[1,{"b":null}]', 0)
    assert scene.state.queue.size == 1


def test_an_id_left_out_follows_from_the_position() -> None:
    scene = Scene()
    verdicts = scene.say("cli", [events.TaskSubmitted(shell="true"), events.TaskSubmitted(shell="true")])
    assert verdicts == [APPLIED, APPLIED]
    assert list(scene.state.tasks) == ["at-1-0", "at-1-1"]
    assert scene.when(flow("", {"a": []})) == APPLIED
    assert "at-2-0/a" in scene.state.tasks


def test_the_same_again_is_a_duplicate() -> None:
    scene = given(submitted("a", args=[1]))
    assert scene.when(submitted("a", args=[1], by="somebody-else", notify="token")) == DUPLICATE
    assert scene.state.queue.size == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"args": [1]}, {"args": [2]}),
        ({"args": [1]}, {}),
        ({"priority": 1}, {"priority": 2}),
        ({"kwargs": {"a": 1}}, {"env": {"a": 1}}),
        ({"kwargs": {"a": 1}}, {"args": [{"a": 1}]}),
        ({"shell": "true"}, {"shell": "false"}),
        ({"argv": ["a"]}, {"argv": ["b"]}),
        ({"retry": RETRY}, {}),
        ({"needs": events.Needs(cpu=1.0)}, {"needs": events.Needs(cpu=2.0)}),
        ({"args": ["x" * FOLD_BYTES_MAX]}, {"args": ["y" * FOLD_BYTES_MAX]}),
    ],
)
def test_the_same_id_with_another_body_is_a_conflict(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert refused(given(submitted("a", **one)).when(submitted("a", **other))) is Reason.CONFLICT
    assert refused(given(submitted("a", **other)).when(submitted("a", **one))) is Reason.CONFLICT


def test_how_a_body_is_spelled_makes_no_conflict() -> None:
    scene = given(submitted("a", kwargs={"x": 1, "y": 2}, needs=events.Needs(cpu=0.0)))
    assert scene.when(submitted("a", kwargs={"y": 2, "x": 1}, needs=events.Needs(cpu=-0.0))) == DUPLICATE


def test_a_repeated_body_is_known_whatever_else_is_open() -> None:
    minus = submitted("b", needs=events.Needs(cpu=-0.0))
    scene = at_work(submitted("a", needs=events.Needs(cpu=0.0)), minus, slots=2)
    scene.given(assigned("a"), assigned("b"), completed("a"), completed("b"))
    assert scene.when(minus) == DUPLICATE


def test_ids_of_ended_tasks_are_remembered() -> None:
    scene = at_work(submitted("a", args=[1]), assigned("a"), completed("a"))
    assert scene.state.status("a") == (State.COMPLETED, (5, 0))
    assert scene.when(submitted("a", args=[1])) == DUPLICATE
    assert refused(scene.when(submitted("a", args=[2]))) is Reason.CONFLICT
    assert not scene.state.tasks


def test_a_task_and_a_workflow_cannot_share_an_id() -> None:
    assert refused(given(submitted("a")).when(flow("a", {"b": []}))) is Reason.CONFLICT
    assert refused(given(flow("a", {"b": []})).when(submitted("a"))) is Reason.CONFLICT


def test_small_arguments_are_kept_and_large_ones_are_fetched() -> None:
    small, large = [1], ["x" * FOLD_BYTES_MAX]
    scene = given(
        submitted("a", args=small),
        submitted("b", args=large),
        submitted("c", args=small, kwargs={"k": large}),
    )
    assert scene.task("a").args == b"[1]"
    for name in "bc":
        task = scene.task(name)
        assert task.args == b""
        assert task.payload is not None
        assert task.payload.fetch


def test_terms_are_kept_once_and_given_back() -> None:
    scene = at_work(*(submitted(f"a{n}", args=[n]) for n in range(9)))
    assert len(scene.state.terms) == 1
    for n in range(9):
        scene.given(assigned(f"a{n}"), completed(f"a{n}"))
    assert [terms.users for terms in scene.state.terms.values()] == [0]
    assert scene.state.terms == scene.state.unused_terms


def test_terms_nobody_uses_are_forgotten_in_time() -> None:
    scene = at_work()
    for n in range(UNUSED_TERMS_MAX + 5):
        scene.given(submitted("a", title="", queue_timeout_s=float(n + 1)), assigned("a"), completed("a"))
        scene.state.closed.current.clear()
    assert len(scene.state.terms) == len(scene.state.unused_terms) == UNUSED_TERMS_MAX
    assert len(scene.state.queue.lines) == 1


# Overload ------------------------------------------------------------------------------


def test_a_nearly_full_log_takes_no_submissions() -> None:
    scene = at_work(submitted("a"), policy(accepting=False))
    assert refused(scene.when(submitted("b"))) is Reason.OVERLOADED
    assert refused(scene.when(flow("f", {"a": []}))) is Reason.OVERLOADED
    assert scene.when(submitted("a")) == DUPLICATE
    assert scene.when(assigned("a")) == APPLIED
    assert scene.when(completed("a")) == APPLIED
    assert not scene.state.tasks


def test_too_many_open_tasks() -> None:
    scene = given(submitted("a"))
    filler = scene.task("a")
    scene.state.tasks.update((f"x{n}", filler) for n in range(OPEN_TASKS_MAX - 2))
    assert refused(scene.when(flow("f", {"a": [], "b": []}))) is Reason.OVERLOADED
    assert scene.when(submitted("last")) == APPLIED
    assert refused(scene.when(submitted("one-more"))) is Reason.OVERLOADED


# UUIDv7 --------------------------------------------------------------------------------


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations of three ids."""
    monkeypatch.setattr(states, "CLOSED_IDS_MAX", 3)


def run_one(scene: Scene, name: str) -> None:
    scene.given(submitted(name), assigned(name), completed(name))


def forget(scene: Scene) -> None:
    """End enough tasks, one a second, for all before to be forgotten."""
    for number in range(9):
        scene.after(1_000)
        run_one(scene, f"x{scene.state.seq}-{number}")


@pytest.mark.parametrize("ahead_ms", [-(10**9), -1, 0, 1, ID_AHEAD_MS_MAX])
def test_a_uuid7_of_about_now_is_accepted(ahead_ms: int) -> None:
    assert at_work().when(submitted(uuid_at(BEGIN_MS + ahead_ms))) == APPLIED


def test_a_uuid7_from_the_future_is_not() -> None:
    ahead = uuid_at(BEGIN_MS + ID_AHEAD_MS_MAX + 1)
    assert refused(at_work().when(submitted(ahead))) is Reason.FROM_THE_FUTURE
    assert refused(at_work().when(flow(ahead, {"a": []}))) is Reason.FROM_THE_FUTURE
    assert at_work().after(1).given(joined("w2")).when(submitted(ahead)) == APPLIED


@pytest.mark.usefixtures("short_memory")
def test_a_uuid7_from_before_the_ids_remembered_is_too_old() -> None:
    scene = at_work()
    forget(scene)
    assert refused(scene.when(submitted(uuid_at(BEGIN_MS)))) is Reason.TOO_OLD
    assert scene.when(submitted(uuid_at(scene.now_ms))) == APPLIED


@pytest.mark.usefixtures("short_memory")
def test_what_a_client_calls_itself_is_a_duplicate_as_long_as_it_is_remembered() -> None:
    scene = at_work()
    run_one(scene, "build-1")
    assert scene.when(submitted("build-1")) == DUPLICATE
    forget(scene)
    assert scene.when(submitted("build-1")) == APPLIED


@pytest.mark.usefixtures("short_memory")
@pytest.mark.parametrize("ahead_ms", [-5_000, -1, 0, 1, 500, 20_000, ID_AHEAD_MS_MAX - 1])
@pytest.mark.parametrize("forgotten", [1, 3])
def test_no_uuid7_is_ever_taken_for_new_again(ahead_ms: int, forgotten: int) -> None:
    scene = at_work()
    name = uuid_at(BEGIN_MS + ahead_ms)
    run_one(scene, name)
    for _ in range(forgotten):
        forget(scene)
        verdict = scene.when(submitted(name))
        assert verdict == DUPLICATE or refused(verdict) is Reason.TOO_OLD
    assert len(scene.state.closed) < 9


@pytest.mark.usefixtures("short_memory")
@pytest.mark.parametrize("back_ms", [1, 10_000, 10**8])
def test_not_even_when_the_servers_clock_goes_back(back_ms: int) -> None:
    scene = at_work().after(10**8)
    name = uuid_at(scene.now_ms)
    run_one(scene, name)
    scene.now_ms -= back_ms
    forget(scene)
    verdict = scene.when(submitted(name))
    assert verdict == DUPLICATE or refused(verdict) is Reason.TOO_OLD


def test_ids_ahead_of_the_log_are_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentflow.domain.asked.EARLY_IDS_MAX", 5)
    monkeypatch.setattr(states, "CLOSED_IDS_MAX", 3)
    scene = at_work()
    verdicts: list[Verdict] = []
    for number in range(40):
        name = uuid_at(BEGIN_MS + ID_AHEAD_MS_MAX // 2, number)
        verdicts.append(scene.when(submitted(name)))
        if verdicts[-1] == APPLIED:
            scene.given(assigned(name), completed(name))
        run_one(scene, f"x{number}")
    assert refused(verdicts[-1]) is Reason.FROM_THE_FUTURE
    assert len(scene.state.closed) < 20


def test_memory_keeps_state_position_and_digest() -> None:
    memory = Memory()
    for number, state in enumerate([*states._CODES]):
        memory.add(f"a{number}", state, (2**40 + number, 4_999), 2**32 - 1 - number, now_ms=1)
        found = memory.get(f"a{number}")
        assert found is not None
        assert found == states.Closed(state, 2**40 + number, 4_999, 2**32 - 1 - number)
        assert type(found.state) is type(state)
    assert memory.get("b") is None


# Workflows -----------------------------------------------------------------------------


def test_a_workflow_runs_in_order_of_its_dependencies() -> None:
    scene = at_work(flow("f", {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c", "b"]}), slots=2)
    assert [scene.status(f"f/{name}") for name in "abcd"] == ["ready", "pending", "pending", "pending"]
    scene.given(assigned("f/a"), completed("f/a"))
    assert [scene.status(f"f/{name}") for name in "abcd"] == ["completed", "ready", "ready", "pending"]
    scene.given(assigned("f/b"), completed("f/b"))
    assert scene.status("f/d") == "pending"
    scene.given(assigned("f/c"), completed("f/c"))
    assert scene.status("f/d") == "ready"
    scene.given(assigned("f/d"), completed("f/d"))
    assert scene.state.status("f") == (WorkflowState.COMPLETED, (11, 0))
    assert scene.state.status("f/b") == (State.COMPLETED, (7, 0))
    assert not scene.state.tasks
    assert not scene.state.workflows


def test_a_failure_skips_what_depends_on_it_and_the_rest_goes_on() -> None:
    graph = {"a": [], "b": ["a"], "c": ["b"], "x": [], "y": ["x"], "z": ["c", "y"]}
    scene = at_work(flow("f", graph), assigned("f/a"), failed("f/a"))
    assert {name: scene.status(f"f/{name}") for name in graph} == {
        "a": "failed",
        "b": "skipped",
        "c": "skipped",
        "x": "ready",
        "y": "pending",
        "z": "skipped",
    }
    assert scene.task("f/c").error == "f/a ended failed"
    assert scene.state.status("f/c") == (State.SKIPPED, (5, 0))
    scene.given(assigned("f/x"), completed("f/x"), assigned("f/y"), completed("f/y"))
    assert scene.status("f") == "failed"
    assert scene.state.status("f/z") == (State.SKIPPED, (5, 0))


def test_where_a_task_of_a_workflow_ended_is_known_before_and_after_the_workflow() -> None:
    scene = at_work(flow("f", {"a": [], "b": []}), assigned("f/a"), failed("f/a"))
    assert scene.state.status("f/a") == (State.FAILED, (5, 0))
    scene.given(assigned("f/b"), completed("f/b"))
    assert scene.state.status("f/a") == (State.FAILED, (5, 0))


def test_a_workflow_without_failures_in_which_something_was_cancelled_is_cancelled() -> None:
    scene = at_work(flow("f", {"a": [], "b": []}), cancel_requested("f/a"), cancelled("f/a"))
    scene.given(assigned("f/b"), completed("f/b"))
    assert scene.status("f") == "cancelled"


def test_the_end_of_a_workflow_is_announced_once() -> None:
    scene = at_work(flow("f", {"a": []}), assigned("f/a"), completed("f/a"))
    (announced,) = decided_in(scene.lead(), events.WorkflowCompleted)
    assert announced == events.WorkflowCompleted(id="f", state="completed", completed=1)
    assert not scene.plan()
    assert scene.when(says(announced, MASTER)) == SUPERSEDED


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({}, Reason.BAD_DAG),
        ({"a": ["a"]}, Reason.BAD_DAG),
        ({"a": ["b"]}, Reason.BAD_DAG),
        ({"a": ["b"], "b": ["a"]}, Reason.BAD_DAG),
    ],
)
def test_what_is_no_dag(graph: dict[str, list[str]], expected: Reason) -> None:
    scene = Scene()
    verdict = scene.when(flow("f", graph))
    assert refused(verdict) is expected
    assert len(verdict.detail) < 1_100
    assert not scene.state.terms


def test_a_task_named_twice_is_no_dag() -> None:
    twice = [*tasks_of({"a": []}), *tasks_of({"a": []})]
    assert refused(Scene().when(says(events.WorkflowSubmitted(id="f", tasks=twice)))) is Reason.BAD_DAG


@pytest.mark.parametrize("place", ["args", "kwargs", "env"])
def test_a_result_is_used_only_of_a_dependency(place: str) -> None:
    used: Any = {"$result": "a", "at": "/x"}
    tasks = tasks_of({"a": []}) + tasks_of({"b": []}, **{place: [used] if place == "args" else {"k": [used]}})
    assert refused(Scene().when(says(events.WorkflowSubmitted(id="f", tasks=tasks)))) is Reason.BAD_DAG
    tasks[1] = msgspec.structs.replace(tasks[1], dependencies=["a"])
    assert Scene().when(says(events.WorkflowSubmitted(id="f", tasks=tasks))) == APPLIED


def test_what_only_looks_like_a_reference_is_none() -> None:
    args = [{"$result": "x", "more": 1}, {"$result": 5}, "$result"]
    tasks = tasks_of({"a": []}, args=args)
    assert Scene().when(says(events.WorkflowSubmitted(id="f", tasks=tasks))) == APPLIED


def part(number: int, workflow: str = "f", by: str = "cli", count: int = 1) -> Step:
    tasks = tasks_of({f"p{number}-{n}": [] for n in range(count)})
    return says(events.WorkflowPart(workflow=workflow, part=number, tasks=tasks), by)


def closing(parts: int, workflow: str = "f", by: str = "cli") -> Step:
    return says(events.WorkflowSubmitted(id=workflow, parts=parts, tasks=tasks_of({"last": ["p0-0"]})), by)


def test_a_workflow_in_parts() -> None:
    scene = given(part(0), part(1))
    assert scene.when(closing(2)) == APPLIED
    assert list(scene.state.workflows["f"].tasks) == ["p0-0", "p1-0", "last"]
    assert scene.task("f/p1-0").seq == 2
    assert scene.status("f/last") == "pending"
    assert not scene.state.parts


@pytest.mark.parametrize(
    "steps",
    [
        [part(0), closing(2)],
        [part(0), part(1), closing(1)],
        [closing(1)],
        [part(1), closing(1)],
        [part(0), part(0), closing(2)],
        [part(0), part(1, "other"), closing(2)],
        [part(0), closing(1, "other")],
        [part(0), submitted("between"), closing(1)],
        [part(0), closing(1, by="thief")],
        [part(0), part(1, by="thief"), closing(2)],
        [part(0), says(events.WorkflowSubmitted(id="f", tasks=tasks_of({"a": []}))), closing(1)],
    ],
)
def test_parts_that_do_not_belong_together(steps: list[Step]) -> None:
    scene = given(*steps[:-1])
    assert refused(scene.when(steps[-1])) is Reason.BAD_VALUE
    assert not scene.state.parts


def test_parts_do_not_pile_up() -> None:
    scene = Scene()
    for number in range(WORKFLOW_PARTS_MAX):
        assert scene.when(part(number)) == APPLIED
    assert refused(scene.when(part(WORKFLOW_PARTS_MAX))) is Reason.BAD_VALUE


def large_flow(count: int) -> tuple[Scene, list[Verdict]]:
    """A workflow of so many tasks, each depending on the one before, in parts."""
    names = [f"t{number}" for number in range(count)]
    tasks = [
        events.WorkflowTask(task_id=name, function="f", dependencies=[before] if before else [])
        for name, before in zip(names, ["", *names], strict=False)
    ]
    size = 5_000
    scene = Scene()
    pieces = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    verdicts = [
        scene.when(says(events.WorkflowPart(workflow="f", part=number, tasks=piece)))
        for number, piece in enumerate(pieces)
    ]
    return scene, [*verdicts, scene.when(says(events.WorkflowSubmitted(id="f", parts=len(pieces))))]


def test_the_largest_workflow() -> None:
    scene, verdicts = large_flow(WORKFLOW_TASKS_MAX)
    assert set(verdicts) == {APPLIED}
    assert len(scene.state.tasks) == WORKFLOW_TASKS_MAX
    assert scene.state.queue.size == 1


def test_one_task_too_many() -> None:
    scene, verdicts = large_flow(WORKFLOW_TASKS_MAX + 1)
    assert [verdict.reason for verdict in verdicts[-2:]] == [Reason.TOO_LARGE, Reason.BAD_VALUE]
    assert not scene.state.tasks
    assert [answer.id for answer in scene.state.answers.values()] == ["f", "f"]


# Assignments and outcomes --------------------------------------------------------------


def test_an_assigned_task_runs() -> None:
    scene = at_work(submitted("a"))
    assert scene.when(assigned("a")) == APPLIED
    assert (scene.task("a").state, scene.task("a").attempt) == (State.RUNNING, 1)
    assert scene.running_at("w1") == ["a"]
    assert (scene.state.queue.size, scene.state.running) == (0, 1)


@pytest.mark.parametrize(
    "step",
    [
        assigned("a", attempt=2),
        assigned("a", attempt=0),
        assigned("a", incarnation=1),
        assigned("a", to="nobody"),
        assigned("never-submitted"),
    ],
)
def test_assignments_that_come_too_late(step: Step) -> None:
    scene = at_work(submitted("a"))
    assert scene.when(step) == SUPERSEDED
    assert scene.status("a") == "ready"


def test_a_task_is_assigned_once() -> None:
    scene = at_work(submitted("a"), assigned("a"), joined("w2"))
    assert scene.when(assigned("a", to="w2", attempt=1)) == SUPERSEDED
    assert scene.when(assigned("a", to="w2", attempt=2)) == SUPERSEDED


def test_the_first_outcome_counts() -> None:
    scene = at_work(submitted("a"), assigned("a"))
    outcome = completed("a")(scene.state)
    assert scene.when(lambda _: outcome) == APPLIED
    assert scene.when(lambda _: outcome) == SUPERSEDED
    assert scene.when(failed("a", attempt=1, incarnation=2)) == SUPERSEDED
    assert scene.status("a") == "completed"


@pytest.mark.parametrize("outcome", [completed, failed, declined, started])
@pytest.mark.parametrize("other", [{"attempt": 2}, {"attempt": 0}, {"incarnation": 1}, {"by": "w2"}])
def test_outcomes_of_others_do_not_count(outcome: Any, other: dict[str, Any]) -> None:
    scene = at_work(submitted("a"), assigned("a"), joined("w2"))
    assert scene.when(outcome("a", **other)) == SUPERSEDED
    assert (scene.task("a").state, scene.task("a").started) == (State.RUNNING, False)


@pytest.mark.parametrize("outcome", [completed, failed, declined, started])
def test_outcomes_of_what_does_not_exist_are_quarantined(outcome: Any) -> None:
    verdict = at_work().when(outcome("nobody"))
    assert (verdict.kind, verdict.reason) == (Kind.QUARANTINED, Reason.UNKNOWN_ID)


def test_an_outcome_of_an_old_attempt_is_superseded() -> None:
    scene = at_work(submitted("a"), assigned("a"))
    old = completed("a")(scene.state)
    scene.given(lost("w1"), joined("w1"), assigned("a"))
    assert scene.when(lambda _: old) == SUPERSEDED
    assert scene.when(completed("a")) == APPLIED


def test_run_times_are_learnt() -> None:
    scene = at_work(*(submitted(f"a{n}") for n in range(3)))
    scene.given(assigned("a0"), completed("a0", run_us=1_000))
    assert scene.state.expectations[FUNCTION] == 1_000
    scene.given(assigned("a1"), completed("a1", run_us=1_800))
    assert scene.state.expectations[FUNCTION] == 1_100
    scene.given(assigned("a2"), completed("a2", run_us=-5))
    assert scene.state.expectations[FUNCTION] > 0


def test_clients_who_gave_a_token_are_told() -> None:
    scene = at_work(submitted("a", notify="t1", by="app"), submitted("b"), slots=2)
    scene.given(assigned("a"), assigned("b"), completed("a"), completed("b"))
    (ended,) = scene.state.ended
    assert (ended.id, ended.state, ended.client, ended.notify, ended.seq) == (
        "a",
        "completed",
        "app",
        "t1",
        7,
    )


def test_clients_are_told_of_what_was_not_accepted() -> None:
    scene = given(
        submitted("a", notify="t1"), submitted("a", notify="t1"), submitted("a", args=[1], notify="t1")
    )
    assert [(ended.id, ended.state) for ended in scene.state.ended] == [
        ("a", Kind.DUPLICATE),
        ("a", Kind.REJECTED),
    ]


# Failures ------------------------------------------------------------------------------


def test_a_failure_without_retry_is_final() -> None:
    scene = at_work(submitted("a"), assigned("a"), failed("a", "exit", message="exit code 3"))
    assert scene.state.status("a") == (State.FAILED, (5, 0))


def test_a_retry_waits_longer_each_time_and_then_no_more() -> None:
    scene = at_work(submitted("a", retry=RETRY))
    for attempt, wait_ms in ((1, 2_000), (2, 4_000)):
        scene.given(assigned("a"), failed("a"))
        assert (scene.task("a").state, scene.task("a").attempt) == (State.PENDING, attempt)
        assert scene.task("a").due_ms == scene.now_ms + wait_ms
        scene.after(wait_ms).given(retried("a"))
        assert scene.status("a") == "ready"
    scene.given(assigned("a"), failed("a"))
    assert scene.status("a") == "failed"


@pytest.mark.parametrize("outcome", [{"retryable": False}, {"error": "exit"}])
def test_what_is_not_retryable(outcome: dict[str, Any]) -> None:
    retry = events.Retry(max_attempts=9, non_retryable=["exit"])
    scene = at_work(submitted("a", retry=retry), assigned("a"), failed("a", **outcome))
    assert scene.status("a") == "failed"


def test_a_retry_in_a_workflow_skips_nothing() -> None:
    scene = at_work(flow("f", {"a": [], "b": ["a"]}, retry=RETRY), assigned("f/a"), failed("f/a"))
    assert (scene.status("f/a"), scene.status("f/b")) == ("pending", "pending")
    scene.given(retried("f/a"), assigned("f/a"), completed("f/a"))
    assert scene.status("f/b") == "ready"


def test_a_lost_run_counts_as_an_attempt() -> None:
    scene = at_work(submitted("a", retry=events.Retry(max_attempts=2)))
    scene.given(assigned("a"), started("a"), lost("w1"), joined("w1"), assigned("a"), failed("a"))
    assert scene.status("a") == "failed"


def test_a_lost_assignment_does_not() -> None:
    scene = at_work(submitted("a", retry=events.Retry(max_attempts=2)))
    scene.given(assigned("a"), lost("w1"), joined("w1"), assigned("a"), failed("a"))
    assert scene.status("a") == "pending"


@pytest.mark.parametrize("other", [{"attempt": 0}, {"attempt": 2}])
def test_a_retry_of_another_attempt_does_not_count(other: dict[str, int]) -> None:
    scene = at_work(submitted("a", retry=RETRY), assigned("a"), failed("a"))
    assert scene.when(retried("a", **other)) == SUPERSEDED
    assert scene.when(retried("a")) == APPLIED
    assert scene.when(retried("a")) == SUPERSEDED


def test_a_task_that_waits_for_another_cannot_be_retried() -> None:
    scene = at_work(flow("f", {"a": [], "b": ["a"]}))
    assert scene.when(retried("f/b")) == SUPERSEDED


def test_a_queue_timeout_is_a_failure() -> None:
    scene = at_work(submitted("a", queue_timeout_s=1.0))
    assert scene.when(timed_out("a")) == APPLIED
    assert scene.status("a") == "failed"
    assert scene.when(timed_out("a")) == SUPERSEDED


@pytest.mark.parametrize("decision", [timed_out, quarantined, cancelled])
def test_a_running_task_ends_by_its_worker_only(decision: Any) -> None:
    scene = at_work(submitted("a"), assigned("a"))
    assert scene.when(decision("a")) == SUPERSEDED
    assert scene.status("a") == "running"


def test_a_declined_task_is_ready_again() -> None:
    scene = at_work(submitted("a"), assigned("a"), declined("a"))
    assert scene.status("a") == "ready"
    assert scene.task("a").declined == {2: BEGIN_MS + 5_000}
    scene.after(6_000).given(joined("w2"), assigned("a", to="w2"), declined("a"))
    assert scene.task("a").declined == {6: BEGIN_MS + 11_000}


# Cancelling ----------------------------------------------------------------------------


def test_a_cancelled_task_waits_for_the_confirmation() -> None:
    scene = given(elected(), submitted("a"), cancel_requested("a", "no longer needed"))
    assert scene.status("a") == "ready"
    assert scene.state.queue.size == 0
    (confirmed,) = decided_in(scene.lead(), events.TaskCancelled)
    assert confirmed == events.TaskCancelled(id="a", reason="no longer needed")
    assert scene.status("a") == "cancelled"


def test_cancelling_a_running_task_stops_it_first() -> None:
    scene = at_work(submitted("a"), assigned("a"), cancel_requested("a"))
    (stopped,) = decided_in(scene.lead(), events.TaskStop)
    assert stopped == events.TaskStop(id="a", attempt=1, incarnation=2, reason="requested by cli")
    assert not scene.plan()
    scene.given(failed("a", "stopped"))
    assert scene.status("a") == "ready"
    scene.lead()
    assert scene.status("a") == "cancelled"


@pytest.mark.parametrize(
    ("then", "expected"), [(completed("a"), "completed"), (failed("a", "error"), "failed")]
)
def test_a_task_may_end_before_it_is_stopped(then: Step, expected: str) -> None:
    scene = at_work(submitted("a", retry=RETRY), assigned("a"), cancel_requested("a"), stop("a"), then)
    assert scene.status("a") == expected
    assert not scene.state.cancels


@pytest.mark.parametrize("then", [lost("w1"), left("w1"), declined("a"), joined("w1")])
def test_a_task_to_be_stopped_whose_worker_gives_it_back_is_cancelled(then: Step) -> None:
    scene = at_work(submitted("a"), assigned("a"), cancel_requested("a"), stop("a"), then)
    scene.lead()
    assert scene.status("a") == "cancelled"


def test_an_assignment_that_crosses_a_cancel_is_stopped() -> None:
    scene = at_work(submitted("a"), cancel_requested("a"))
    assert scene.when(assigned("a")) == APPLIED
    assert decided_in(scene.plan(), events.TaskStop)


def test_cancelling_twice() -> None:
    assert at_work(submitted("a"), cancel_requested("a")).when(cancel_requested("a")) == DUPLICATE
    scene = at_work(flow("f", {"a": []}), flow_cancel_requested("f"))
    assert scene.when(flow_cancel_requested("f")) == DUPLICATE


@pytest.mark.parametrize("graph", [{"a": [], "b": ["a"], "c": ["b"]}, {"c": ["b"], "b": ["a"], "a": []}])
def test_cancelling_a_workflow_cancels_all_its_open_tasks(graph: dict[str, list[str]]) -> None:
    scene = at_work(
        flow("f", graph | {"z": []}), assigned("f/z"), completed("f/z"), flow_cancel_requested("f")
    )
    scene.lead()
    assert [scene.status(f"f/{name}") for name in "abcz"] == ["cancelled"] * 3 + ["completed"]
    assert scene.status("f") == "cancelled"
    assert not scene.state.cancels


def test_a_task_to_be_cancelled_is_not_skipped_in_the_meantime() -> None:
    scene = at_work(
        flow("f", {"a": [], "b": ["a"], "c": ["b"]}), assigned("f/a"), cancel_requested("f/b"), failed("f/a")
    )
    assert scene.status("f/b") == "pending"
    scene.lead()
    assert [scene.status(f"f/{name}") for name in "abc"] == ["failed", "cancelled", "skipped"]


def test_a_task_to_be_cancelled_is_not_queued_when_it_gets_ready() -> None:
    scene = at_work(
        flow("f", {"a": [], "b": ["a"]}), assigned("f/a"), cancel_requested("f/b"), completed("f/a")
    )
    assert (scene.status("f/b"), scene.state.queue.size) == ("ready", 0)


@pytest.mark.parametrize(
    ("steps", "wish", "expected"),
    [
        ([], cancel_requested("nobody"), Reason.UNKNOWN_ID),
        ([], flow_cancel_requested("nobody"), Reason.UNKNOWN_ID),
        ([], reprioritized("nobody", 1), Reason.UNKNOWN_ID),
        ([flow("f", {"a": []})], cancel_requested("f"), Reason.UNKNOWN_ID),
        ([submitted("a")], flow_cancel_requested("a"), Reason.UNKNOWN_ID),
        ([submitted("a"), assigned("a"), completed("a")], cancel_requested("a"), Reason.CLOSED),
        ([submitted("a"), assigned("a"), completed("a")], reprioritized("a", 1), Reason.CLOSED),
        ([submitted("a"), assigned("a")], reprioritized("a", 1), Reason.CLOSED),
        (
            [flow("f", {"a": [], "b": []}), assigned("f/a"), failed("f/a")],
            cancel_requested("f/a"),
            Reason.CLOSED,
        ),
        ([flow("f", {"a": []}), assigned("f/a"), failed("f/a")], flow_cancel_requested("f"), Reason.CLOSED),
        ([flow("f", {"a": []}), assigned("f/a"), failed("f/a")], cancel_requested("f"), Reason.CLOSED),
    ],
)
def test_wishes_that_come_too_late_or_mean_nobody(steps: list[Step], wish: Step, expected: Reason) -> None:
    assert refused(at_work(*steps).when(wish)) is expected


def test_a_waiting_task_is_reprioritized() -> None:
    scene = at_work(flow("f", {"a": [], "b": ["a"]}), reprioritized("f/b", "urgent"), reprioritized("f/a", 3))
    assert (scene.task("f/a").priority, scene.task("f/b").priority) == (3, 1000)
    assert scene.when(reprioritized("f/a", 3)) == DUPLICATE


# Workers -------------------------------------------------------------------------------


def test_a_worker_joins_with_its_position_as_incarnation() -> None:
    scene = given(elected(), joined("w1", slots=4, ahead=9, group="g", labels={"a": "b"}, cpu=2.0, host="h"))
    worker = scene.worker()
    assert (worker.incarnation, worker.slots, worker.ahead, worker.group) == (2, 4, 9, "g")
    assert (worker.labels, worker.cpu, worker.functions) == ({"a": "b"}, 2.0, frozenset({FUNCTION}))


@pytest.mark.parametrize("end", [lost("w1"), joined("w1")])
def test_a_lost_worker_leaves_suspects(end: Step) -> None:
    scene = at_work(submitted("a"), submitted("b"), assigned("a"), assigned("b"), started("a"), end, slots=2)
    assert [(task.id, task.state, task.suspect, task.losses) for task in map(scene.task, "ab")] == [
        ("a", State.READY, True, 1),
        ("b", State.READY, True, 0),
    ]
    assert scene.state.running == 0


def test_a_worker_that_leaves_leaves_none() -> None:
    scene = at_work(submitted("a"), assigned("a"), started("a"), left("w1"))
    assert (scene.task("a").state, scene.task("a").suspect, scene.task("a").losses) == (State.READY, False, 0)
    assert not scene.state.workers


@pytest.mark.parametrize("step", [lost("w1", 1), left("w1", 1), draining("w1", 1)])
def test_words_about_another_incarnation_do_not_count(step: Step) -> None:
    scene = at_work()
    assert scene.when(step) == SUPERSEDED
    assert not scene.worker().draining


@pytest.mark.parametrize("said", [events.WorkerLeft(incarnation=1), events.WorkerDraining(incarnation=1)])
def test_words_of_a_worker_that_is_not_there_do_not_count(said: Any) -> None:
    assert given(elected()).when(says(said, "w1")) == SUPERSEDED


def test_a_suspect_that_reports_is_none_any_more() -> None:
    scene = at_work(submitted("a", retry=RETRY), assigned("a"), lost("w1"), joined("w1"), assigned("a"))
    assert scene.worker().suspects == 1
    scene.given(failed("a"))
    assert (scene.task("a").suspect, scene.worker().suspects) == (False, 0)


def test_what_workers_use_is_given_back_to_the_last_fraction() -> None:
    scene = given(elected(), joined("w1", slots=9, cpu=1.0))
    names = [f"a{number}" for number in range(7)]
    scene.given(*(submitted(name, needs=events.Needs(cpu=0.1, memory_mb=5, gpus=1)) for name in names))
    scene.given(*map(assigned, names), *map(completed, names))
    worker = scene.worker()
    assert (worker.used_cpu, worker.used_memory_mb, worker.used_gpus, worker.quick_us, worker.slow) == (
        0.0,
        0,
        0,
        0,
        0,
    )


# Leaders -------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 4, 99])
def test_an_election_counts_if_it_is_the_next(epoch: int) -> None:
    scene = given(elected(), elected(2, "m2"))
    verdict = scene.when(elected(epoch, "m3"))
    assert verdict.kind is Kind.QUARANTINED
    assert (scene.state.epoch, scene.state.leader, scene.state.elected_seq) == (2, "m2", 2)
    assert scene.when(elected(3, "m3")) == APPLIED


def test_an_election_on_another_subject_is_none() -> None:
    verdict = Scene().when(says(events.LeaderElected(epoch=1, master="m1"), "m1"))
    assert (verdict.kind, verdict.reason) == (Kind.QUARANTINED, Reason.CONFLICT)


@pytest.mark.parametrize("epoch", [1, 3])
def test_only_the_leader_in_office_decides(epoch: int) -> None:
    scene = at_work(submitted("a"), elected(2, "m2"))
    verdict = scene.when(assigned("a", epoch=epoch))
    assert (verdict.kind, verdict.reason) == (Kind.SUPERSEDED, Reason.UNFENCED)
    assert scene.when(assigned("a", epoch=2)) == APPLIED


DECISIONS: Final[list[Step]] = [
    decides(events.TaskTimedOut, "a", epoch=1),
    decides(events.TaskCancelled, "a", epoch=1),
    decides(events.TaskQuarantined, "a", epoch=1, reason="losses"),
    decides(events.WorkflowCompleted, "a", epoch=1, state="completed"),
    says(events.WorkerLost(worker="w1", incarnation=2), MASTER, 1),
    says(events.PolicyChanged(policy=events.Policy(version=7)), MASTER, 1),
    says(events.EventRejected(seq=1, index=0, client="cli", reason="r"), MASTER, 1),
    says(events.TaskRetried(id="a", attempt=0), MASTER, 1),
    says(events.TaskStop(id="a", attempt=0, incarnation=2), "w1", 1),
]


@pytest.mark.parametrize("step", DECISIONS)
def test_nothing_decided_in_an_old_term_changes_anything(step: Step) -> None:
    scene = at_work(submitted("a"), elected(2, "m2"))
    before = scene.task("a").state
    verdict = scene.when(step)
    assert (verdict.kind, verdict.reason) == (Kind.SUPERSEDED, Reason.UNFENCED)
    assert scene.task("a").state is before
    assert scene.state.policy.version == 1


def test_policies_change() -> None:
    scene = at_work(policy(strategy="bin_packing", version=3))
    assert (scene.state.policy.strategy, scene.state.policy.version) == ("bin_packing", 3)


# Bad input -----------------------------------------------------------------------------


def test_a_bad_event_of_a_client_is_answered() -> None:
    scene = given(elected())
    (verdict,) = scene.write(wire.event(NAMESPACE, "task.submitted", "app"), b'{"id":"a.b","function":"f"}')
    assert (verdict.kind, verdict.reason) == (Kind.REJECTED, Reason.BAD_ID)
    (answer,) = decided_in(scene.lead(), events.EventRejected)
    assert (answer.seq, answer.index, answer.client, answer.reason, answer.id) == (
        2,
        0,
        "app",
        "bad_id",
        "a.b",
    )
    assert not scene.state.answers
    assert scene.when(says(answer, MASTER)) == SUPERSEDED


def test_a_bad_message_of_a_client_is_answered_as_a_whole() -> None:
    scene = given(elected())
    scene.write(wire.event(NAMESPACE, "task.submitted", "app"), b"not json")
    (answer,) = decided_in(scene.lead(), events.EventRejected)
    assert (answer.seq, answer.index, answer.reason) == (2, -1, "not_json")


@pytest.mark.parametrize(
    ("subject", "data"),
    [
        ("af.test.task.completed.w1", b"not json"),
        ("af.test.task.completed.w1", b"{}"),
        ("af.test.worker.joined.w1", b'{"instance":"i","slots":0}'),
        ("af.test.task.assigned.w1", b'{"id":"a","attempt":1,"incarnation":1}'),
        ("af.test.leader.elected.epoch", b'{"stream":"AF_test","seq":7}'),
        ("af.test.task.unheard_of.cli", b"{}"),
        ("af.test.nonsense", b"{}"),
    ],
)
def test_bad_input_of_others_is_quarantined(subject: str, data: bytes) -> None:
    scene = given(elected())
    (verdict,) = scene.write(subject, data)
    assert verdict.kind is Kind.QUARANTINED
    assert scene.state.quarantined == 1
    assert not scene.plan()


def test_one_bad_among_999_good_ones() -> None:
    items = [encode(events.TaskSubmitted(id=f"a{number}", function="f")) for number in range(1_000)]
    items[7] = b'{"id":"a7","function":5}'
    scene = Scene()
    verdicts = scene.write(wire.event(NAMESPACE, "task.submitted", "cli"), b"[" + b",".join(items) + b"]")
    assert verdicts.count(APPLIED) == 999
    assert refused(verdicts[7]) is Reason.BAD_TYPE
    assert len(scene.state.tasks) == 999
    assert [(answer.seq, answer.index) for answer in scene.state.answers.values()] == [(1, 7)]


def test_answers_are_bounded() -> None:
    scene = given(elected())
    data = b"[" + b",".join([b"1"] * 5_000) + b"]"
    verdicts = [scene.write(wire.event(NAMESPACE, "task.submitted", "cli"), data) for _ in range(3)]
    assert len(scene.state.answers) == ANSWERS_MAX
    assert {verdict.kind for verdict in verdicts[1]} == {Kind.REJECTED}
    assert {verdict.kind for verdict in verdicts[2]} == {Kind.QUARANTINED}
    assert (scene.state.rejected, scene.state.quarantined) == (ANSWERS_MAX, 5_000)


# Time ----------------------------------------------------------------------------------


def clock_after(*times_ms: int) -> list[int]:
    scene = Scene()
    clocks: list[int] = []
    for time_ms in times_ms:
        scene.now_ms = time_ms
        scene.given(submitted())
        clocks.append(scene.state.clock_ms)
    return clocks


def test_log_time_is_server_time() -> None:
    assert clock_after(1_000, 1_500, 1_500, 2_000) == [1_000, 1_500, 1_500, 2_000]


def test_log_time_stands_still_when_the_servers_clock_goes_back_and_goes_on_from_there() -> None:
    assert clock_after(5_000, 1_000, 1_200, 5_000) == [5_000, 5_000, 5_200, 9_000]


def test_log_time_never_goes_back() -> None:
    assert clock_after(100, 0, 50, 0, 70) == [100, 100, 150, 150, 220]


# Properties ----------------------------------------------------------------------------

SEEDS: Final = st.integers(0, 2**32)


@given_any(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_any_history_folds(seed: int) -> None:
    """Valid events, mutated bytes, wrong roles, wrong epochs: a verdict for each, and never an error."""
    history = History(seed)
    state = Namespace(NAMESPACE)
    for message in history.run(60):
        assert all(isinstance(verdict, Verdict) for verdict in fold_message(state, message))
    assert_consistent(state)


def assert_consistent(state: Namespace) -> None:
    """What the state says twice, it says alike."""
    held = [task for worker in state.workers.values() for task in worker.held.values()]
    running = [task for task in state.tasks.values() if task.state is State.RUNNING]
    queued = [task for line in state.queue.all_waiting() for task in line.tasks(1.0)]
    waiting = [task for task in state.tasks.values() if task.state is State.READY and task.cancel is None]
    assert {task.id for task in held} == {task.id for task in running}
    assert len(held) == state.running
    assert {task.id for task in queued} == {task.id for task in waiting}
    assert len(queued) == state.queue.size
    assert sum(terms.users for terms in state.terms.values()) == len(state.tasks)
    assert sum(line.users for line in state.queue.lines.values()) == len(state.terms)
    for worker in state.workers.values():
        mine = worker.held.values()
        assert worker.quick_us == sum(task.quick_us for task in mine)
        assert worker.slow == sum(not task.quick_us for task in mine)
        assert worker.suspects == sum(task.suspect for task in mine)
        assert worker.used_memory_mb == sum(task.terms.demand.memory_mb for task in mine)
        assert worker.used_cpu == pytest.approx(sum(task.terms.demand.cpu for task in mine))
    for workflow in state.workflows.values():
        ended = [task for task in workflow.tasks.values() if task.node and task.node.end_seq]
        assert workflow.open == len(workflow.tasks) - len(ended) > 0
        assert sum(workflow.counts.values()) == len(ended)


@given_any(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_folding_in_two_halves_is_folding_at_once(seed: int, share: float) -> None:
    messages = History(seed).run(60)
    cut = int(len(messages) * share)
    assert dump(fold_all(messages[cut:], fold_all(messages[:cut]))) == dump(fold_all(messages))


@given_any(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_redelivery_of_any_stretch_changes_nothing(seed: int, share: float) -> None:
    messages = History(seed).run(60)
    state = fold_all(messages)
    before = dump(state)
    for message in messages[int(len(messages) * share) :]:
        assert fold_message(state, message) == []
    assert dump(state) == before


@given_any(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_planning_in_between_changes_nothing(seed: int) -> None:
    """A leader, which plans, and a follower, which does not, come to the same."""
    history = History(seed)
    messages = history.run(60)
    history.scene.state.ended.clear()
    assert dump(history.scene.state) == dump(fold_all(messages))


_FOLD: Final = """
from tests.unit.dump import digest
from tests.unit.given import fold_all
from tests.unit.histories import History
print([digest(fold_all(History(seed).run(150))) for seed in range(5)])
"""


def test_the_order_of_hashes_makes_no_difference() -> None:
    root = Path(__file__).parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", _FOLD],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{root}{os.pathsep}{root / 'core'}"},
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(next(iter(found))) > 5 * 64


def test_every_kind_of_event_means_something() -> None:
    assert set(MEANING) == set(KINDS.values())
