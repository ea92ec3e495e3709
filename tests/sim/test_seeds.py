"""Five hundred clusters on simulated time. They need nothing but a core, so they run beside tests that wait."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

import pytest

SEEDS: Final = 500
AT_ONCE: Final = 100
"""So many that every fault has to happen and every check to see something among them."""
TASKS_MIN: Final = 1_000_000 * AT_ONCE // SEEDS

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("first", range(1, SEEDS + 1, AT_ONCE))
def test_nothing_is_violated(first: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.sim",
        "--seed",
        str(first),
        "--seeds",
        str(AT_ONCE),
        "--jobs",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=850)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if ": ok," not in line) + done.stderr
    summary = json.loads(lines[-1])
    assert (summary["seeds"], summary["violations"]) == (AT_ONCE, 0)
    assert summary["tasks"] >= TASKS_MIN
