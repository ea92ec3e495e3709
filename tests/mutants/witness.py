"""A pytest plugin: writes down which files were really imported, and what became of each test.

Without it a run could be green because it looked at another copy of the code.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

import pytest

REPORT_VARIABLE: Final = "MUTANT_REPORT"
_PACKAGES: Final = ("agentflow", "agentflow_nodes", "agentflow_projections")

_outcomes: Final[dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember the worst of a test's phases."""
    if report.failed or report.nodeid not in _outcomes:
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report where the harness looks for it."""
    path = os.environ.get(REPORT_VARIABLE)
    if path is None or hasattr(session.config, "workerinput"):
        return
    files = [
        module.__file__
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _PACKAGES and getattr(module, "__file__", None)
    ]
    Path(path).write_text(json.dumps({"files": files, "outcomes": _outcomes}))
