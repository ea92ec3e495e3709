"""What if: the same stretch again, in simulated time, as it was and otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from agentflow import events
from agentflow.domain.simulate import Change
from agentflow.errors import InvalidRequest
from agentflow_projections.past import Until
from agentflow_projections.whatif import WhatIf, what_if
from tests.unit.given import (
    Scene,
    assigned,
    cancel_requested,
    completed,
    elected,
    failed,
    flow,
    given,
    joined,
    submitted,
)
from tests.unit.histories import STRATEGIES, History
from tests.unit.told import Told

RETRY = events.Retry(max_attempts=3, backoff_s=2.0, jitter=0.0)


async def ask(scene: Scene, begin: int = 1, **change: Any) -> WhatIf:
    return await what_if(Told(scene.messages), Change(**change), begin=Until(seq=begin))


def one_after_the_other(count: int = 4, ms: int = 1_000, **worker: Any) -> Scene:
    """Tasks submitted at once that one worker with one slot ran one after the other."""
    scene = given(elected(), joined("w1", **worker), *(submitted(f"t{number}") for number in range(count)))
    for number in range(count):
        scene.given(assigned(f"t{number}")).after(ms).given(completed(f"t{number}", run_us=ms * 1_000))
    return scene


async def test_nothing_changed_comes_to_what_happened() -> None:
    found = await ask(one_after_the_other())
    assert found.simulated == found.otherwise == found.happened
    assert (found.happened.took_ms, found.happened.ended) == (4_000, {"completed": 4})
    assert (found.happened.wait_ms_mean, found.happened.wait_ms_max) == (1_500.0, 3_000)
    assert found.happened.utilisation == 1.0


async def test_one_more_worker_halves_the_time() -> None:
    found = await ask(one_after_the_other(), workers=1)
    assert (found.otherwise.took_ms, found.otherwise.wait_ms_max) == (2_000, 1_000)
    assert found.otherwise.utilisation == 1.0


async def test_many_workers_leave_slots_empty() -> None:
    found = await ask(one_after_the_other(), workers=7)
    assert (found.otherwise.took_ms, found.otherwise.utilisation) == (1_000, 0.5)


async def test_one_worker_less() -> None:
    scene = given(elected(), joined("w1"), joined("w2"), submitted("a"), submitted("b"))
    scene.given(assigned("a", "w1"), assigned("b", "w2")).after(1_000)
    scene.given(completed("a", run_us=1_000_000), completed("b", run_us=1_000_000))
    found = await ask(scene, workers=-1)
    assert (found.simulated.took_ms, found.otherwise.took_ms) == (1_000, 2_000)
    with pytest.raises(InvalidRequest, match="2 cannot be taken away"):
        await ask(scene, workers=-2)


async def test_shorter_and_longer_runs() -> None:
    scene = one_after_the_other()
    assert (await ask(scene, durations=(("*", 0.5),))).otherwise.took_ms == 2_000
    assert (await ask(scene, durations=(("t0", 3.0),))).otherwise.took_ms == 6_000
    assert (await ask(scene, durations=(("app.work", 2.0),))).otherwise.took_ms == 8_000


async def test_another_priority_goes_first() -> None:
    scene = one_after_the_other()
    found = await ask(scene, priorities=(("t3", 1_000),))
    assert found.otherwise.wait_ms_by_priority == {1_000: 0.0, 500: 2_000.0}
    later = next(each.seq for each in scene.messages if b'"t1"' in each.data and "assigned" in each.subject)
    waiting = await ask(scene, later, priorities=(("t3", 1_000),))
    assert waiting.otherwise.wait_ms_by_priority == {1_000: 1_000.0, 500: 2_500.0}


async def test_dependencies_hold() -> None:
    scene = given(elected(), joined("w1", slots=4), flow("f", {"a": [], "b": ["a"], "c": ["a"]}))
    scene.given(assigned("f/a")).after(500).given(completed("f/a", run_us=500_000))
    for task in ("f/b", "f/c"):
        scene.given(assigned(task)).after(500).given(completed(task, run_us=500_000))
    found = await ask(scene)
    assert (found.happened.took_ms, found.simulated.took_ms) == (1_500, 1_000)


async def test_failures_and_backoffs_come_again() -> None:
    scene = given(elected(), joined("w1"), submitted("a", retry=RETRY), submitted("b"), assigned("a"))
    scene.after(100).given(failed("a", run_us=100_000))
    scene.given(assigned("b")).after(100).given(completed("b", run_us=100_000))
    scene.after(1_900).lead()
    scene.lead()
    scene.after(100).given(completed("a", run_us=100_000))
    found = await ask(scene)
    assert found.simulated.took_ms == found.happened.took_ms == 2_200
    assert found.simulated.ended == {"completed": 2}


async def test_a_task_that_never_ran_takes_the_mean_of_its_kind() -> None:
    scene = one_after_the_other().given(submitted("more"))
    found = await ask(scene)
    assert (found.happened.open, found.simulated.open, found.estimated) == (1, 0, 1)
    assert found.simulated.took_ms == 5_000


async def test_what_ran_at_the_beginning_goes_on() -> None:
    scene = one_after_the_other()
    begin = next(each.seq for each in scene.messages if b'"t1"' in each.data and "assigned" in each.subject)
    found = await ask(scene, begin + 1)
    assert found.simulated.took_ms == found.happened.took_ms == 2_000
    assert found.simulated.ended == {"completed": 3}


async def test_cancelled_tasks_end_cancelled() -> None:
    scene = one_after_the_other(2).given(submitted("x", needs=events.Needs(gpus=1)))
    scene.after(10).given(cancel_requested("x")).lead()
    found = await ask(scene)
    assert found.simulated.ended == found.happened.ended == {"completed": 2, "cancelled": 1}


async def test_other_strategies_fill_other_workers() -> None:
    scene = given(elected(), joined("w1", slots=2), joined("w2", slots=2), submitted("a"), submitted("b"))
    scene.lead()
    scene.after(100).given(completed("a", run_us=100_000), completed("b", run_us=100_000))
    for strategy in STRATEGIES:
        found = await ask(scene, strategy=strategy)
        assert found.otherwise.took_ms == 100


async def test_nothing_in_the_stretch_is_said() -> None:
    with pytest.raises(InvalidRequest, match="nothing lies in that stretch"):
        await ask(one_after_the_other(), begin=10_000)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.5])
async def test_any_history_can_be_simulated(seed: int, share: float) -> None:
    """Every task that was open or came has an end, or waits for what never comes; the same twice."""
    history = History(seed)
    messages = history.run(150)
    begin = int(share * len(messages)) + 1
    change: dict[str, Any] = {
        "strategy": STRATEGIES[seed % 4],
        "workers": seed % 3,
        "priorities": (("*", 700),),
        "durations": (("*", 0.7),),
    }
    first = await ask(history.scene, begin, **change)
    assert first == await ask(history.scene, begin, **change)
    assert sum(first.happened.ended.values()) + first.happened.open > 0
    assert sum(first.otherwise.ended.values()) + first.otherwise.open >= sum(first.happened.ended.values())
