"""What the operations page says of messages, states and options is what the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest

from agentflow_nodes.cli import COMMANDS, build
from agentflow_nodes.master.sharing import Standing

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "operations.md").read_text()
_SOURCES: Final = [path for part in ("core", "nodes", "projections") for path in (ROOT / part).rglob("*.py")]
CODE: Final = "\n".join(path.read_text() for path in _SOURCES)
_SHOWN: Final = re.compile(r"`([^`]+)`")
_COMMAND: Final = re.compile(r"(?:^    |`)agentflow ([\w-]+)([^`\n]*)", re.MULTILINE)


def _rows(heading: str) -> list[str]:
    """The first cells of the table below a heading."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines]


def _log_lines() -> list[str]:
    return [line for cell in _rows("## What log lines mean") for line in _SHOWN.findall(cell)]


@pytest.mark.parametrize("line", _log_lines())
def test_a_log_line_explained_is_one_that_is_written(line: str) -> None:
    assert f'"{line}"' in CODE


def test_every_warning_is_explained() -> None:
    written = set(re.findall(r"_log\.(?:warning|error|exception)\(\s*\"([^\"]+)\"", CODE))
    assert written - set(_log_lines()) == set(), "explain it in docs/operations.md"


def test_every_standing_of_a_master_is_explained() -> None:
    found = {standing for cell in _rows("## Masters") for standing in _SHOWN.findall(cell)}
    assert found == {standing.replace("_", " ") for standing in Standing}


def test_every_state_of_a_worker_is_explained() -> None:
    found = {state for cell in _rows("## Workers") for state in _SHOWN.findall(cell)}
    assert found == {"active", "busy", "draining", "stalled", "offline"}
    source = (ROOT / "nodes" / "agentflow_nodes" / "cli" / "workers.py").read_text()
    assert all(f'"{state}"' in source for state in found)


@pytest.mark.parametrize(("name", "rest"), sorted(set(_COMMAND.findall(PAGE))))
def test_a_command_shown_has_the_options_shown(name: str, rest: str) -> None:
    assert name in {command.name for command in COMMANDS}
    group: Any = build([name])
    known = {option for parameter in group.commands[name].params for option in parameter.opts}
    ours = rest.partition(" -- ")[0]
    assert set(re.findall(r"--[a-z-]+", ours)) <= known
