"""Why things happened to a task: from the log alone."""

from __future__ import annotations

from typing import Any

import pytest

from agentflow import events
from agentflow.domain.explain import Cause
from agentflow.domain.plan import Silence
from agentflow_projections.past import Until
from agentflow_projections.why import Answer, why
from tests.unit.given import (
    Scene,
    assigned,
    cancel_requested,
    cancelled,
    completed,
    declined,
    elected,
    failed,
    flow,
    flow_cancel_requested,
    given,
    joined,
    left,
    policy,
    quarantined,
    reprioritized,
    retried,
    started,
    stop,
    submitted,
    timed_out,
)
from tests.unit.histories import History
from tests.unit.told import Told

RETRY = events.Retry(max_attempts=2, backoff_s=2.0, jitter=0.0, non_retryable=["fatal"])


async def ask(scene: Scene, task: str, until: Until = Until()) -> Answer:  # noqa: B008 - it is frozen
    return await why(Told(scene.messages), task, until=until)


async def texts(scene: Scene, task: str) -> list[str]:
    return [moment.text for moment in (await ask(scene, task)).moments]


def at_work(**terms: Any) -> Scene:
    return given(elected(), joined("w1"), submitted("a", **terms), assigned("a"))


async def test_a_task_from_its_submission_to_its_end() -> None:
    scene = at_work().given(started("a"), completed("a", run_us=4_200))
    answer = await ask(scene, "a")
    assert [(moment.text, moment.state) for moment in answer.moments] == [
        ("submitted by cli; ready from here on", "ready"),
        ("attempt 1 assigned to w1", "running"),
        ("attempt 1 begun by w1", "running"),
        ("attempt 1 completed by w1 after 4.2 ms", "completed"),
    ]
    assert (answer.state, answer.waiting) == ("completed", None)


async def test_a_failure_tells_whether_it_is_tried_again() -> None:
    scene = at_work(retry=RETRY).given(failed("a", message="no disk")).after(2_000).given(retried("a"))
    scene.given(assigned("a"), failed("a"))
    assert (await texts(scene, "a"))[2:] == [
        "attempt 1 failed at w1 (error: no disk); 1 of 2 attempts are spent, the next follows in 2 s",
        "its backoff is over: ready again",
        "attempt 2 assigned to w1",
        "attempt 2 failed at w1 (error); not tried again: all 2 attempts are spent",
    ]


@pytest.mark.parametrize(
    ("retry", "failure", "said"),
    [
        (None, {}, "no retries were asked for"),
        (RETRY, {"retryable": False}, "the failure is said to be for good"),
        (RETRY, {"error": "fatal"}, "fatal is not to be retried"),
    ],
)
async def test_a_failure_for_good_tells_why(
    retry: events.Retry | None, failure: dict[str, Any], said: str
) -> None:
    scene = at_work(retry=retry).given(failed("a", **failure))
    assert said in (await texts(scene, "a"))[-1]


async def test_what_was_to_be_cancelled_is_not_tried_again() -> None:
    scene = at_work(retry=RETRY).given(cancel_requested("a", "wrong data"), stop("a"), failed("a"))
    assert (await texts(scene, "a"))[2:] == [
        "cli asked for it to be cancelled (wrong data)",
        "w1 asked to stop attempt 1",
        "attempt 1 failed at w1 (error); not tried again: it was to be cancelled",
    ]


async def test_a_cancellation_tells_who_asked() -> None:
    scene = given(elected(), submitted("a"), cancel_requested("a"), cancelled("a"))
    assert (await texts(scene, "a"))[1:] == [
        "cli asked for it to be cancelled",
        "cancelled (requested by cli)",
    ]


async def test_a_skipped_task_names_what_failed() -> None:
    scene = given(elected(), joined("w1"), flow("f", {"a": [], "b": ["a"], "c": ["b"]}))
    scene.given(assigned("f/a"), failed("f/a"))
    assert (await texts(scene, "f/b"))[-1] == "skipped, since f/a ended failed"
    assert (await texts(scene, "f/c"))[-1] == "skipped, since f/a ended failed"


async def test_a_dependent_is_ready_with_the_last_it_waits_for() -> None:
    scene = given(
        elected(), joined("w1"), flow("f", {"a": [], "b": ["a"]}), assigned("f/a"), completed("f/a")
    )
    assert await texts(scene, "f/b") == [
        "submitted by cli as part of workflow f; waits for 1 dependencies",
        "f/a completed, the last of its dependencies: ready from here on",
    ]


async def test_a_workflow_that_is_cancelled_takes_its_tasks_along() -> None:
    scene = given(elected(), flow("f", {"a": []}), flow_cancel_requested("f", "enough"))
    assert (await texts(scene, "f/a"))[-1] == "cli asked for its workflow to be cancelled (enough)"


async def test_a_lost_worker_leaves_a_suspect_or_costs_a_life() -> None:
    scene = at_work()
    scene.carry_out(scene.plan(Silence("w1", scene.worker().incarnation, "silent")))
    scene.given(joined("w1"), assigned("a"), started("a"))
    scene.carry_out(scene.plan(Silence("w1", scene.worker().incarnation, "silent")))
    found = await texts(scene, "a")
    assert found[2].startswith("w1 was given up (silent); whether attempt 1 had begun is not known")
    assert found[-1].startswith("w1 was given up (silent); attempt 2 had begun, which is loss 1 of 3")


async def test_a_worker_that_left_or_declined_costs_nothing() -> None:
    scene = at_work().given(declined("a", reason="no such file"), assigned("a"), left("w1"))
    found = await texts(scene, "a")
    assert found[2].startswith("w1 declined it (no such file)")
    assert found[4] == "w1 left before it ended: queued again in front, which costs no attempt"


async def test_given_up_waiting_or_quarantined() -> None:
    scene = given(elected(), submitted("a", queue_timeout_s=3.0), submitted("b"), timed_out("a"))
    scene.given(quarantined("b"))
    assert (await texts(scene, "a"))[-1] == "failed: no worker began it within its queue timeout of 3 s"
    assert (await texts(scene, "b"))[-1] == "failed: quarantined (losses)"


async def test_another_priority_and_what_was_not_accepted() -> None:
    scene = at_work()
    scene.given(submitted("b"), reprioritized("b", "urgent"), submitted("b", args=[1]), completed("a"))
    scene.given(completed("a", attempt=1, incarnation=2))
    assert (await texts(scene, "b"))[1] == "cli changed its priority from 500 to 1000"
    refused = (await ask(scene, "b")).moments[2]
    assert (refused.verdict, "conflict" in refused.text) == ("rejected", True)
    assert (await texts(scene, "a"))[-1] == "task.completed of w1 came too late to count"


async def test_a_task_that_was_never_accepted_tells_why() -> None:
    scene = given(elected(), policy(accepting=False), submitted(""))
    answer = await ask(scene, "at-3-0")
    assert (answer.state, answer.known) == ("", "unknown")
    assert "the log is nearly full" in answer.moments[0].text


async def test_each_assignment_is_explained_on_its_basis() -> None:
    scene = given(elected(), joined("w1", slots=2), joined("w2", slots=2), submitted("a"), submitted("b"))
    scene.lead()
    answer = await ask(scene, "b")
    placement = answer.moments[-1].placement
    assert placement is not None
    assert (placement.worker, placement.ahead.count) == ("w2", 1)
    assert [(each.worker, each.held) for each in placement.candidates] == [("w1", 1), ("w2", 0)]


async def test_as_it_was_at_a_position_and_at_a_time() -> None:
    scene = given(elected(), submitted("a"))
    before, then_ms = scene.state.seq, scene.now_ms
    scene.after(5_000).given(joined("w1"), assigned("a"))
    for until in (Until(seq=before), Until(ms=then_ms + 4_000)):
        answer = await ask(scene, "a", until)
        assert answer.waiting is not None
        assert (answer.seq, answer.waiting.cause) == (before, Cause.UNFIT)
    assert (await ask(scene, "a", Until(ms=then_ms + 4_000))).time_ms == then_ms + 4_000


async def test_an_id_that_nobody_used() -> None:
    answer = await ask(given(elected()), "nobody")
    assert (answer.moments, answer.state, answer.known) == ([], "", "unknown")


@pytest.mark.parametrize("seed", range(4))
async def test_what_the_plan_did_is_what_the_explanation_says(seed: int) -> None:
    """Every assignment of random histories, lost workers included, goes where the explanation sends it."""
    history = History(seed)
    history.say_nonsense = history.garble = False
    history.run(250)
    explained = 0
    for task in {f"t{number}" for number in range(history.names)}:
        for moment in (await ask(history.scene, task)).moments:
            if moment.placement is not None:
                assert moment.placement.worker == moment.actor
                assert not next(
                    each.refused for each in moment.placement.candidates if each.worker == moment.actor
                )
                explained += 1
    assert explained
