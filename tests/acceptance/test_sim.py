"""The simulation repeats itself, finds nothing, and would find what can be planted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.sim.bugs import BUGS, TASKS, Bug
from tests.sim.model import Check
from tests.sim.world import Report, simulate

SEED = 9


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """What the nodes log of simulated faults is of no interest, and takes most of the time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def report() -> Report:
    """One run of a few hundred tasks."""
    return simulate(SEED, TASKS)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`just sim`, without just."""
    command = [sys.executable, "-m", "tests.sim", "--tasks", str(TASKS), *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=50
    )


def test_nothing_is_violated(report: Report) -> None:
    assert report.violations == []
    assert report.tasks == TASKS


def test_a_run_reaches_what_it_is_for(report: Report) -> None:
    assert sum(report.faults.values()) > 20
    for situation in ("elections", "workers_lost", "outcomes_superseded", "retries", "runs_under_locks"):
        assert report.seen.get(situation), situation
    for look in (
        Check.FENCE,
        Check.REPLAY,
        Check.ROOM,
        Check.STORED,
        Check.SAME,
        Check.BEGUN,
        Check.EXCLUSIVE,
    ):
        assert report.looked.get(look), look


def test_a_seed_gives_the_same_run_again(report: Report) -> None:
    again = simulate(SEED, TASKS)
    assert again.digest == report.digest
    assert again.trace == report.trace


def test_another_seed_gives_another_run(report: Report) -> None:
    assert simulate(SEED + 1, TASKS).digest != report.digest


def test_a_seed_gives_the_same_run_in_every_process(report: Report) -> None:
    printed = {
        run("--seeds", "1", "--seed", str(SEED), PYTHONHASHSEED=hashes).stdout.splitlines()[0]
        for hashes in ("1", "2")
    }
    assert len(printed) == 1
    assert report.digest[:16] in printed.pop()


def test_the_last_line_is_one_json_object() -> None:
    ran = run("--seeds", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads(ran.stdout.splitlines()[-1])
    assert (summary["seeds"], summary["tasks"], summary["violations"]) == (2, 2 * TASKS, 0)
    assert summary["faults"] == sum(summary["fault_kinds"].values()) > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    for seed in range(1, bug.seeds + 1):
        with bug.planted():
            report = simulate(seed, TASKS)
        if any(violation.startswith(bug.expects) for violation in report.violations):
            return
    pytest.fail(f"{bug.seeds} seeds did not violate {bug.expects!r}")


def test_every_bug_is_told_from_sound_code() -> None:
    """What a bug violates is not violated without it, with the same seeds."""
    seeds = range(1, 4)
    assert [simulate(seed, TASKS).violations for seed in seeds] == [[] for _ in seeds]
