"""Digests of folds: the same for all that read the same log, different where a fold differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow.domain import digest as digests
from agentflow.domain.digest import KEPT, OTHERS_MAX, Agreement, Difference, Digest, Digests, digest
from agentflow.domain.snapshot import restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.limits import LEVEL, LEVEL_FIRST
from tests.unit.given import (
    NAMESPACE,
    Scene,
    assigned,
    completed,
    elected,
    fold_all,
    fold_message,
    given,
    joined,
    master_joined,
    submitted,
)
from tests.unit.histories import History

SEEDS = st.integers(0, 2**32)


def taken(messages: list[object], state: Namespace) -> list[Digest]:
    """The digests a fold takes on its way."""
    found: list[Digest] = []
    taking = Digests(state)
    taking.on_digest = found.append
    for message in messages:
        fold_message(state, message)  # type: ignore[arg-type] # a Logged
        state.ended.clear()
        taking.folded()
    return found


@with_random(seed=SEEDS, share=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_wherever_a_fold_began_its_digests_are_the_same(seed: int, share: float) -> None:
    messages = History(seed).run(120)
    whole = taken([*messages], Namespace(NAMESPACE))
    middle = int(share * len(messages))
    begun = restore(snapshot(fold_all(messages[:middle])), knows=LEVEL)
    assert taken([*messages[middle:]], begun) == [each for each in whole if each.seq > middle]
    assert len(whole) > 1


def test_positions_are_agreed_on_by_number_and_by_log_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "EVERY", 4)
    scene = given(elected(), submitted("a"), submitted("b"), submitted("c"), submitted("d"))
    scene.after(digests.EVERY_MS).given(submitted("e"), submitted("f"))
    assert [each.seq for each in taken([*scene.messages], Namespace(NAMESPACE))] == [1, 4, 6]


def test_a_fold_that_does_not_know_the_level_says_nothing() -> None:
    scene = Scene().given(elected(level=LEVEL_FIRST), master_joined("m1"), elected(level=LEVEL))
    scene.after(digests.EVERY_MS).given(submitted("a"), submitted("b"))
    old = Namespace(NAMESPACE, knows=LEVEL_FIRST)
    assert [each.seq for each in taken([*scene.messages], old)] == [1]


def at_work() -> Namespace:
    scene = given(
        elected(level=LEVEL), master_joined("m1"), joined("w1", slots=2), submitted("a"), submitted("b")
    )
    return scene.given(assigned("a"), completed("a"), assigned("b"), submitted("c")).state


def _forget(state: Namespace) -> None:
    del state.closed.current["a"]


def _remember_otherwise(state: Namespace) -> None:
    known = state.closed.get("a")
    assert known is not None
    state.closed.add("a", known.state, (known.seq, known.index), known.digest + 1, now_ms=0)


def _dequeue(state: Namespace) -> None:
    state.queue.remove(state.tasks["c"])


CHANGES: dict[str, Callable[[Namespace], object]] = {
    "a count": lambda state: setattr(state, "superseded", 1),
    "the clock": lambda state: setattr(state, "clock_ms", state.clock_ms + 1),
    "a priority": lambda state: setattr(state.tasks["c"], "priority", 1),
    "an attempt": lambda state: setattr(state.tasks["b"], "attempt", 2),
    "a started task": lambda state: setattr(state.tasks["b"], "started", True),
    "a worker's sum": lambda state: setattr(state.workers["w1"], "slow", 7),
    "a draining worker": lambda state: setattr(state.workers["w1"], "draining", True),
    "an id forgotten": _forget,
    "an id remembered otherwise": _remember_otherwise,
    "a task not queued": _dequeue,
    "a master": lambda state: state.masters.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_shows(name: str) -> None:
    state = at_work()
    before = digest(state)
    assert digest(at_work()) == before
    CHANGES[name](state)
    assert digest(state) != before


def agreement(**own: str) -> tuple[Agreement, dict[int, str]]:
    kept = {int(seq[1:]): hash_ for seq, hash_ in own.items()}
    return Agreement(kept), kept


def test_equal_folds_agree() -> None:
    found, kept = agreement(s10="x")
    assert found.hear("m2", Digest(10, "x")) is None
    kept[20] = "y"
    assert found.reached(20) == []
    assert found.hear("m2", Digest(20, "y")) is None
    assert not found.differences


def test_a_difference_names_where_it_began_and_is_told_once() -> None:
    found, kept = agreement(s10="x", s20="y", s30="z")
    found.hear("m2", Digest(10, "x"))
    assert found.hear("m2", Digest(20, "other")) == Difference("m2", 20, 10)
    assert found.hear("m2", Digest(30, "other")) is None
    assert found.differences == {"m2": Difference("m2", 20, 10)}
    kept[40] = "a"
    assert found.hear("m2", Digest(40, "a")) is None
    assert not found.differences, "it was started anew"


def test_who_is_ahead_is_compared_once_one_gets_there() -> None:
    found, kept = agreement()
    assert found.hear("m2", Digest(10, "x")) is None
    kept[10] = "mine"
    assert found.reached(10) == [Difference("m2", 10)]


def test_what_is_kept_is_bounded() -> None:
    found, _ = agreement()
    for number in range(2 * OTHERS_MAX):
        for seq in range(2 * KEPT):
            found.hear(f"m{number}", Digest(seq, "x"))
    assert len(found._heard) == OTHERS_MAX
    assert {len(each) for each in found._heard.values()} == {KEPT}
    taking = Digests(state := Namespace(NAMESPACE))
    for _ in range(2 * KEPT):
        state.seq += digests.EVERY
        taking.folded()
    assert len(taking.kept) == KEPT
