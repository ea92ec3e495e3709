"""`just model`: walk through all interleavings of the protocols; the last line is one JSON object.

    python -m tests.model.check [--quick]

Ends with 1 if a property is violated, a mutant gets through, or a walk could not be finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from msgspec import Struct

from tests.model.cases import FULL, MUTANTS, QUICK, Case
from tests.model.explorer import Walk


class Tally(Struct):
    """What all walks saw together."""

    models: int = 0
    states: int = 0
    transitions: int = 0
    violations: int = 0
    unfinished: int = 0
    mutants: int = 0
    mutants_found: int = 0

    @property
    def is_good(self) -> bool:
        """Whether everything is as it must be."""
        return not self.violations and not self.unfinished and self.mutants_found == self.mutants


def main() -> int:
    """Walk, tell of each walk, and of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small bounds only")
    given = parser.parse_args()
    cases = MUTANTS + QUICK + ([] if given.quick else FULL)
    tally = Tally()
    for case, walk in _walks(cases):
        for line in _told(case, walk, tally):
            _say(line)
    _say(json.dumps({name: getattr(tally, name) for name in Tally.__struct_fields__}))
    return 0 if tally.is_good else 1


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _walks(cases: list[Case]) -> Iterator[tuple[Case, Walk]]:
    """One process a walk, so that the memory of one is given back before the next."""
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with pool:
        yield from zip(cases, pool.map(Case.walk, cases), strict=True)


def _told(case: Case, walk: Walk, tally: Tally) -> Iterator[str]:
    """Count a walk, and say what it saw."""
    extent = f"{walk.states:,} states, {walk.transitions:,} transitions, depth {walk.depth}"
    if case.mutant:
        tally.mutants += 1
        found = walk.found is not None and case.fault in walk.found.fault
        tally.mutants_found += found
        yield f"{'found' if found else 'NOT FOUND'}  {case.mutant}  ({extent})"
        if walk.found is not None:
            yield f"       {len(walk.found.trace)} steps to: {walk.found.fault}"
        return
    tally.models += 1
    tally.states += walk.states
    tally.transitions += walk.transitions
    if walk.found is not None:
        tally.violations += 1
        yield f"VIOLATED  {walk.name}  ({extent})"
        yield from (f"       {number}. {step}" for number, step in enumerate(walk.found.trace, 1))
        yield f"       {walk.found.fault}"
    elif not walk.complete:
        tally.unfinished += 1
        yield f"UNFINISHED  {walk.name}  ({extent})"
    else:
        yield f"holds  {walk.name}  ({extent})"


if __name__ == "__main__":
    sys.exit(main())
