"""A client asks for a worker to be drained: it gets nothing new from there on."""

from __future__ import annotations

from typing import Final

import pytest

from agentflow import events
from agentflow.domain.state import APPLIED, DUPLICATE, Kind
from agentflow.events import Reason
from tests.unit.given import (
    MASTER,
    Scene,
    Step,
    assigned_in,
    completed,
    decided_in,
    drain_requested,
    draining,
    given,
    joined,
    left,
    lost,
    raised,
    submitted,
)

TWO_TASKS: Final = (submitted("a"), submitted("b"))


def at_work(*steps: Step) -> Scene:
    return given(*raised(), joined("w1"), *steps)


def test_a_drained_worker_gets_nothing_more_and_keeps_what_it_has() -> None:
    scene = at_work(*TWO_TASKS)
    scene.lead()
    assert scene.when(drain_requested("w1", "maintenance")) == APPLIED
    assert scene.worker().draining
    scene.given(completed("a"))
    assert scene.lead().decisions == {}
    assert (scene.status("a"), scene.status("b")) == ("completed", "ready")


def test_others_get_it_instead() -> None:
    scene = at_work(*TWO_TASKS, joined("w2"), drain_requested("w1"))
    assert assigned_in(scene.plan()) == {"w2": ["a"]}


def test_what_only_it_could_run_is_set_aside() -> None:
    """No plan looks at those lines again until somebody joins or leaves."""
    scene = at_work(submitted("a"), submitted("b"))
    scene.lead()
    assert scene.state.queue.waiting
    scene.given(drain_requested("w1"))
    scene.plan()
    assert (list(scene.state.queue.waiting), len(scene.state.queue.parked)) == ([], 1)


def test_asking_twice_changes_nothing() -> None:
    assert at_work(drain_requested("w1")).when(drain_requested("w1")) == DUPLICATE
    assert at_work(draining("w1")).when(drain_requested("w1")) == DUPLICATE


def test_the_worker_says_so_itself_and_leaves() -> None:
    scene = at_work(submitted("a"))
    scene.lead()
    scene.given(drain_requested("w1"))
    assert scene.when(draining("w1")) == APPLIED
    assert scene.when(completed("a")) == APPLIED
    assert scene.when(left("w1")) == APPLIED
    assert not scene.state.workers


def test_a_worker_that_joins_anew_is_not_drained() -> None:
    scene = at_work(submitted("a"), drain_requested("w1"), joined("w1"))
    assert assigned_in(scene.plan()) == {"w1": ["a"]}


@pytest.mark.parametrize("gone", [left("w1"), lost("w1")])
def test_a_worker_that_is_not_there_is_answered(gone: Step) -> None:
    scene = at_work(gone)
    verdict = scene.when(drain_requested("w1", by="app"))
    assert (verdict.kind, verdict.reason) == (Kind.REJECTED, Reason.UNKNOWN_ID)
    (answer,) = decided_in(scene.lead(), events.EventRejected)
    assert (answer.client, answer.reason, answer.detail) == ("app", "unknown_id", "no worker is called w1")
    assert answer.id == ""
    assert not scene.state.answers
    assert scene.state.leader == MASTER
