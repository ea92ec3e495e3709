"""Copies the tree, switches a defence off in the copy, and runs tests there.

The copy comes before everything else on the path of its processes, children included, and a
witness inside of the run says which files it imported: a mutant counts as killed only if the
mutated file was among them, if none came from elsewhere, and if a test failed (that the
code could not even be loaded is no merit of a test).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import cache_from_source
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from tests.mutants.mutant import Mutant, Stale, mutated
from tests.mutants.witness import REPORT_VARIABLE

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = ("core", "nodes", "projections")
RUN_S_MAX: Final = 600.0
"""A run that takes longer is ended; its mutant is killed by hanging."""
_OUTPUT_LINES: Final = 40
_TESTS_FAILED: Final = 1


class HarnessError(Exception):
    """The run says nothing about the mutant."""


class Report(Struct, frozen=True):
    """What the witness wrote."""

    files: list[str] = []
    outcomes: dict[str, str] = {}


class Run(Struct, frozen=True):
    """A run of tests in a copy."""

    status: int
    output: str
    report: Report

    @property
    def failed(self) -> list[str]:
        """Tests that failed."""
        return [name for name, outcome in self.report.outcomes.items() if outcome == "failed"]

    def end_of_output(self) -> str:
        """Its last lines, to show."""
        return "\n".join(self.output.splitlines()[-_OUTPUT_LINES:])


@contextmanager
def copy_of_tree() -> Generator[Path]:
    """A copy of the working tree as it is: what git knows, and what is new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve() / "tree"
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():  # not deleted since
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        yield copy


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> Run:
    """Run tests in a copy."""
    report = copy / "witness.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.witness", *options, *tests]
    process = subprocess.Popen(
        command, cwd=copy, env=_environment(copy, report), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process:
        try:
            output, _ = process.communicate(timeout=RUN_S_MAX)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
    found = msgspec.json.decode(report.read_bytes(), type=Report) if report.exists() else Report()
    return Run(process.returncode, output.decode(errors="replace"), found)


def _environment(copy: Path, report: Path) -> dict[str, str]:
    path = os.pathsep.join([*(str(copy / source) for source in SOURCES), str(copy)])
    return os.environ | {"PYTHONPATH": path, REPORT_VARIABLE: str(report)}


def red_before(copy: Path, run: Run) -> set[str]:
    """The tests that are red without any mutation. Raises HarnessError if the run says nothing of them."""
    _check_origin(copy, run)
    if run.status not in {0, _TESTS_FAILED} or (run.status and not run.failed):
        raise HarnessError(f"the tests did not run\n{run.end_of_output()}")
    return set(run.failed)


def is_killed(copy: Path, mutant: Mutant) -> bool:
    """Whether its tests miss the defence. The copy is spoilt. Raises Stale, HarnessError."""
    mutate(copy, mutant)
    run = run_tests(copy, mutant.tests, "-x")
    _check_origin(copy, run)
    if str(copy / mutant.file) not in run.report.files:
        raise HarnessError(f"{mutant.name}: {mutant.file} was not imported\n{run.end_of_output()}")
    if run.status not in {0, _TESTS_FAILED}:
        raise HarnessError(f"{mutant.name}: the tests did not run\n{run.end_of_output()}")
    return run.status == _TESTS_FAILED and bool(run.failed)


def mutate(copy: Path, mutant: Mutant) -> None:
    """Switch the defence off in the copy. Raises Stale."""
    path = copy / mutant.file
    if not path.exists():
        raise Stale(f"{mutant.name}: there is no {mutant.file}")
    path.write_text(mutated(mutant, path.read_text()))
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


def _check_origin(copy: Path, run: Run) -> None:
    if not run.report.files:
        raise HarnessError(f"nothing of the project was imported\n{run.end_of_output()}")
    foreign = [file for file in run.report.files if not Path(file).is_relative_to(copy)]
    if foreign:
        raise HarnessError(f"imported from elsewhere: {foreign[:3]}")
