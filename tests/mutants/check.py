"""`just mutants`: switch each defence off in turn; the last line is one JSON object.

    python -m tests.mutants.check [--list] [--quick] [--only NAME ...]

Ends with 1 if a mutant survives or is stale, or if a run says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.table import Table

from tests.mutants.catalogue import MUTANTS
from tests.mutants.harness import HarnessError, copy_of_tree, is_killed, mutate, red_before, run_tests
from tests.mutants.mutant import Mutant, Stale


class Verdict(Struct, frozen=True):
    """What became of a mutant: `killed`, `survived`, `stale`, or `broken` if the run says nothing."""

    mutant: Mutant
    what: str
    seconds: float
    detail: str = ""


def check(mutants: Sequence[Mutant], progress: Console) -> Iterator[Verdict]:
    """A verdict on each mutant. Raises HarnessError if the tests do not run at all."""
    with copy_of_tree() as tree:
        fresh: list[Mutant] = []
        for mutant in mutants:
            stale = _staleness(tree, mutant)
            if stale is None:
                fresh.append(mutant)
            else:
                yield stale
        if not fresh:
            return
        tests = sorted({test for mutant in fresh for test in mutant.tests})
        progress.print(f"{len(tests)} tests without any mutation …", style="dim")
        red = red_before(tree, run_tests(tree, tests))
        spoilt = [mutant for mutant in fresh if _touched(mutant, red)]
        for mutant in spoilt:
            yield Verdict(mutant, "broken", 0.0, f"red before any mutation: {_touched(mutant, red)}")
        fresh = [mutant for mutant in fresh if mutant not in spoilt]
        progress.print(f"{len(fresh)} mutants …", style="dim")
        # Tests of a real edge want the machine for themselves.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(partial(_judge, tree), [mutant for mutant in fresh if _is_unit(mutant)])
        for mutant in fresh:
            if not _is_unit(mutant):
                yield _judge(tree, mutant)


def _touched(mutant: Mutant, red: set[str]) -> list[str]:
    """Which of the red tests are among a mutant's."""
    return sorted(name for name in red if name.startswith(mutant.tests))


def _is_unit(mutant: Mutant) -> bool:
    return all(test.startswith("tests/unit/") for test in mutant.tests)


def _staleness(tree: Path, mutant: Mutant) -> Verdict | None:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        target = Path(folder) / mutant.file
        target.parent.mkdir(parents=True)
        if (tree / mutant.file).exists():
            shutil.copy2(tree / mutant.file, target)
        try:
            mutate(Path(folder), mutant)
        except Stale as stale:
            return Verdict(mutant, "stale", 0.0, str(stale))
    return None


def _judge(tree: Path, mutant: Mutant) -> Verdict:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve() / "tree"
        shutil.copytree(tree, copy)
        try:
            what, detail = ("killed" if is_killed(copy, mutant) else "survived"), ""
        except HarnessError as error:
            what, detail = "broken", str(error)
    return Verdict(mutant, what, time.monotonic() - began, detail)


def main() -> int:
    """Check, print a table, and as the last line the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("--quick", action="store_true", help="only those killed within seconds")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    given = parser.parse_args()
    shown = Console(width=130)
    unknown = set(given.only) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list names them")
    chosen = [mutant for mutant in MUTANTS if not given.only or mutant.name in given.only]
    chosen = [mutant for mutant in chosen if mutant.quick or not given.quick]
    if given.list:
        shown.print(_table([(mutant, "quick" if mutant.quick else "", "") for mutant in chosen]))
        return 0
    return _report(chosen, shown)


def _report(chosen: Sequence[Mutant], shown: Console) -> int:
    verdicts: list[Verdict] = []
    try:
        for verdict in check(chosen, Console(stderr=True)):
            shown.print(
                f"{verdict.what}: {verdict.mutant.name}  {verdict.detail}", style=_STYLES[verdict.what]
            )
            verdicts.append(verdict)
    except HarnessError as error:
        shown.print(str(error), style="red", markup=False)
    shown.print(_table([(each.mutant, each.what, f"{each.seconds:.1f}") for each in verdicts]))
    counts = {
        what: sum(each.what == what for each in verdicts)
        for what in ("killed", "survived", "stale", "broken")
    }
    sys.stdout.write(json.dumps({"mutants": len(chosen), **counts}) + "\n")
    return 0 if counts["killed"] == len(chosen) else 1


_STYLES = {"killed": "green", "survived": "red", "stale": "yellow", "broken": "magenta"}


def _table(rows: Sequence[tuple[Mutant, str, str]]) -> Table:
    table = Table("defence off", "where", "missed by", "", "s")
    for mutant, what, seconds in rows:
        table.add_row(mutant.name, mutant.file, "\n".join(mutant.tests), what, seconds)
    return table


if __name__ == "__main__":
    sys.exit(main())
