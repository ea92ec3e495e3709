"""Tasks that name a lock: at most one of them is assigned at a time, whatever else differs."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events
from agentflow.domain.life import State
from agentflow.domain.plan import Silence
from agentflow.domain.state import APPLIED, SUPERSEDED, Namespace
from agentflow.limits import LEVEL
from tests.unit.dump import dump
from tests.unit.given import (
    NAMESPACE,
    Scene,
    Step,
    assigned,
    assigned_in,
    cancel_requested,
    completed,
    decided_in,
    declined,
    draining,
    elected,
    failed,
    flow,
    fold_message,
    given,
    joined,
    left,
    lost,
    master_joined,
    policy,
    raised,
    started,
    submitted,
)
from tests.unit.histories import STRATEGIES, History


def at_work(*steps: Step, slots: int = 9) -> Scene:
    """A leader and a worker of level 2, and what came next."""
    worker = joined("w1", slots=slots, ahead=9, level=LEVEL, cpu=9.0, memory_mb=900, gpus=9)
    return given(*raised(), worker, *steps)


def locked(task: str, lock: str = "l", **terms: Any) -> Step:
    return submitted(task, lock=lock, **terms)


# One at a time -------------------------------------------------------------------------


def test_the_first_goes_the_others_wait() -> None:
    scene = at_work(locked("a"), locked("b"), locked("c"))
    assert assigned_in(scene.plan()) == {"w1": ["a"]}
    scene.lead()
    assert scene.state.lock_users == {"l": "a"}
    assert not scene.plan()


def test_an_assignment_names_the_lock() -> None:
    (assignment,) = decided_in(at_work(locked("a")).plan(), events.TaskAssigned)
    assert assignment.lock == "l"


def test_demands_differ_the_lock_is_one() -> None:
    """They wait in lines of their own, and still only the best of all goes."""
    scene = at_work(
        locked("a", shell="true"),
        locked("b", needs=events.Needs(cpu=1.0)),
        locked("c", priority="high"),
        locked("d", needs=events.Needs(memory_mb=5)),
    )
    order: list[str] = []
    while scene.lead():
        (task,) = scene.running_at("w1")
        order.append(task)
        scene.given(completed(task))
    assert order == ["c", "a", "b", "d"]


def test_other_locks_and_none_do_not_wait() -> None:
    scene = at_work(locked("a"), locked("b"), locked("c", "m"), submitted("d"))
    assert assigned_in(scene.plan()) == {"w1": ["a", "c", "d"]}


def test_a_lock_in_use_holds_up_nobody_else() -> None:
    scene = at_work(locked("a", priority="urgent"), locked("b", priority="urgent"), submitted("c"), slots=2)
    assert assigned_in(scene.plan()) == {"w1": ["a", "c"]}


def test_tasks_of_a_workflow_wait_like_others() -> None:
    scene = at_work(flow("f", {"a": [], "b": [], "c": []}, lock="l"), locked("x"))
    assert assigned_in(scene.plan()) == {"w1": ["f/a"]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_respects_locks(strategy: str) -> None:
    scene = at_work(policy(strategy=strategy), joined("w2", slots=9, level=LEVEL))
    scene.given(*(locked(f"a{number}") for number in range(5)))
    assert sum(map(len, assigned_in(scene.plan()).values())) == 1


def test_one_that_may_go_nowhere_does_not_keep_the_lock() -> None:
    scene = at_work(locked("a", needs=events.Needs(gpus=99)), locked("b"))
    assert assigned_in(scene.plan()) == {"w1": ["b"]}


def test_one_that_was_declined_does_not_either() -> None:
    scene = at_work(locked("a"), locked("b"))
    scene.lead()
    scene.given(declined("a"))
    assert assigned_in(scene.plan()) == {"w1": ["b"]}


def test_a_second_assignment_under_a_lock_does_not_count() -> None:
    scene = at_work(locked("a"), locked("b"), assigned("a"))
    assert scene.when(assigned("b")) == SUPERSEDED
    assert (scene.status("b"), scene.state.lock_users) == ("ready", {"l": "a"})
    assert scene.given(completed("a")).when(assigned("b")) == APPLIED


# Who may run them ----------------------------------------------------------------------


def test_only_workers_that_know_locks_get_them() -> None:
    scene = given(*raised(), joined("old", slots=9), locked("a"), submitted("b"))
    assert assigned_in(scene.plan()) == {"old": ["b"]}
    scene.given(joined("new", slots=9, level=LEVEL))
    assert assigned_in(scene.plan())["new"] == ["a"]


# It is free again ----------------------------------------------------------------------

RETRY: Final = events.Retry(max_attempts=2, backoff_s=5.0)
ENDS: Final[dict[str, list[Step]]] = {
    "completed": [completed("a")],
    "failed": [failed("a")],
    "started and completed": [started("a"), completed("a")],
    "declined": [declined("a")],
    "stopped": [cancel_requested("a"), failed("a", "stopped")],
    "worker lost": [lost("w1"), joined("w1", level=LEVEL)],
    "worker lost while it ran": [started("a"), lost("w1"), joined("w1", level=LEVEL)],
    "worker left": [left("w1"), joined("w1", level=LEVEL)],
    "worker drained and left": [draining("w1"), left("w1"), joined("w1", level=LEVEL)],
    "worker started anew": [joined("w1", level=LEVEL)],
}


@pytest.mark.parametrize("end", ENDS)
def test_when_the_task_has_ended_or_its_worker_is_gone(end: str) -> None:
    scene = at_work(locked("a"), locked("b"), assigned("a"), *ENDS[end])
    assert not scene.state.lock_users
    (task,) = (task for tasks in assigned_in(scene.plan()).values() for task in tasks)
    assert task in {"a", "b"}


def test_while_it_backs_off_others_go() -> None:
    scene = at_work(locked("a", retry=RETRY), locked("b"), assigned("a"), failed("a"))
    assert scene.status("a") == "pending"
    assert assigned_in(scene.plan()) == {"w1": ["b"]}


def test_not_while_its_worker_only_drains() -> None:
    scene = at_work(locked("a"), locked("b"), joined("w2", level=LEVEL), assigned("a"), draining("w1"))
    assert not scene.plan()


def test_not_in_the_plan_that_gives_its_worker_up() -> None:
    """What it held is free when the loss is in the log, not before."""
    scene = at_work(locked("a"), locked("b"), assigned("a"), joined("w2", level=LEVEL))
    made = scene.plan(Silence("w1", scene.worker("w1").incarnation, "silent"))
    assert not assigned_in(made)
    scene.carry_out(made)
    assert list(assigned_in(scene.plan())) == ["w2"]


def test_a_task_that_is_cancelled_while_it_waits_leaves_it_alone() -> None:
    scene = at_work(locked("a"), locked("b"), assigned("a"), cancel_requested("b"))
    scene.lead()
    assert (scene.status("b"), scene.state.lock_users) == ("cancelled", {"l": "a"})


def test_nor_does_the_next_leader_forget_it() -> None:
    scene = at_work(locked("a"), locked("b"), master_joined("m2"), assigned("a"), elected(master="m2"))
    assert not scene.plan()


# Properties ----------------------------------------------------------------------------

SEEDS: Final = st.integers(0, 2**32)


def assert_one_each(state: Namespace) -> None:
    """What runs under locks, by the tasks and by the fold's own account."""
    running = [task for task in state.tasks.values() if task.state is State.RUNNING]
    under = [(task.terms.demand.lock, task.id) for task in running if task.terms.demand.lock]
    assert len(under) == len(dict(under))
    assert dict(under) == state.lock_users


@given_any(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_one_task_runs_under_a_lock(seed: int) -> None:
    """At every position of any history, nonsense and all."""
    state = Namespace(NAMESPACE)
    for message in History(seed, level=2).run(60):
        fold_message(state, message)
        assert_one_each(state)


@given_any(seed=SEEDS, strategy=st.sampled_from(STRATEGIES))
@settings(max_examples=30, deadline=None)
def test_no_plan_assigns_two_under_one_lock(seed: int, strategy: str) -> None:
    history = History(seed, level=2)
    history.run(60)
    scene = history.scene.given(policy(strategy=strategy), joined("w1", slots=9, ahead=9, level=LEVEL))
    scene.given(*(locked(f"x{number}", "l1", priority=number) for number in range(3)))
    before = dump(scene.state)
    chosen = [event.lock for event in decided_in(scene.plan(), events.TaskAssigned) if event.lock]
    assert len(chosen) == len(set(chosen))
    assert not set(chosen) & scene.state.lock_users.keys()
    assert dump(scene.state) == before
