"""A state written and read again is the same, at every prefix of every history."""

from __future__ import annotations

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow.domain.plan import plan
from agentflow.domain.snapshot import SnapshotUnreadable, restore, snapshot, state_hash
from agentflow.domain.state import Namespace
from agentflow.limits import LEVEL
from tests.golden.record import SCENES, read_log
from tests.unit.dump import dump
from tests.unit.given import NAMESPACE, Logged, fold_all, fold_message
from tests.unit.histories import History

SEEDS = st.integers(0, 2**32)


def read_again(state: Namespace) -> Namespace:
    return restore(snapshot(state), knows=LEVEL)


def require_same(found: Namespace, expected: Namespace) -> None:
    assert dump(found) == dump(expected)
    assert snapshot(found) == snapshot(expected)
    now_ms = expected.clock_ms + 1_000
    assert plan(found, now_ms).decisions == plan(expected, now_ms).decisions


@pytest.mark.parametrize("name", SCENES)
def test_at_every_position_of_recorded_logs(name: str) -> None:
    state = Namespace(NAMESPACE)
    for message in read_log(name):
        fold_message(state, message)
        state.ended.clear()
        require_same(read_again(state), state)


@with_random(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_fold_that_begins_with_a_snapshot_comes_to_the_same(seed: int, share: float) -> None:
    messages = History(seed).run(80)
    cut = int(len(messages) * share)
    found = fold_all(messages[cut:], read_again(fold_all(messages[:cut])))
    require_same(found, fold_all(messages))


@with_random(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_as_does_one_that_begins_with_a_snapshot_after_each_message(seed: int) -> None:
    messages = History(seed).run(40)
    state = Namespace(NAMESPACE)
    for message in messages:
        state = fold_all([message], read_again(state))
    require_same(state, fold_all(messages))


def test_equal_states_have_equal_hashes_and_others_have_not() -> None:
    messages: list[Logged] = History(7).run(60)
    states = [fold_all(messages[:end]) for end in range(1, len(messages))]
    assert len({state_hash(state) for state in states}) == len(states)
    assert state_hash(fold_all(messages)) == state_hash(fold_all(messages))


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x80", b"\xc1"])
def test_what_is_no_snapshot_is_refused(damage: bytes) -> None:
    with pytest.raises(SnapshotUnreadable, match="no snapshot of form"):
        restore(damage, knows=LEVEL)


def test_a_snapshot_cut_off_is_refused() -> None:
    whole = snapshot(fold_all(History(3).run(60)))
    with pytest.raises(SnapshotUnreadable):
        restore(whole[: len(whole) // 2], knows=LEVEL)
