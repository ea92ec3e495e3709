"""Locks in the log: who held what, as far as their holders tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import wire
from agentflow.domain import locks
from agentflow.domain.state import APPLIED, DUPLICATE, SUPERSEDED, At, Holding, Kind, Namespace
from agentflow.events import LockAcquired, LockLost, LockOpened, LockReleased, Reason
from tests.unit.dump import dump
from tests.unit.given import (
    Scene,
    Step,
    acquired,
    fold_message,
    given,
    lock_lost,
    opened,
    raised,
    released,
)
from tests.unit.histories import History


def told(*steps: Step) -> Scene:
    """A log of level 2, and what was told of locks."""
    return given(*raised(), *steps)


def shared(lock: str, token: int, by: str = "cli") -> Step:
    return acquired(lock, token, by, mode="shared")


def permit(lock: str, token: int, by: str = "cli", permits: int = 2) -> Step:
    return acquired(lock, token, by, mode="semaphore", permits=permits)


def held(scene: Scene, lock: str = "l") -> list[int]:
    """Tokens under which a lock is held, in the order in which that was told."""
    return list(scene.state.locks.get(lock, {}))


# In order ------------------------------------------------------------------------------


def test_a_lock_is_acquired_and_released() -> None:
    scene = told().after(40)
    assert scene.when(acquired("l", 7, "app", holder="job 5", ttl_s=30, metadata={"why": "x"})) == APPLIED
    assert scene.state.locks["l"][7] == Holding(
        token=7,
        holder="job 5",
        client="app",
        mode="exclusive",
        permits=1,
        ttl_s=30,
        since_ms=scene.now_ms,
        metadata={"why": "x"},
    )
    assert scene.when(released("l", 7)) == APPLIED
    assert not scene.state.locks


def test_a_lost_lock_is_told_of_by_whoever_noticed() -> None:
    scene = told(acquired("l", 7, "app"))
    assert scene.when(lock_lost("l", 7, by="somebody-else")) == APPLIED
    assert not scene.state.locks


def test_locks_of_other_names_have_nothing_to_do_with_it() -> None:
    scene = told(acquired("l", 7), acquired("m", 2))
    assert scene.when(released("l", 2)) == SUPERSEDED
    assert (held(scene, "l"), held(scene, "m")) == ([7], [2])


# One or several ------------------------------------------------------------------------


def test_the_next_exclusive_holder_has_nobody_beside_it() -> None:
    """Its token proves that the one before lost the lock, whether or not anybody noticed."""
    scene = told(acquired("l", 7, "app"))
    assert scene.when(acquired("l", 9, "other")) == APPLIED
    assert held(scene) == [9]
    assert scene.when(released("l", 7, "app")) == SUPERSEDED
    assert held(scene) == [9]


def test_a_lock_may_be_shared() -> None:
    scene = told(shared("l", 5), shared("l", 7), shared("l", 6))
    assert held(scene) == [5, 7, 6]
    scene.given(released("l", 7))
    assert held(scene) == [5, 6]


def test_a_semaphore_has_several_holders() -> None:
    scene = told(permit("l", 5), permit("l", 6))
    assert [holding.permits for holding in scene.state.locks["l"].values()] == [2, 2]


@pytest.mark.parametrize("others", [shared, permit])
def test_an_exclusive_holder_ends_all_others(others: Callable[[str, int], Step]) -> None:
    scene = told(others("l", 5), others("l", 6), acquired("l", 7))
    assert held(scene) == [7]


@pytest.mark.parametrize("others", [shared, permit])
def test_a_later_holder_of_another_mode_ends_an_exclusive_one(others: Callable[[str, int], Step]) -> None:
    assert held(told(acquired("l", 7), others("l", 8))) == [8]


# Too late ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [1, 6, 7])
def test_an_exclusive_hold_told_of_after_a_later_one_is_over(token: int) -> None:
    scene = told(acquired("l", 7))
    assert scene.when(acquired("l", token)) == SUPERSEDED
    assert held(scene) == [7]


@pytest.mark.parametrize("over", [released("l", 7), lock_lost("l", 7)])
@pytest.mark.parametrize("late", [acquired("l", 7), acquired("l", 6), shared("l", 7), permit("l", 7)])
def test_what_is_over_does_not_begin_again(over: Step, late: Step) -> None:
    scene = told(acquired("l", 7), over)
    assert scene.when(late) == SUPERSEDED
    assert scene.when(over) == SUPERSEDED
    assert not scene.state.locks


def test_a_shared_hold_from_before_an_exclusive_one_is_over() -> None:
    scene = told(acquired("l", 7))
    assert scene.when(shared("l", 6)) == SUPERSEDED
    assert held(scene) == [7]


@pytest.mark.parametrize("mode", ["exclusive", "shared", "semaphore"])
def test_an_end_told_of_before_the_beginning(mode: str) -> None:
    """Somebody noticed the loss before the holder could say that it held the lock."""
    scene = told()
    assert scene.when(lock_lost("l", 7)) == APPLIED
    assert scene.when(acquired("l", 7, mode=mode)) == SUPERSEDED
    assert scene.when(acquired("l", 8, mode=mode)) == APPLIED


# Bounds --------------------------------------------------------------------------------


def test_how_many_holders_are_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCKS_MAX", 3)
    scene = told(acquired("a", 1), shared("b", 2), shared("b", 3))
    verdict = scene.when(acquired("c", 4))
    assert (verdict.kind, verdict.reason) == (Kind.QUARANTINED, Reason.OVERLOADED)
    assert not scene.state.answers
    assert scene.when(shared("b", 5)).kind is Kind.QUARANTINED
    assert scene.given(released("b", 2)).when(acquired("c", 6)) == APPLIED


def test_a_lock_still_changes_hands_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCKS_MAX", 2)
    scene = told(acquired("a", 1), acquired("b", 2))
    assert scene.when(acquired("a", 3)) == APPLIED
    assert (held(scene, "a"), held(scene, "b")) == ([3], [2])


def test_how_many_tokens_are_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of locks used last; and what is held is known anyway."""
    monkeypatch.setattr(locks, "LOCKS_MAX", 3)
    scene = told(acquired("held", 5))
    for name in "abcde":
        scene.given(acquired(name, 9), released(name, 9))
    assert list(scene.state.lock_tokens) == ["c", "d", "e"]
    assert scene.when(acquired("held", 4)) == SUPERSEDED
    assert held(scene, "held") == [5]


# The bucket ----------------------------------------------------------------------------


def test_generations_of_the_bucket_rise() -> None:
    scene = told()
    assert scene.when(opened(3)) == APPLIED
    assert scene.state.lock_generation == 3
    for generation in (1, 2, 3):
        verdict = scene.when(opened(generation))
        assert (verdict.kind, verdict.reason) == (Kind.QUARANTINED, Reason.CONFLICT)
    assert scene.when(opened(4)) == APPLIED


def test_only_on_their_subject() -> None:
    scene = told()
    assert scene.when(opened(1, by="app")).kind is Kind.QUARANTINED
    assert scene.when(opened(1, by=wire.LOCKS_ACTOR)) == APPLIED
    assert scene.messages[-1].subject == wire.locks_opened("test")


# Properties ----------------------------------------------------------------------------

NAMES: Final = st.sampled_from(["l", "m"])
TOKENS: Final = st.integers(1, 9)
WORDS: Final = st.lists(
    st.builds(
        LockAcquired,
        name=NAMES,
        token=TOKENS,
        holder=st.just("h"),
        mode=st.sampled_from(["exclusive", "exclusive", "shared", "semaphore"]),
    )
    | st.builds(LockReleased, name=NAMES, token=TOKENS)
    | st.builds(LockLost, name=NAMES, token=TOKENS),
    max_size=30,
)


@given_any(words=WORDS)
@settings(max_examples=200, deadline=None)
def test_whatever_is_told_an_exclusive_holder_is_alone_and_tokens_rise(
    words: list[LockAcquired | LockReleased | LockLost],
) -> None:
    state = Namespace("n")
    latest: dict[str, int] = {}
    for seq, word in enumerate(words, 1):
        at = At(seq, 0, seq, "cli")
        if isinstance(word, LockAcquired):
            verdict = locks.lock_acquired(state, word, at)
            if word.mode == "exclusive" and verdict is APPLIED:
                assert word.token > latest.get(word.name, 0)
                assert list(state.locks[word.name]) == [word.token]
        else:
            verdict = locks.lock_ended(state, word, at)
        if verdict is APPLIED:
            latest[word.name] = max(latest.get(word.name, 0), word.token)
        assert state.lock_tokens == latest
        for holdings in state.locks.values():
            assert holdings
            exclusive = [holding for holding in holdings.values() if holding.mode == "exclusive"]
            assert not exclusive or len(holdings) == 1


@given_any(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_what_comes_too_late_or_again_changes_nothing(seed: int) -> None:
    """Of locks and masters, whatever else happens."""
    history = History(seed, level=2)
    state = Namespace("test")
    for message in history.run(60):
        before = _added(state)
        verdicts = fold_message(state, message)
        if all(verdict in {SUPERSEDED, DUPLICATE} for verdict in verdicts):
            assert _added(state) == before


def _added(state: Namespace) -> bytes:
    """What level 2 added to the state."""
    shown = Namespace("shown")
    for name in ("level", "masters", "locks", "lock_tokens", "lock_generation", "lock_users"):
        setattr(shown, name, getattr(state, name))
    return dump(shown)


def test_an_opening_says_nothing_of_holders() -> None:
    """Whoever held a lock of the bucket that is gone finds out, and says so."""
    scene = told(acquired("l", 7), opened(1))
    assert held(scene) == [7]
    assert isinstance(opened(1)(scene.state).event, LockOpened)
