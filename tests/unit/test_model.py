"""The protocols of lease and lock, in every interleaving within small bounds (all bounds: `just model`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model import leader, tickets_state
from tests.model.cases import MUTANTS, QUICK, Case
from tests.model.explorer import explore


class Counter:
    """A model of two counters that must not meet at 3."""

    name = "counters"

    def initial(self) -> tuple[int, int]:
        return (0, 5)

    def steps(self, state: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
        first, second = state
        if first < 5:
            yield "up", (first + 1, second)
        if second > 0:
            yield "down", (first, second - 1)

    def fault(self, state: tuple[int, int]) -> str | None:
        return "they meet at 3" if state == (3, 3) else None


class Apart(Counter):
    """The same, without anything that must not be."""

    def fault(self, state: tuple[int, int]) -> str | None:
        return None


def test_every_state_is_seen_once() -> None:
    walk = explore(Apart())
    assert (walk.states, walk.transitions, walk.depth) == (36, 60, 10)
    assert walk.complete


def test_a_violation_is_told_with_the_shortest_way_to_it() -> None:
    found = explore(Counter()).found
    assert found is not None
    assert found.fault == "they meet at 3"
    assert sorted(found.trace) == ["down", "down", "up", "up", "up"]


def test_a_walk_that_was_cut_short_says_so() -> None:
    assert not explore(Apart(), states_max=10).complete


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.make().name)
def test_nothing_that_must_not_be_can_be_reached(case: Case) -> None:
    walk = case.walk()
    assert walk.found is None, "\n".join((walk.found.fault, *walk.found.trace))
    assert walk.complete


@pytest.mark.parametrize("case", [case for case in MUTANTS if case.quick], ids=lambda case: case.mutant)
def test_without_any_one_rule_it_can(case: Case) -> None:
    walk = case.walk(states_max=50_000)
    assert walk.found is not None, f"{walk.name} does without it"
    assert case.fault in walk.found.fault


def test_every_rule_has_its_mutant() -> None:
    mutants = [f"lease: {name}" for name in leader.MUTANTS] + [
        f"tickets: {name}" for name in tickets_state.MUTANTS
    ]
    assert [case.mutant for case in MUTANTS] == mutants
    assert len(leader.MUTANTS) == len(leader.Rules.__struct_fields__)
    assert len(tickets_state.MUTANTS) == len(tickets_state.Rules.__struct_fields__)
