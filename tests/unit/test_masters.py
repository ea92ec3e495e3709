"""Masters: who is registered, and which of them may lead."""

from __future__ import annotations

import pytest

from agentflow.domain import masters
from agentflow.domain.state import APPLIED, SUPERSEDED, Kind
from agentflow.events import Reason
from tests.unit.given import Scene, elected, given, master_joined, master_left, raised


def refused(scene: Scene, master: str, level: int | None = None) -> str:
    """Why an election does not count."""
    before = (scene.state.epoch, scene.state.leader, scene.state.elected_seq, scene.state.level)
    verdict = scene.when(elected(master=master, level=level))
    assert (verdict.kind, verdict.reason) == (Kind.QUARANTINED, Reason.CONFLICT)
    assert (scene.state.epoch, scene.state.leader, scene.state.elected_seq, scene.state.level) == before
    return verdict.detail


# Being there ---------------------------------------------------------------------------


def test_a_master_registers() -> None:
    scene = given(elected(level=2)).after(250)
    assert scene.when(master_joined("m7", 2)) == APPLIED
    master = scene.state.masters["m7"]
    assert (master.name, master.instance, master.level) == ("m7", "unguessable", 2)
    assert (master.host, master.pid) == ("host", 7)
    assert (master.seq, master.joined_ms) == (2, scene.now_ms)


def test_who_registers_again_is_another() -> None:
    scene = given(*raised("m1", "m2"))
    assert scene.when(master_joined("m1", 1, instance="anew")) == APPLIED
    assert list(scene.state.masters) == ["m2", "m1"]
    assert (scene.state.masters["m1"].instance, scene.state.masters["m1"].level) == ("anew", 1)


def test_a_master_leaves() -> None:
    scene = given(*raised("m1", "m2"))
    assert scene.when(master_left("m1")) == APPLIED
    assert list(scene.state.masters) == ["m2"]
    assert scene.when(master_left("m1")) == SUPERSEDED


def test_what_the_one_before_it_says_does_not_count() -> None:
    scene = given(*raised("m1"), master_joined("m1", instance="anew"))
    assert scene.when(master_left("m1")) == SUPERSEDED
    assert scene.when(master_left("m1", "anew")) == APPLIED


def test_the_register_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joined first is forgotten, and may register again."""
    monkeypatch.setattr(masters, "MASTERS_MAX", 3)
    scene = given(*raised("m1", "m2", "m3"), master_joined("m1"), master_joined("m4"))
    assert list(scene.state.masters) == ["m3", "m1", "m4"]
    assert "m2" in refused(scene, "m2")
    assert scene.given(master_joined("m2")).when(elected(master="m2")) == APPLIED


def test_registering_again_forgets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "MASTERS_MAX", 3)
    scene = given(*raised("m1", "m2", "m3"), master_joined("m2"))
    assert set(scene.state.masters) == {"m1", "m2", "m3"}


# Being elected -------------------------------------------------------------------------


def test_at_level_1_anybody_may_lead() -> None:
    scene = given(elected(master="nobody"))
    assert scene.when(elected(master="somebody")) == APPLIED


def test_the_election_that_raises_the_level_needs_no_registration() -> None:
    scene = given(elected(master="m1"))
    assert scene.when(elected(master="m2", level=2)) == APPLIED
    assert not scene.state.masters


def test_from_then_on_who_is_not_registered_is_noise() -> None:
    scene = given(*raised("m1"))
    assert refused(scene, "intruder") == "no master is called intruder"
    assert scene.when(elected(master="m1")) == APPLIED


def test_not_even_the_leader_itself() -> None:
    scene = given(elected(master="m1", level=2))
    assert refused(scene, "m1") == "no master is called m1"
    assert scene.given(master_joined("m1")).when(elected(master="m1")) == APPLIED


def test_who_left_leads_no_more() -> None:
    scene = given(*raised("m1", "m2"), master_left("m2"))
    assert refused(scene, "m2") == "no master is called m2"


def test_nor_who_knows_only_a_lower_level() -> None:
    scene = given(*raised("m1"), master_joined("m2", level=1))
    assert refused(scene, "m2") == "m2 knows level 1, not 2"
    assert refused(scene, "m1", level=3) == "m1 knows level 2, not 3"


def test_a_master_that_leaves_goes_on_leading_until_another_is_elected() -> None:
    """The log deposes, not the register."""
    scene = given(*raised("m1", "m2"), master_left("m1"))
    assert (scene.state.leader, scene.state.epoch) == ("m1", 1)
    assert scene.when(elected(master="m2")) == APPLIED
