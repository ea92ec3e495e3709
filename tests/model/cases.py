"""What is walked through: each model within several bounds, and each of its mutants.

The quick cases are seconds of work and run with the unit tests; the others are for `just model`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final

from msgspec import Struct

from tests.model import leader, tickets_state
from tests.model.explorer import Model, Walk, explore
from tests.model.tickets import Tickets
from tests.model.tickets_state import Mode

X: Final[Mode] = "exclusive"
S: Final[Mode] = "shared"


class Case(Struct, frozen=True):
    """A model to be walked through, or a mutant of one, in which a violation must be found."""

    make: Callable[[], Model[Any]]
    mutant: str = ""
    fault: str = ""
    """What the violation found must say."""
    quick: bool = True
    """Whether it is walked through with the unit tests."""

    def walk(self, **limits: int) -> Walk:
        """Walk through it."""
        model: Model[Hashable] = self.make()
        return explore(model, **limits)


def _leader(**bounds: Any) -> Case:
    return Case(partial(leader.Leader, leader.Bounds(**bounds)))


def _tickets(rules: tickets_state.Rules | None = None, **bounds: Any) -> Case:
    return Case(partial(Tickets, tickets_state.Bounds(**bounds), rules))


_SILENT: Final = tickets_state.Rules(expiry="silent")

QUICK: Final = [
    _leader(writes=(2, 1)),
    _leader(writes=(1, 1), losses=1),
    _leader(writes=(1, 1), elections=2, decisions=1),
    _tickets(renewals=(1, 0)),
    _tickets(renewals=(0, 0), creations=2),
    _tickets(_SILENT, renewals=(1, 0)),
    _tickets(modes=(S, X), renewals=(0, 1)),
    _tickets(renewals=(0, 0), uses=1, losses=1),
]
"""Sound, and seen whole in seconds."""

FULL: Final = [
    _leader(writes=(2, 2)),
    _leader(writes=(3, 1)),
    _leader(writes=(2, 1), ttl=3),
    _leader(writes=(2, 1), losses=1),
    _leader(writes=(1, 1, 1)),
    _leader(writes=(2, 1), elections=3, decisions=1),
    _leader(writes=(1, 1, 1), elections=3, decisions=1, evictions=False),
    _tickets(),
    _tickets(_SILENT),
    _tickets(creations=2, renewals=(1, 0)),
    _tickets(ttl=3),
    _tickets(losses=1, renewals=(1, 0)),
    _tickets(uses=1, renewals=(1, 0)),
    _tickets(modes=(X, X, X), renewals=(0, 0, 0)),
    _tickets(_SILENT, modes=(X, X, X), renewals=(0, 0, 0)),
    _tickets(modes=(S, X, S), renewals=(0, 0, 0)),
    _tickets(modes=(S, S, X), renewals=(0, 0, 0)),
    _tickets(modes=(X, X, X), slots=2, renewals=(0, 0, 0)),
]
"""Sound, and minutes of work together."""

OVERLAP: Final = "two holders"
ORDER: Final = "is granted before"


def _leader_mutant(name: str, fault: str, *, quick: bool = True, **bounds: Any) -> Case:
    model = partial(leader.Leader, leader.Bounds(**bounds), leader.MUTANTS[name])
    return Case(model, f"lease: {name}", fault, quick)


def _tickets_mutant(name: str, fault: str, *, quick: bool = True, **bounds: Any) -> Case:
    model = partial(Tickets, tickets_state.Bounds(**bounds), tickets_state.MUTANTS[name])
    return Case(model, f"tickets: {name}", fault, quick)


MUTANTS: Final = [
    _leader_mutant("no margin", OVERLAP),
    _leader_mutant("deadline counted after the acknowledgement", OVERLAP),
    _leader_mutant("renewal without compare-and-set", OVERLAP),
    _leader_mutant("silence taken for a yes", OVERLAP),
    _leader_mutant(
        "any write of our own adopted",
        "is in effect after",
        quick=False,
        writes=(4, 1),
        evictions=False,
        pauses=False,
    ),
    _leader_mutant("eviction without waiting", OVERLAP),
    _leader_mutant("revisions of a new bucket begin at 1", OVERLAP, losses=1),
    _leader_mutant("election without compare-and-set", "is elected after", writes=(1, 1), elections=2),
    _leader_mutant("no fence", "is stored after", writes=(1, 1), elections=2, decisions=1),
    _tickets_mutant("no margin", OVERLAP, renewals=(0, 0)),
    _tickets_mutant("deadline counted after the acknowledgement", OVERLAP, renewals=(0, 0)),
    _tickets_mutant("renewal without compare-and-set", OVERLAP, renewals=(1, 0)),
    _tickets_mutant("silence taken for a yes", ORDER, renewals=(0, 0)),
    _tickets_mutant(
        "any creation of our own counts from the last send",
        OVERLAP,
        quick=False,
        creations=2,
        renewals=(0, 0),
    ),
    _tickets_mutant("eviction without waiting", OVERLAP, renewals=(0, 0)),
    _tickets_mutant("eviction without compare-and-set", OVERLAP, quick=False, expires=False),
    _tickets_mutant("replicas forget by their own clocks", ORDER),
    _tickets_mutant("token of the last renewal", ORDER, renewals=(1, 0)),
    _tickets_mutant("a reading without the own ticket", ORDER),
    _tickets_mutant("grants at once after a loss", OVERLAP, renewals=(0, 0), losses=1),
    _tickets_mutant(
        "revisions of a new bucket begin at 1",
        "is granted after",
        quick=False,
        renewals=(1, 0),
        losses=1,
        evictions=False,
    ),
    _tickets_mutant("a resource that does not look", "the resource accepts", renewals=(0, 0), uses=1),
]
"""One for each rule of each model; of some the shortest violation lies many seconds of work away."""
