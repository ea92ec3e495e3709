"""`just sim`: run many seeds, and print as the last line one JSON object.

    python -m tests.sim --seeds 500 [--seed FIRST] [--tasks T] [--jobs J] [--trace] [--background]

For each seed its digest is printed: of the log, of what the fold made of every event, and of
everything that happened. The same seed gives the same digest, in any process. A seed that
fails is printed with what was violated and how to run it again. The exit code is 1 if any
seed failed, or if in many of them a check had nothing to look at or a fault never happened.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Final

from rich.console import Console
from rich.progress import Progress

from tests.sim.model import Check
from tests.sim.world import TASKS, Report, simulate

_SHOWN_MAX = 10
"""Violations shown of one seed."""
_LOOKS_FROM_SEEDS = 100
"""From so many seeds on every check must have had something to look at, and everything must have happened."""
_NICEST: Final = 19
_HAPPENS: Final = (
    *("crash", "killed_by_task", "killed_for_good", "pause", "pause_beyond_lease", "clock_step"),
    *("partition", "partition_answers", "partition_requests", "server_down"),
    *("leases_lost", "locks_lost", "writes_forgotten", "drain", "handover", "upgrade"),
    *("answers_lost", "requests_lost", "deliveries_repeated", "writes_stored_unknown", "writes_lost_unknown"),
    *("appends_fenced", "appends_repeated", "requests_late", "outcomes_superseded", "begun_by_the_lost"),
    *("levels_raised", "drains_requested", "workers_left", "workers_lost", "masters_left", "rejoins"),
    *("runs_under_locks", "locks_not_had", "lock_holders_lost", "assignments_stored_twice"),
)
"""Faults and situations."""


def main() -> int:
    """Run, print, and tell whether all is well."""
    given = _arguments()
    if given.background:
        os.nice(_NICEST)
    console = Console(stderr=False, highlight=False, soft_wrap=True)
    began = time.perf_counter()
    reports = list(_shown(_run(given), given, console))
    summary = _summary(reports, time.perf_counter() - began)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["violations"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="just sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many seeds")
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument("--tasks", type=int, default=TASKS, help="tasks submitted with each seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--trace", action="store_true", help="print everything that happened")
    parser.add_argument(
        "--background",
        action="store_true",
        help="give way to all other processes, print only seeds that fail",
    )
    return parser.parse_args()


def _run(given: argparse.Namespace) -> Iterator[Report]:
    seeds = range(given.seed, given.seed + given.seeds)
    if given.jobs == 1 or given.seeds == 1:
        _quiet()
        yield from (simulate(seed, given.tasks) for seed in seeds)
        return
    with ProcessPoolExecutor(given.jobs, initializer=_quiet) as pool:
        futures = [pool.submit(simulate, seed, given.tasks) for seed in seeds]
        for future in as_completed(futures):
            yield future.result()


def _quiet() -> None:
    """What the nodes log of simulated faults is of no interest."""
    logging.disable(logging.CRITICAL)


def _shown(reports: Iterable[Report], given: argparse.Namespace, console: Console) -> Iterator[Report]:
    with Progress(console=console, disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = progress.add_task("seeds", total=given.seeds)
        for report in reports:
            if report.violations or not given.background:
                console.print(_line(report), markup=False)
            if given.trace:
                console.print("\n".join(report.trace), markup=False)
            for violation in report.violations[:_SHOWN_MAX]:
                console.print(f"    {violation}", markup=False)
            if report.violations:
                again = f"just sim --seeds 1 --seed {report.seed} --tasks {given.tasks} --trace"
                console.print(f"    run it again: {again}", markup=False)
            progress.advance(bar)
            yield report


def _line(report: Report) -> str:
    verdict = f"{len(report.violations)} violations" if report.violations else "ok"
    figures = f"{report.tasks} tasks, {sum(report.faults.values())} faults, {report.messages} messages"
    return f"seed {report.seed}: {verdict}, {figures}, {report.simulated_s:.0f} s, {report.digest[:16]}"


def _summary(reports: list[Report], wall_s: float) -> dict[str, object]:
    faults, harmed, seen, looked = (Counter[str]() for _ in range(4))
    for report in reports:
        faults.update(report.faults)
        harmed.update(report.harmed)
        seen.update(report.seen)
        looked.update(report.looked)
    happened = faults + harmed + seen
    many = len(reports) >= _LOOKS_FROM_SEEDS
    blind = [str(name) for name in Check if not looked[name]] if many else []
    missing = [name for name in _HAPPENS if not happened[name]] if many else []
    simulated_s = sum(report.simulated_s for report in reports)
    return {
        "seeds": len(reports),
        "tasks": sum(report.tasks for report in reports),
        "messages": sum(report.messages for report in reports),
        "violations": sum(len(report.violations) for report in reports) + len(blind) + len(missing),
        "failed_seeds": sorted(report.seed for report in reports if report.violations),
        "faults": sum(faults.values()),
        "fault_kinds": dict(sorted(faults.items())),
        "messages_harmed": dict(sorted(harmed.items())),
        "reached": dict(sorted(seen.items())),
        "looked_at": dict(sorted(looked.items())),
        "checks_that_saw_nothing": blind,
        "never_happened": missing,
        "simulated_s": round(simulated_s, 1),
        "wall_s": round(wall_s, 1),
        "speedup": round(simulated_s / wall_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
