"""Contract levels: what a message means depends on the level in force where it stands, not on who reads."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events, wire
from agentflow.domain.state import APPLIED, Kind, Namespace, Verdict
from agentflow.events import ROLES, SINCE, Reason, Role
from agentflow.frames import encode, level_headers
from agentflow.limits import LEVEL, LEVEL_FIRST
from tests.unit.dump import dump
from tests.unit.given import (
    NAMESPACE,
    Logged,
    Scene,
    acquired,
    completed,
    decided_in,
    drain_requested,
    elected,
    fold_message,
    given,
    joined,
    lock_lost,
    master_joined,
    master_left,
    opened,
    raised,
    released,
    submitted,
)
from tests.unit.histories import History

LEVEL_2: Final = {wire.VERSION: "2"}
ADDED: Final = {
    "worker.drain_requested": drain_requested(),
    "lock.opened": opened(),
    "lock.acquired": acquired("l", 1),
    "lock.released": released("l", 1),
    "lock.lost": lock_lost("l", 1),
    "master.joined": master_joined(),
    "master.left": master_left(),
}


def why(verdict: Verdict) -> tuple[Kind, Reason | None]:
    return verdict.kind, verdict.reason


# The level rises -----------------------------------------------------------------------


def test_a_log_begins_at_level_1() -> None:
    assert Namespace(NAMESPACE).level == given(elected()).state.level == LEVEL_FIRST == 1


def test_an_election_raises_it() -> None:
    scene = given(elected())
    assert scene.when(elected(master="m2", level=2)) == APPLIED
    assert (scene.state.level, scene.state.epoch, scene.state.leader) == (2, 2, "m2")


def test_already_the_first_may() -> None:
    assert given(elected(level=2)).state.level == 2


def test_an_election_that_does_not_count_does_not() -> None:
    scene = given(elected())
    assert why(scene.when(elected(epoch=9, level=2))) == (Kind.QUARANTINED, Reason.CONFLICT)
    scene.say("m1", [events.LeaderElected(epoch=2, master="m1", level=2)])
    assert scene.state.level == 1


def test_it_never_falls() -> None:
    scene = given(*raised("m1"))
    verdict = scene.when(elected(level=1))
    assert why(verdict) == (Kind.QUARANTINED, Reason.CONFLICT)
    assert verdict.detail == "level 1 is below 2, which is in force"
    assert (scene.state.level, scene.state.epoch) == (2, 1)
    assert scene.when(elected(level=2)) == APPLIED


def test_it_rises_beyond_what_this_release_knows() -> None:
    """Another release may lead; this one follows what it understands, and refuses the rest."""
    scene = given(*raised("m1"), master_joined("m1", level=9))
    assert scene.when(elected(level=9)) == APPLIED
    (verdict,) = scene.write("af.test.task.submitted.cli", b'{"id":"a","shell":"true"}', {wire.VERSION: "9"})
    assert why(verdict) == (Kind.REJECTED, Reason.UNKNOWN_VERSION)
    assert scene.when(acquired("l", 1)) == APPLIED


def test_an_election_is_a_message_of_level_1() -> None:
    """A fold of level 1 would not read another, and would not learn that the level rose."""
    event = events.LeaderElected(epoch=1, master="m1", level=2)
    (verdict,) = Scene().write(wire.elected(NAMESPACE), encode(event), LEVEL_2)
    assert why(verdict) == (Kind.QUARANTINED, Reason.UNKNOWN_VERSION)
    assert level_headers([event]) is None


# What it changes -----------------------------------------------------------------------


def test_each_kind_of_level_2_is_looked_at() -> None:
    assert ADDED.keys() == {kind for kind, since in SINCE.items() if since == 2}


@pytest.mark.parametrize("kind", ADDED)
def test_below_its_level_a_kind_is_unknown_and_not_answered(kind: str) -> None:
    scene = given(elected(), joined("w1"))
    assert why(scene.when(ADDED[kind])) == (Kind.QUARANTINED, Reason.UNKNOWN_KIND)
    assert (scene.state.quarantined, scene.state.rejected) == (1, 0)
    assert not scene.plan()


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("version", ["2", "3", "x"])
@pytest.mark.parametrize("actor", ["x", "a$b"])
@pytest.mark.parametrize("data", [b"[{},{}]", b"not JSON"])
def test_however_badly_it_is_said(kind: str, version: str, actor: str, data: bytes) -> None:
    scene = given(elected())
    verdicts = scene.write(wire.event(NAMESPACE, kind, actor), data, {wire.VERSION: version})
    assert [why(verdict) for verdict in verdicts] == [(Kind.QUARANTINED, Reason.UNKNOWN_KIND)]
    assert not scene.state.answers


@pytest.mark.parametrize("kind", ADDED)
def test_from_its_level_on_it_counts(kind: str) -> None:
    scene = given(*raised(), joined("w1"))
    assert scene.when(ADDED[kind]).kind in {Kind.APPLIED, Kind.SUPERSEDED}


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("headers", [None, {wire.VERSION: "1"}])
def test_but_not_in_a_message_of_level_1(kind: str, headers: dict[str, str] | None) -> None:
    scene = given(*raised(), joined("w1"))
    data = encode(ADDED[kind](scene.state).event)
    (verdict,) = scene.write(wire.event(NAMESPACE, kind, "m1"), data, headers)
    assert why(verdict) == (Kind.QUARANTINED, Reason.UNKNOWN_KIND)


@pytest.mark.parametrize("kind", [kind for kind, since in SINCE.items() if since == 1])
def test_a_known_kind_in_a_message_of_level_2_is_refused_whole(kind: str) -> None:
    scene = given(elected())
    headers = scene.decision() | LEVEL_2
    verdicts = scene.write(wire.event(NAMESPACE, kind, "x"), b"[{},{}]", headers)
    expected = Kind.REJECTED if ROLES[kind] is Role.CLIENT else Kind.QUARANTINED
    assert [why(verdict) for verdict in verdicts] == [(expected, Reason.UNKNOWN_VERSION)]


def test_and_a_client_is_told() -> None:
    scene = given(elected())
    scene.given(submitted("a", lock="l", by="app"))
    (answer,) = decided_in(scene.lead(), events.EventRejected)
    assert (answer.seq, answer.index, answer.client) == (2, -1, "app")
    assert (answer.reason, answer.id) == ("unknown_version", "")
    assert not scene.state.tasks


def test_a_message_means_for_ever_what_it_meant_where_it_stands() -> None:
    scene = given(elected(), submitted("a", lock="l"), elected(level=2), submitted("a", lock="l"))
    assert scene.task("a").seq == 4
    assert scene.task("a").terms.demand.lock == "l"
    scene.write("af.test.task.submitted.cli", b'{"id":"b","function":"f","lock":"l"}')
    assert scene.task("b").terms.demand.lock == ""


def test_the_lock_makes_a_difference_between_bodies() -> None:
    scene = given(*raised(), submitted("a"))
    assert why(scene.when(submitted("a", lock="l"))) == (Kind.REJECTED, Reason.CONFLICT)
    assert scene.when(submitted("b", lock="l")) == APPLIED
    assert why(scene.when(submitted("b", lock="m"))) == (Kind.REJECTED, Reason.CONFLICT)
    assert scene.when(submitted("b", lock="l")).kind is Kind.DUPLICATE


# A fold that may follow only level 1 ---------------------------------------------------


@pytest.mark.parametrize("kind", ADDED)
def test_a_pinned_fold_does_not_understand_what_is_above_it(kind: str) -> None:
    pinned = Scene(knows=1).given(elected(), elected(level=2), joined("w1"))
    assert pinned.state.level == 2
    assert why(pinned.when(ADDED[kind])) == (Kind.QUARANTINED, Reason.UNKNOWN_KIND)
    assert why(pinned.when(submitted("a", lock="l"))) == (Kind.REJECTED, Reason.UNKNOWN_VERSION)
    assert pinned.when(submitted("b")) == APPLIED


SEEDS: Final = st.integers(0, 2**32)


def both(messages: list[Logged]) -> tuple[Namespace, Namespace, int]:
    """Fold as two releases do, as long as level 1 is in force; how many messages that were."""
    pinned, full = Namespace(NAMESPACE, knows=1), Namespace(NAMESPACE, knows=LEVEL)
    for count, message in enumerate(messages):
        assert fold_message(pinned, message) == fold_message(full, message)
        assert (pinned.level, pinned.epoch) == (full.level, full.epoch)
        if full.level > LEVEL_FIRST:
            return pinned, full, count
    return pinned, full, len(messages)


@given_any(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_up_to_the_end_of_level_1_a_pinned_fold_agrees_with_a_full_one(seed: int) -> None:
    pinned, full, _ = both(History(seed).run(60))
    assert dump(pinned) == dump(full)


@given_any(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_log_that_never_leaves_level_1_holds_nothing_of_level_2(seed: int) -> None:
    history = History(seed, level=1)
    history.garble = False  # or a digit of an election may become any level
    messages = history.run(60)
    pinned, full, folded = both(messages)
    assert folded == len(messages)
    assert dump(pinned) == dump(full)
    for nothing in (full.masters, full.locks, full.lock_tokens, full.lock_users, full.lock_generation):
        assert not nothing
    assert not any(task.terms.demand.lock for task in full.tasks.values())


def test_histories_tell_of_both_levels() -> None:
    """Or the properties above would say little."""
    seen: set[str] = set()
    for seed in range(30):
        history = History(seed)
        seen.add(f"begins at {history.level}")
        state = Namespace(NAMESPACE)
        for message in history.run(60):
            level = state.level
            kind = ".".join(message.subject.split(".")[2:4])
            kinds = {verdict.kind for verdict in fold_message(state, message)}
            seen |= {f"{kind} {one}" for one in kinds if kind in ADDED}
            seen |= {"rises"} if level == 1 < state.level and state.epoch > 1 else set[str]()
            seen |= {"uses a lock"} if state.lock_users else set[str]()
    assert {"begins at 1", "begins at 2", "rises", "uses a lock"} <= seen
    assert {f"{kind} applied" for kind in ADDED} <= seen
    assert {f"{kind} quarantined" for kind in ADDED} <= seen


# Level by level, the whole way ---------------------------------------------------------


def test_a_cluster_is_changed_over_while_it_works() -> None:
    scene = given(elected(master="m1"), joined("w1", slots=2, level=LEVEL), submitted("a"))
    scene.lead()
    scene.given(elected(master="m2", level=2), master_joined("m2"), master_joined("m1"))
    scene.given(completed("a"), submitted("b", lock="l"), submitted("c", lock="l"))
    scene.lead()
    assert scene.running_at("w1") == ["b"]
    scene.given(elected(master="m1"), completed("b"))
    scene.lead()
    assert scene.running_at("w1") == ["c"]
    said: list[Any] = [message for message in scene.messages if "task.assigned" in message.subject]
    assert [(message.headers or {}).get(wire.VERSION) for message in said] == [None, "2", "2"]
