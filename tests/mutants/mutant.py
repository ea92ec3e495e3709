"""A mutant: one defence switched off, and the tests that are to miss it."""

from __future__ import annotations

from msgspec import Struct


class Mutant(Struct, frozen=True):
    """An exact piece of one file, and what stands there instead."""

    name: str
    file: str
    old: str
    """Must be found exactly once; otherwise the mutant is stale."""
    new: str
    tests: tuple[str, ...]
    """The cheapest tests that go red, as pytest names them."""
    quick: bool = False
    """Whether they take a second or so: then the mutant runs with the acceptance tests."""


class Stale(Exception):
    """The code has moved on: the mutant does not apply any more."""


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the defence off. Raises Stale."""
    count = text.count(mutant.old)
    if count != 1:
        raise Stale(f"{mutant.name}: expected once in {mutant.file}, found {count} times: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)
