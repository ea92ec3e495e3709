"""Policies: when to try again, and which worker to take."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from agentflow.domain.policies import backoff_ms, retries
from agentflow.events import Needs, Retry
from agentflow.limits import ATTEMPTS_MAX, SECONDS_MAX
from tests.unit.given import FUNCTION, Scene, assigned_in, elected, given, joined, policy, submitted

# Trying again --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry", "spent", "error", "retryable", "expected"),
    [
        (None, 1, "error", True, False),
        (Retry(max_attempts=3), 1, "error", True, True),
        (Retry(max_attempts=3), 2, "error", True, True),
        (Retry(max_attempts=3), 3, "error", True, False),
        (Retry(max_attempts=1), 1, "error", True, False),
        (Retry(max_attempts=3), 1, "error", False, False),
        (Retry(max_attempts=3, non_retryable=["exit", "timeout"]), 1, "timeout", True, False),
        (Retry(max_attempts=3, non_retryable=["exit"]), 1, "error", True, True),
    ],
)
def test_whether_to_try_again(
    retry: Retry | None, spent: int, error: str, retryable: bool, expected: bool
) -> None:
    assert retries(retry, spent, error, retryable=retryable) is expected


def test_backoff_doubles_up_to_its_limit() -> None:
    retry = Retry(max_attempts=9, backoff_s=1.0, backoff_factor=2.0, backoff_s_max=10.0, jitter=0.0)
    assert [backoff_ms(retry, failures, "a") for failures in range(1, 7)] == [
        1_000,
        2_000,
        4_000,
        8_000,
        10_000,
        10_000,
    ]


def test_without_terms_there_is_no_wait() -> None:
    assert backoff_ms(None, 1, "a") == 0


@given_any(
    retry=st.builds(
        Retry,
        backoff_s=st.floats(0, SECONDS_MAX),
        backoff_s_max=st.floats(0, SECONDS_MAX),
        backoff_factor=st.floats(1, 1_000),
        jitter=st.floats(0, 1),
    ),
    failures=st.integers(1, ATTEMPTS_MAX),
    task=st.text(max_size=5),
)
def test_backoff_stays_within_its_bounds(retry: Retry, failures: int, task: str) -> None:
    wait_ms = backoff_ms(retry, failures, task)
    assert 0 <= wait_ms <= retry.backoff_s_max * 1_000
    assert wait_ms >= int(min(retry.backoff_s, retry.backoff_s_max) * (1 - retry.jitter) * 1_000) - 1


def test_jitter_spreads_tasks_and_is_the_same_everywhere() -> None:
    retry = Retry(backoff_s=100.0, jitter=0.5)
    waits = [backoff_ms(retry, 1, f"task-{number}") for number in range(200)]
    assert waits == [backoff_ms(retry, 1, f"task-{number}") for number in range(200)]
    assert min(waits) < 60_000
    assert max(waits) > 90_000


# Strategies ----------------------------------------------------------------------------


def cluster(strategy: str, *slots: int, tasks: int) -> Scene:
    """Workers w1, w2 ... with so many slots, and tasks a0, a1 ... waiting."""
    scene = given(elected(), policy(strategy=strategy))
    scene.given(*(joined(f"w{number}", slots=count) for number, count in enumerate(slots, 1)))
    return scene.given(*(submitted(f"a{number}") for number in range(tasks)))


def test_least_loaded_evens_out_by_slots() -> None:
    placed = assigned_in(cluster("least_loaded", 2, 4, tasks=3).plan())
    assert placed == {"w1": ["a0"], "w2": ["a1", "a2"]}


def test_least_loaded_takes_the_first_that_joined_among_equals() -> None:
    scene = given(elected(), joined("w9"), joined("w1"), submitted("a"))
    assert assigned_in(scene.plan()) == {"w9": ["a"]}


def test_round_robin_takes_turns_by_name() -> None:
    placed = assigned_in(cluster("round_robin", 9, 9, 9, tasks=7).plan())
    assert placed == {"w1": ["a0", "a3", "a6"], "w2": ["a1", "a4"], "w3": ["a2", "a5"]}


def test_round_robin_goes_on_where_it_was() -> None:
    scene = cluster("round_robin", 9, 9, tasks=1)
    scene.lead()
    assert assigned_in(scene.given(submitted("b")).plan()) == {"w2": ["b"]}


def test_round_robin_takes_turns_across_lines() -> None:
    scene = given(elected(), policy(strategy="round_robin"))
    functions = [f"app.f{number}" for number in range(6)]
    scene.given(*(joined(worker, slots=9, functions=functions) for worker in ("w1", "w2", "w3")))
    scene.given(
        *(
            submitted(function, function=f"app.{function}")
            for function in ("f0", "f1", "f2", "f3", "f4", "f5")
        )
    )
    placed = assigned_in(scene.plan())
    assert {worker: len(tasks) for worker, tasks in placed.items()} == {"w1": 2, "w2": 2, "w3": 2}


def test_random_spreads_and_is_the_same_everywhere() -> None:
    placed = assigned_in(cluster("random", 99, 99, 99, tasks=90).plan())
    assert all(15 <= len(tasks) <= 45 for tasks in placed.values())
    assert placed == assigned_in(cluster("random", 99, 99, 99, tasks=90).plan())


def test_bin_packing_fills_one_before_the_next() -> None:
    placed = assigned_in(cluster("bin_packing", 3, 3, 3, tasks=5).plan())
    assert placed == {"w1": ["a0", "a1", "a2"], "w2": ["a3", "a4"]}


@pytest.mark.parametrize("strategy", ["least_loaded", "round_robin", "random", "bin_packing"])
def test_nobody_gets_more_than_fits(strategy: str) -> None:
    scene = cluster(strategy, 2, 3, tasks=9)
    placed = assigned_in(scene.plan())
    assert {worker: len(tasks) for worker, tasks in placed.items()} == {"w1": 2, "w2": 3}
    scene.lead()
    assert not scene.plan()


@pytest.mark.parametrize("strategy", ["round_robin", "random", "bin_packing", "least_loaded"])
def test_nobody_waits_ahead_while_somebody_is_idle(strategy: str) -> None:
    scene = given(elected(), policy(strategy=strategy))
    scene.given(*(joined(f"w{number}", slots=2, ahead=100) for number in (1, 2, 3)))
    scene.state.expectations[FUNCTION] = 10
    scene.given(*(submitted(f"a{number}") for number in range(6)))
    assert {worker: len(tasks) for worker, tasks in assigned_in(scene.plan()).items()} == {
        "w1": 2,
        "w2": 2,
        "w3": 2,
    }


# What a task asks for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "worker", "fits"),
    [
        ({}, {}, True),
        ({"cpu": 2.0}, {"cpu": 2.0}, True),
        ({"cpu": 2.1}, {"cpu": 2.0}, False),
        ({"memory_mb": 512}, {"memory_mb": 512}, True),
        ({"memory_mb": 513}, {"memory_mb": 512}, False),
        ({"gpus": 1}, {"gpus": 1}, True),
        ({"gpus": 1}, {}, False),
        ({"group": "gpu"}, {"group": "gpu"}, True),
        ({"group": "gpu"}, {"group": "cpu"}, False),
        ({"group": "gpu"}, {}, False),
        ({}, {"group": "gpu"}, True),
        ({"labels": {"zone": "a"}}, {"labels": {"zone": "a", "disk": "ssd"}}, True),
        ({"labels": {"zone": "a"}}, {"labels": {"zone": "b"}}, False),
        ({"labels": {"zone": "a", "disk": "ssd"}}, {"labels": {"zone": "a"}}, False),
        ({}, {"functions": []}, False),
    ],
)
def test_a_task_goes_where_it_fits(needs: dict[str, Any], worker: dict[str, Any], fits: bool) -> None:
    scene = given(elected(), joined("w1", **worker), submitted("a", needs=Needs(**needs)))
    assert assigned_in(scene.plan()) == ({"w1": ["a"]} if fits else {})


def test_a_script_needs_no_function() -> None:
    assert assigned_in(given(elected(), joined("w1", functions=[]), submitted("a", shell="true")).plan()) == {
        "w1": ["a"]
    }


@pytest.mark.parametrize(
    ("asked", "has", "fit"),
    [
        ({"cpu": 0.1}, {"cpu": 1.0}, 10),
        ({"memory_mb": 300}, {"memory_mb": 1000}, 3),
        ({"gpus": 1}, {"gpus": 2}, 2),
    ],
)
def test_amounts_are_shared_out(asked: dict[str, Any], has: dict[str, Any], fit: int) -> None:
    scene = given(elected(), joined("w1", slots=50, **has))
    scene.given(*(submitted(f"a{number}", needs=Needs(**asked)) for number in range(20)))
    assert len(assigned_in(scene.plan())["w1"]) == fit
    scene.lead()
    assert not scene.plan()


def test_a_plain_task_passes_one_that_waits_for_memory() -> None:
    scene = given(elected(), joined("w1", slots=5, memory_mb=100))
    scene.given(
        submitted("big", needs=Needs(memory_mb=80)),
        submitted("big2", needs=Needs(memory_mb=80)),
        submitted("small"),
    )
    assert assigned_in(scene.plan()) == {"w1": ["big", "small"]}
