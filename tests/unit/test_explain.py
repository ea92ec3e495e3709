"""Why a task waits, and why it went where it went: what the plan saw."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events
from agentflow.domain.explain import Cause, Waiting, lacks, why_there, why_waits
from agentflow.domain.life import State
from agentflow.domain.plan import plan
from agentflow.domain.policies import eligible
from agentflow.domain.queue import Demand
from agentflow.domain.snapshot import restore, snapshot
from agentflow.limits import LEVEL
from tests.unit.dump import dump
from tests.unit.given import (
    Scene,
    acquired,
    assigned,
    assigned_in,
    cancel_requested,
    completed,
    declined,
    draining,
    elected,
    failed,
    flow,
    given,
    joined,
    policy,
    submitted,
)
from tests.unit.histories import STRATEGIES, History

RETRY = events.Retry(max_attempts=3, backoff_s=2.0, jitter=0.0)


def why(scene: Scene, task: str) -> Waiting:
    return why_waits(scene.state, scene.task(task), scene.now_ms)


def refusals(waiting: Waiting) -> dict[str, str]:
    return {each.worker: "; ".join(each.refused) for each in waiting.candidates}


def test_a_dependency_that_is_not_completed_is_named() -> None:
    scene = given(elected(), joined("w1"), flow("f", {"a": [], "b": [], "c": ["a", "b"]}))
    scene.given(assigned("f/a"), completed("f/a"))
    found = why(scene, "f/c")
    assert (found.cause, found.dependencies) == (Cause.DEPENDENCIES, ["b (ready)"])


def test_a_backoff_tells_its_end() -> None:
    scene = given(elected(), joined("w1"), submitted("a", retry=RETRY), assigned("a"), failed("a", "broken"))
    found = why(scene, "a")
    assert (found.cause, found.until_ms) == (Cause.BACKOFF, scene.task("a").due_ms)
    assert "broken" in found.text


def test_a_cancellation_waits_for_the_leader() -> None:
    scene = given(elected(), submitted("a"), cancel_requested("a", "not needed"))
    assert why(scene, "a").cause is Cause.CANCEL
    assert "not needed" in why(scene, "a").text


def test_before_any_election_there_is_no_leader() -> None:
    assert why(given(submitted("a")), "a").cause is Cause.NO_LEADER


def test_without_workers_there_is_none() -> None:
    found = why(given(elected(), submitted("a")), "a")
    assert (found.cause, found.text) == (Cause.UNFIT, "there is no worker")


def test_each_worker_is_told_what_it_lacks() -> None:
    needs = events.Needs(cpu=4, group="big", labels={"disk": "ssd"})
    scene = given(
        elected(),
        joined("small", cpu=2.0, group="big", labels={"disk": "ssd"}),
        joined("other", cpu=8.0, group="misc"),
        joined("ignorant", cpu=8.0, group="big", labels={"disk": "ssd"}, functions=[]),
        submitted("a", needs=needs),
    )
    found = why(scene, "a")
    assert found.cause is Cause.UNFIT
    assert refusals(found) == {
        "small": "has 2 cpu, not 4",
        "other": "is of group misc, not big; has disk=(nothing), not ssd",
        "ignorant": "does not know app.work",
    }


def test_a_draining_worker_takes_nothing() -> None:
    found = why(given(elected(), joined("w1"), submitted("a"), draining("w1")), "a")
    assert (found.cause, refusals(found)) == (Cause.UNFIT, {"w1": "is draining"})


def test_full_workers_are_busy() -> None:
    scene = given(elected(), joined("w1", slots=1), submitted("a"), submitted("b"), assigned("a"))
    found = why(scene, "b")
    assert (found.cause, refusals(found)) == (Cause.BUSY, {"w1": "all 1 slots are taken"})


def test_a_worker_that_has_too_little_left_is_busy() -> None:
    half = events.Needs(cpu=0.6)
    scene = given(elected(), joined("w1", slots=4, cpu=1.0), submitted("a", needs=half), assigned("a"))
    found = why(scene.given(submitted("b", needs=half)), "b")
    assert (found.cause, refusals(found)) == (Cause.BUSY, {"w1": "has 0.4 cpu free, not 0.6"})


def test_a_worker_that_declined_is_not_asked_again_at_once() -> None:
    scene = given(elected(), joined("w1"), submitted("a"), assigned("a"), declined("a"))
    found = why(scene.after(1_000), "a")
    assert found.cause is Cause.BUSY
    assert refusals(found) == {"w1": "declined it and is not asked again for 4.0 s"}


def test_those_of_its_kind_come_first() -> None:
    scene = given(elected(), joined("w1"), submitted("a"), assigned("a"))
    scene.given(submitted("b", priority="high"), submitted("c"), submitted("d"))
    found = why(scene, "d")
    assert found.cause is Cause.QUEUE
    assert found.ahead is not None
    assert (found.ahead.priority, found.ahead.earlier, found.ahead.alike) == (1, 1, 2)
    assert refusals(found) == {"w1": "all 1 slots are taken"}


def test_who_waits_long_comes_first() -> None:
    scene = given(elected(), submitted("a", priority=0)).after(600_000)
    found = why(scene.given(submitted("b", priority=500)), "b")
    assert found.ahead is not None
    assert (found.ahead.ageing, found.ahead.count) == (1, 1)


def test_another_task_runs_under_its_lock() -> None:
    scene = Scene().given(elected(level=LEVEL), joined("w1", slots=4, level=LEVEL))
    scene.given(submitted("a", lock="l1"), assigned("a"), submitted("b", lock="l1"))
    found = why(scene, "b")
    assert found.cause is Cause.LOCK
    assert "a runs under the lock l1" in found.text


def test_another_task_gets_its_lock_first() -> None:
    scene = Scene().given(elected(level=LEVEL), joined("w1", slots=4, level=LEVEL))
    scene.given(acquired("other", 1), submitted("a", lock="l1"), submitted("b", lock="l1"))
    found = why(scene, "b")
    assert found.cause is Cause.LOCK
    assert "a comes before it" in found.text


def test_nothing_may_keep_it() -> None:
    found = why(given(elected(), joined("w1"), submitted("a")), "a")
    assert (found.cause, found.text) == (Cause.DUE, "nothing keeps it: the next plan sends it to w1")


@pytest.mark.parametrize(
    ("strategy", "chosen", "said"),
    [
        ("least_loaded", "w2", "least loaded: w2 had 0.00"),
        ("round_robin", "w2", "comes next by name"),
        ("bin_packing", "w1", "w1 was the fullest, 0.33"),
    ],
)
def test_the_strategy_explains_its_choice(strategy: str, chosen: str, said: str) -> None:
    scene = given(elected(), policy(strategy=strategy), joined("w1", slots=3), joined("w2", slots=3))
    scene.given(joined("w3", functions=[]), submitted("a"), assigned("a", "w1"), submitted("b"))
    found = why_there(scene.state, scene.task("b"), scene.now_ms)
    assert found.worker == chosen
    assert said in found.text
    assert [each.refused for each in found.candidates] == [[], [], ["does not know app.work"]]


def test_the_only_one_that_can_is_called_so() -> None:
    scene = given(elected(), joined("w1"), joined("w2"), submitted("a"), assigned("a", "w1"), submitted("b"))
    assert why_there(scene.state, scene.task("b"), scene.now_ms).text == (
        "w2 was the only one that could take it"
    )


SEEDS = st.integers(0, 2**32)


@with_random(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_explanation_agrees_with_the_plan(seed: int) -> None:
    """For every ready task of random histories: sent where the plan sends it, and kept for a cause if it is not."""
    history = History(seed)
    history.run(60)
    state, now_ms = history.scene.state, history.scene.now_ms
    sent = {task: worker for worker, tasks in assigned_in(plan(state, now_ms)).items() for task in tasks}
    before = dump(state)
    for task in [task for task in state.tasks.values() if task.state is State.READY and task.cancel is None]:
        found, there = why_waits(state, task, now_ms), why_there(state, task, now_ms)
        assert there.worker == sent.get(task.id, "")
        assert (found.cause is Cause.DUE) == (task.id in sent)
        able = {each.worker for each in there.candidates if not each.refused}
        assert (there.worker in able) if there.worker else (found.cause is not Cause.BUSY or not able)
    assert dump(state) == before


@with_random(
    demand=st.builds(
        Demand,
        function=st.sampled_from(("", "app.work", "app.other")),
        cpu=st.sampled_from((0.0, 1.0, 1.0 + 1e-12, 2.0)),
        memory_mb=st.sampled_from((0, 250, 251)),
        gpus=st.sampled_from((0, 1)),
        group=st.sampled_from(("", "g", "h")),
        labels=st.sampled_from(((), (("a", "b"),))),
        lock=st.sampled_from(("", "l1")),
    ),
    level=st.sampled_from((1, LEVEL)),
    labels=st.sampled_from(({}, {"a": "b"}, {"a": "c"})),
)
def test_a_worker_lacks_something_exactly_if_it_is_not_eligible(
    demand: Demand, level: int, labels: dict[str, str]
) -> None:
    worker = given(joined("w1", cpu=1.0, memory_mb=250, group="g", level=level, labels=labels)).worker()
    assert bool(lacks(demand, worker)) != eligible(demand, worker)


class Plans(Scene):
    """A scene that keeps, for each plan carried out, what was known and what came of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kept: list[tuple[bytes, int, tuple[Any, ...], Any]] = []

    def plan(self, *silences: Any) -> Any:
        known = snapshot(self.state)
        made = super().plan(*silences)
        self.kept.append((known, self.now_ms, silences, made))
        return made


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_a_plan_made_again_on_its_basis_is_the_same(seed: int, strategy: str) -> None:
    history = History(seed)
    history.scene = scene = Plans()
    scene.given(policy(strategy=strategy))
    history.run(80)
    assert sum(bool(made) for *_, made in scene.kept) > 5
    for known, now_ms, silences, made in scene.kept:
        assert plan(restore(known, knows=LEVEL), now_ms, silences) == made
