"""The queue: rank, lanes, lines, and what leaves early."""

from __future__ import annotations

import random
from typing import Final

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from agentflow.domain.queue import Line
from agentflow.domain.state import Task
from agentflow.events import Needs
from tests.unit.given import (
    Scene,
    assigned,
    cancel_requested,
    declined,
    elected,
    given,
    joined,
    left,
    lost,
    policy,
    reprioritized,
    submitted,
)

AGEING: Final = 1.0


def order(scene: Scene, count: int = 1_000) -> list[str]:
    """Ids of waiting tasks, next first."""
    return [task.id for task in scene.state.queue.head(count, scene.state.policy.ageing_per_s)]


def lines(scene: Scene) -> list[Line]:
    return list(scene.state.queue.all_waiting())


def test_first_in_first_out_within_a_priority() -> None:
    assert order(given(submitted("a"), submitted("b"), submitted("c"))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("first", "second"), [(500, 501), ("low", "medium"), ("medium", "high"), ("high", "urgent")]
)
def test_the_higher_priority_comes_first(first: int | str, second: int | str) -> None:
    assert order(given(submitted("a", priority=first), submitted("b", priority=second))) == ["b", "a"]


def test_waiting_makes_up_for_priority() -> None:
    scene = given(submitted("low", priority=250)).after(251_000).given(submitted("medium", priority=500))
    assert order(scene) == ["low", "medium"]
    scene = given(submitted("low", priority=250)).after(249_000).given(submitted("medium", priority=500))
    assert order(scene) == ["medium", "low"]


def test_low_priority_is_not_starved() -> None:
    scene = given(elected(), joined("w1"), submitted("low", priority=0))
    for second in range(1_200):
        scene.given(submitted(f"urgent{second}", priority=1000))
        first = order(scene, 1)[0]
        if first == "low":
            break
        scene.state.queue.remove(scene.task(first))
        scene.after(1_000)
    else:
        pytest.fail("never first")
    assert second == 1_000


def test_without_ageing_it_is() -> None:
    scene = given(elected(), policy(ageing_per_s=0.0), submitted("low", priority=0)).after(10**8)
    assert order(scene.given(submitted("urgent", priority=1))) == ["urgent", "low"]


def test_what_waits_again_goes_to_the_front() -> None:
    scene = given(elected(), joined("w1", slots=3), *(submitted(name) for name in "abcde"))
    scene.given(assigned("a"), assigned("b"), assigned("c"), left("w1"))
    assert order(scene) == ["a", "b", "c", "d", "e"]


def test_what_was_lost_waits_apart_in_its_old_order() -> None:
    scene = given(elected(), joined("w1", slots=3), *(submitted(name) for name in "abcde"))
    scene.given(assigned("a"), assigned("b"), assigned("c"), lost("w1"))
    suspects, others = sorted(lines(scene), key=lambda line: not line.suspect)
    assert [task.id for task in suspects.tasks(AGEING)] == ["a", "b", "c"]
    assert [task.id for task in others.tasks(AGEING)] == ["d", "e"]


def test_a_new_priority_is_a_new_place_at_its_end() -> None:
    scene = given(*(submitted(name) for name in "abc"), submitted("high", priority="high"))
    assert order(scene.given(reprioritized("b", "high"))) == ["high", "b", "a", "c"]
    assert order(scene.given(reprioritized("b", 500))) == ["high", "a", "c", "b"]


def test_the_same_priority_again_keeps_the_place() -> None:
    scene = given(submitted("a"), submitted("b"), reprioritized("a", "medium"))
    assert order(scene) == ["a", "b"]


def test_tasks_of_equal_demand_form_one_line() -> None:
    scene = given(*(submitted(f"a{number}", priority=number, args=[number]) for number in range(20)))
    assert len(lines(scene)) == 1
    scene.given(submitted("b", needs=Needs(cpu=1.0)), submitted("c", function="app.other"))
    assert len(lines(scene)) == 3


def test_a_line_nobody_waits_in_is_forgotten() -> None:
    scene = given(elected(), submitted("a", needs=Needs(cpu=1.0)))
    scene.given(cancel_requested("a"))
    assert not lines(scene)
    scene.lead()
    assert not scene.state.queue.waiting
    assert not scene.state.queue.parked


def test_depth_by_priority() -> None:
    scene = given(
        submitted("a"), submitted("b"), submitted("c", priority=7), submitted("d", needs=Needs(gpus=1))
    )
    assert scene.state.queue.depth_by_priority() == {500: 3, 7: 1}
    scene.given(cancel_requested("a"))
    assert scene.state.queue.depth_by_priority() == {500: 2, 7: 1}


def test_a_declined_task_waits_at_the_front() -> None:
    scene = given(elected(), joined("w1"), submitted("a"), submitted("b"), assigned("a"), declined("a"))
    assert order(scene) == ["a", "b"]


@given_any(seed=st.integers(0, 10_000))
def test_it_agrees_with_a_sorted_list(seed: int) -> None:
    """Against a model: a list sorted by rank, in which everything is moved at once."""
    chance = random.Random(seed)
    scene = Scene()
    model: list[str] = []
    for number in range(chance.randint(1, 60)):
        scene.after(chance.choice((0, 5_000)))
        act = chance.random()
        if act < 0.6 or not model:
            scene.given(submitted(f"a{number}", priority=chance.choice((0, 5, 9))))
            model.append(f"a{number}")
        else:
            name = chance.choice(model)
            model.remove(name)
            scene.state.queue.remove(scene.task(name))
    assert order(scene) == [task.id for task in sorted(map(scene.task, model), key=by_rank)]
    assert scene.state.queue.size == len(model)
    assert sum(scene.state.queue.depth_by_priority().values()) == len(model)
    for line in lines(scene):
        for lane in line.lanes.values():
            assert len(lane.entries) <= 2 * len(list(lane)) + 65


def by_rank(task: Task) -> tuple[float, int]:
    return task.ready_ms / 1000 * AGEING - task.priority, task.ticket


def test_what_left_does_not_pile_up() -> None:
    scene = given(submitted("first"))
    for number in range(2_000):
        scene.given(submitted(f"a{number}"))
        scene.state.queue.remove(scene.task(f"a{number}"))
    (lane,) = lines(scene)[0].lanes.values()
    assert len(lane.entries) < 200
