"""Walks through every state a model can reach, breadth first.

A model is a transition system: an initial state, the steps out of a state, and what must never
be. States are immutable and hashable; two that are equal are visited once. Breadth first means
that the first violation found has no shorter one: its trace is what a person reads.

Exhaustive within the bounds that the model states, and within `states_max`; a walk that ended
there says so in `complete`, and proves nothing by its silence.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Hashable, Iterator
from typing import Final, Protocol, TypeVar

from msgspec import Struct

STATES_MAX: Final = 6_000_000
"""About 3 GB of the largest states there are."""

S = TypeVar("S", bound=Hashable)


class Model(Protocol[S]):
    """A transition system."""

    @property
    def name(self) -> str:
        """What it is a model of, with its bounds."""
        ...

    def initial(self) -> S:
        """Where every history begins."""
        ...

    def steps(self, state: S) -> Iterator[tuple[str, S]]:
        """What may happen next, each with its name. A step that changes nothing may be told."""
        ...

    def fault(self, state: S) -> str | None:
        """Which property this state violates, or None."""
        ...


class Found(Struct, frozen=True):
    """A violation, with the shortest way to it."""

    fault: str
    trace: tuple[str, ...]


class Walk(Struct, frozen=True):
    """What a walk saw."""

    name: str
    states: int
    transitions: int
    depth: int
    complete: bool
    """Whether everything within the model's bounds was seen, or a violation ended the walk."""
    found: Found | None


class _Visited:
    """The states seen so far in the order seen, and from which each was first reached."""

    def __init__(self, initial: Hashable) -> None:
        self.order: list[Hashable] = [initial]
        self.parents = array("q", [-1])
        self._known: set[Hashable] = {initial}

    def add(self, state: Hashable, parent: int) -> bool:
        """Whether it is new."""
        known = self._known
        size = len(known)
        known.add(state)
        if len(known) == size:
            return False
        self.order.append(state)
        self.parents.append(parent)
        return True


def explore(model: Model[S], *, states_max: int = STATES_MAX) -> Walk:
    """Walk until everything was seen, a property is violated, or there are too many states."""
    gc.disable()  # states hold no cycles, and looking for some among millions takes most of the time
    try:
        return _explore(model, states_max)
    finally:
        gc.enable()


def _explore(model: Model[S], states_max: int) -> Walk:
    initial = model.initial()
    visited = _Visited(initial)
    order: list[S] = visited.order  # type: ignore[assignment] # it holds states of this model alone
    transitions = depth = at = 0
    layer_end = 1
    while at < len(order):
        if at == layer_end:
            layer_end, depth = len(order), depth + 1
        for _, after in model.steps(order[at]):
            transitions += 1
            if not visited.add(after, at):
                continue
            fault = model.fault(after)
            if fault is not None:
                found = Found(fault, _trace(model, order, visited.parents))
                return Walk(model.name, len(order), transitions, depth + 1, complete=True, found=found)
        if len(order) > states_max:
            return Walk(model.name, len(order), transitions, depth, complete=False, found=None)
        at += 1
    return Walk(model.name, len(order), transitions, depth, complete=True, found=None)


def _trace(model: Model[S], order: list[S], parents: array[int]) -> tuple[str, ...]:
    """The names of the steps to the last state seen. They are not kept: each is found again from its parent."""
    trace: list[str] = []
    at = len(order) - 1
    while (parent := parents[at]) >= 0:
        trace.append(next(name for name, after in model.steps(order[parent]) if after == order[at]))
        at = parent
    return tuple(reversed(trace))
