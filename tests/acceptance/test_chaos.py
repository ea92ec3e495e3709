"""The campaign of faults, small: its plan is a function of the seed, and a run keeps every invariant."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.chaos import audit
from tests.chaos.__main__ import CI, together
from tests.chaos.audit import Finding
from tests.chaos.campaign import Result
from tests.chaos.options import Options
from tests.chaos.record import LOG
from tests.chaos.schedule import LEAD_IN_S, plan, possible
from tests.eventually import eventually

ROOT = Path(__file__).parents[2]


def chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`just chaos <arguments>`, without just."""
    command = (sys.executable, "-m", "tests.chaos", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_same_seed_plans_the_same_faults() -> None:
    options = Options(seed=7, seconds=120.0, tasks=1)
    assert plan(options) == plan(options)
    assert plan(options) != plan(Options(seed=8, seconds=120.0, tasks=1))
    assert chaos("--plan", "--seed", "7").stdout == chaos("--plan", "--seed", "7").stdout != ""


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_kind_of_fault_strikes_before_any_strikes_twice(replicas: int) -> None:
    options = Options(seed=7, seconds=120.0, tasks=1, replicas=replicas)
    kinds = [fault.kind for fault in plan(options)]
    wanted = {f"{family} {role}" for family, role in possible(options)}
    assert set(kinds[: len(wanted)]) == wanted
    assert plan(options)[0].at_s == LEAD_IN_S


def test_only_the_faults_asked_for_strike() -> None:
    options = Options(seed=7, seconds=60.0, tasks=1, families=("kill", "clock"))
    assert {fault.family for fault in plan(options)} == {"kill", "clock"}


def test_what_continuous_integration_runs_is_enough() -> None:
    assert sum(options.tasks for options in CI) >= 50_000
    assert sum(len(plan(options)) for options in CI) >= 60
    assert {options.replicas for options in CI} == {1, 3}


def test_an_invariant_has_to_see_something_in_one_run_of_a_campaign() -> None:
    blind = Finding("I", "", 0, 1, [["it read no rows: nothing was checked"]])
    broken = Finding("J", "", 5, 2, [])
    seen = together([_result({"I": 0, "J": 5}, blind, broken), _result({"I": 3, "J": 5})])
    assert [result.violations for result in seen] == [1, 0]
    assert seen[0].broken == [broken]
    assert [result.violations for result in together([_result({"I": 0}, blind)] * 2)] == [1, 1]


def _result(looked: dict[str, int], *broken: Finding) -> Result:
    return Result(1, len(broken), 1, 1, {}, {}, {}, looked, list(broken), 1, "", "")


@pytest.mark.timeout(300)
async def test_a_short_run_breaks_nothing_and_can_be_audited_again(tmp_path: Path) -> None:
    arguments = (
        "--seed",
        "5",
        "--minutes",
        "0.1",
        "--pace",
        "0.5,1",
        "--tasks",
        "2000",
        "--keep",
        str(tmp_path),
    )
    done = chaos(*arguments, "--masters", "2", "--workers", "2", "--clients", "1")
    result = _told(done)
    assert result["seeds"] == [5]
    assert result["tasks"] >= 2000
    assert result["faults"] >= 5
    (folder,) = tmp_path.iterdir()
    assert (folder / LOG).stat().st_size > 100_000
    assert await asyncio.to_thread(audit.main, folder) == result["violations"]
    await eventually(lambda: not _left_running(folder))


def _told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The summary of a run that broke nothing. So short a run may have had nothing for an invariant to look at."""
    summary: dict[str, Any] = msgspec.json.decode(done.stdout.splitlines()[-1])
    (run,) = summary["runs"]
    assert [each for each in run["broken"] if each["looked"]] == [], done.stderr
    assert (done.returncode, summary["violations"]) == (bool(run["broken"]), len(run["broken"]))
    return summary


def _left_running(folder: Path) -> list[int]:
    """Processes that mention the run's folder, this one's file handles apart."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if (
                    str(folder).encode()
                    in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.timeout(300)
def test_a_tampered_log_is_found(tmp_path: Path) -> None:
    """The whole way: a run whose recorded log is changed by one byte is not believed."""
    done = chaos(
        *("--seed", "6", "--minutes", "0.05", "--pace", "1,2", "--tasks", "500", "--keep", str(tmp_path)),
        *("--masters", "1", "--workers", "1", "--clients", "1", "--faults", "latency"),
    )
    before = _told(done)["violations"]
    (folder,) = tmp_path.iterdir()
    log = folder / LOG
    data = bytearray(log.read_bytes())
    at = data.rindex(b'"attempt":1')
    data[at + len(b'"attempt":')] = ord("2")
    log.write_bytes(data)
    assert audit.main(folder) > before


@pytest.mark.timeout(120)
async def test_who_interrupts_it_leaves_nothing_behind(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "tests.chaos", "--minutes", "5", "--keep", str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        while not list(tmp_path.glob("*/run.json")):
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=30)
    (folder,) = tmp_path.iterdir()
    await eventually(lambda: not _left_running(folder))
