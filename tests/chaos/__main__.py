"""`just chaos`: a campaign of faults on real processes. The last line printed is one JSON object."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from msgspec.structs import replace
from rich.console import Console
from rich.status import Status

from tests.chaos.campaign import Result, revision, run
from tests.chaos.options import FAMILIES, Options
from tests.chaos.schedule import plan

CI = (
    Options(seed=1, seconds=26.0, tasks=33_000, pace_s=(0.5, 1.0)),
    Options(seed=2, seconds=26.0, tasks=26_000, pace_s=(0.5, 1.0), replicas=3),
)
"""What continuous integration runs: at least 50,000 tasks and 60 faults."""


def _arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="just chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many runs, with this seed and the following"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults strike, in each run")
    parser.add_argument("--tasks", type=int, default=100_000, help="tasks in each run")
    parser.add_argument("--replicas", type=int, choices=(1, 3), default=1, help="servers")
    parser.add_argument("--faults", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--pace", default="3,8", help="shortest and longest time between two faults, seconds")
    parser.add_argument("--masters", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep every run in a folder below this one")
    parser.add_argument("--plan", action="store_true", help="only print the faults")
    parser.add_argument("--ci", action="store_true", help="what continuous integration runs")
    return parser.parse_args(given)


def _options(given: argparse.Namespace) -> list[Options]:
    if given.ci:
        return list(CI)
    low, _, high = given.pace.partition(",")
    families = tuple(given.faults.split(","))
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise SystemExit(f"--faults: expected of {', '.join(FAMILIES)}; found {', '.join(sorted(unknown))}")
    one = Options(
        seed=given.seed,
        seconds=given.minutes * 60,
        tasks=given.tasks,
        replicas=given.replicas,
        families=families,
        pace_s=(float(low), float(high or low)),
        masters=given.masters,
        workers=given.workers,
        clients=given.clients,
    )
    return [replace(one, seed=given.seed + number) for number in range(given.seeds)]


def _run_all(wanted: list[Options], keep: Path | None) -> list[Result]:
    console = Console(stderr=True)
    results: list[Result] = []
    for options in wanted:
        with console.status("") as status:
            result = uvloop.run(run(options, keep, _tell(console, status, options)))
        results.append(result)
        _show(console, result)
    return results


def together(results: list[Result]) -> list[Result]:
    """Several runs as one campaign: an invariant must have had something to look at in one of them."""
    seen = {name for result in results for name, rows in result.looked.items() if rows}
    found: list[Result] = []
    for result in results:
        broken = [finding for finding in result.broken if finding.looked or finding.name not in seen]
        found.append(replace(result, violations=len(broken), broken=broken))
    return found


def _tell(console: Console, status: Status, options: Options) -> Any:
    head = f"seed {options.seed}, {options.replicas} server{'s' if options.replicas > 1 else ''}"
    return (lambda text: status.update(f"{head}: {text}")) if console.is_terminal else lambda _text: None


def _show(console: Console, result: Result) -> None:
    blind = sum(not finding.looked for finding in result.broken)
    broken = len(result.broken) - blind
    verdict = f"{broken} invariants broken" if broken else "all invariants hold"
    verdict += f", {blind} had nothing to look at" if blind else ""
    console.print(
        f"seed {result.seed}: {verdict}; {result.tasks} tasks, {result.faults} faults, {result.seconds}",
        highlight=False,
    )
    for finding in result.broken:
        console.print(
            f"  {finding.name}: {finding.violations} of {finding.looked}: {finding.says}", highlight=False
        )
        for row in finding.shown:
            console.print(f"    {row}", highlight=False, markup=False)
    if result.folder:
        console.print(f"  kept in {result.folder}; repeat with: {result.command}", highlight=False)


def _summary(wanted: list[Options], results: list[Result], seconds: float) -> dict[str, Any]:
    faults: Counter[str] = Counter()
    coverage: Counter[str] = Counter()
    for result in results:
        faults.update(result.faults_by_kind)
        coverage.update(result.coverage)
    return {
        "violations": sum(result.violations for result in results),
        "tasks": sum(result.tasks for result in results),
        "faults": sum(result.faults for result in results),
        "seeds": [result.seed for result in results],
        "seconds": round(seconds, 1),
        "revision": revision(),
        "faults_by_kind": dict(sorted(faults.items())),
        "coverage": dict(coverage),
        "runs": [
            {
                "options": options,
                "seconds": result.seconds,
                "memory_mb": result.memory_mb,
                "looked": result.looked,
                "broken": result.broken,
                "folder": result.folder,
            }
            for options, result in zip(wanted, results, strict=True)
        ],
    }


def _say(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


def main() -> int:
    """Run what is asked for; 1 if an invariant was broken."""
    given = _arguments(sys.argv[1:])
    wanted = _options(given)
    if given.plan:
        for options in wanted:
            _say(f"seed {options.seed}", *map(str, plan(options)))
        return 0
    began = time.monotonic()
    results = together(_run_all(wanted, given.keep))
    summary = _summary(wanted, results, time.monotonic() - began)
    _say(msgspec.json.encode(summary).decode())
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
