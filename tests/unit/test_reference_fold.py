"""The fold and a naive one, written from the contract, say the same at every position of any history."""

from __future__ import annotations

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow.domain.life import State
from agentflow.domain.state import Namespace
from agentflow.events import KINDS
from agentflow.frames import judge
from tests.golden.record import SCENES, read_log
from tests.unit import reference_fold
from tests.unit.given import NAMESPACE, Logged, fold_message
from tests.unit.histories import History
from tests.unit.reference_fold import Fold

SEEDS = st.integers(0, 2**32)


def read(state: Fold, message: Logged) -> None:
    judged = judge(message.subject, message.data, message.headers)
    reference_fold.read(state, message.seq, message.time_ns, judged)


def require_same(state: Namespace, reference: Fold) -> None:
    """What the fold knows is what the reference says."""
    require_same_tasks(state, reference)
    for name, workflow in reference["workflows"].items():
        assert state.status(name)[0] == workflow["state"], name
    assert set(state.workflows) == {
        name for name, workflow in reference["workflows"].items() if workflow["state"] == "running"
    }
    assert {
        worker.name: {"incarnation": worker.incarnation, "draining": worker.draining}
        for worker in state.workers.values()
    } == reference["workers"]
    leads = (state.epoch, state.leader, state.level, state.lock_generation)
    assert leads == tuple(reference[name] for name in ("epoch", "leader", "level", "generation"))
    assert {
        master.name: {"instance": master.instance, "level": master.level} for master in state.masters.values()
    } == reference["masters"]
    found = {name: {each.token: each.mode for each in holds.values()} for name, holds in state.locks.items()}
    assert found == {name: holds for name, holds in reference["locks"].items() if holds}


def require_same_tasks(state: Namespace, reference: Fold) -> None:
    tasks = reference["tasks"]
    assert state.accepted == len(tasks)
    for name, task in tasks.items():
        assert state.status(name)[0] == task["state"], name
    for name, known in state.tasks.items():
        worker = (known.worker.name, known.worker.incarnation) if known.worker is not None else ("", 0)
        spent = known.failures + known.losses
        assert (known.attempt, spent, known.priority, worker, known.cancel is not None) == (
            tasks[name]["attempt"],
            tasks[name]["spent"],
            tasks[name]["priority"],
            (tasks[name]["worker"], tasks[name]["incarnation"]),
            tasks[name]["cancel"],
        )
    queued = {task.id for task in state.tasks.values() if task.ticket}
    assert queued == {
        name for name, task in tasks.items() if task["state"] == State.READY and not task["cancel"]
    }
    used = {task["lock"]: name for name, task in tasks.items() if task["state"] == "running" and task["lock"]}
    assert state.lock_users == used


def compare(messages: list[Logged]) -> Fold:
    state, reference = Namespace(NAMESPACE), reference_fold.empty()
    for message in messages:
        fold_message(state, message)
        state.ended.clear()
        read(reference, message)
        require_same(state, reference)
    return reference


@pytest.mark.parametrize("name", SCENES)
def test_at_every_position_of_recorded_logs(name: str) -> None:
    compare(read_log(name))


@with_random(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_at_every_position_of_random_histories(seed: int) -> None:
    compare(History(seed).run(120))


@with_random(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_what_is_delivered_again_changes_neither(seed: int, share: float) -> None:
    messages = History(seed).run(80)
    cut = int(len(messages) * share)
    state, reference = Namespace(NAMESPACE), reference_fold.empty()
    for message in [*messages, *messages[cut:]]:
        fold_message(state, message)
        read(reference, message)
    require_same(state, reference)


def test_random_histories_come_to_every_state() -> None:
    found = [compare(History(seed).run(150)) for seed in range(10)]
    assert {task["state"] for each in found for task in each["tasks"].values()} == set(State)
    flows = {flow["state"] for each in found for flow in each["workflows"].values()}
    assert flows == {"running", "completed", "failed", "cancelled"}
    assert any(holds for each in found for holds in each["locks"].values())
    assert any(each["workers"] for each in found)


def test_it_knows_every_kind() -> None:
    assert set(reference_fold.HOW) == set(KINDS)
