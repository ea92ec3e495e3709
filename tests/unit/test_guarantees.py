"""Every promise of the README has a test that bears its words, and every such test its promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
TESTS: Final = ROOT / "tests" / "acceptance" / "test_guarantees.py"
_SECTION: Final = re.compile(r"^## Guarantees\n(.*?)^What is not promised:\n", re.MULTILINE | re.DOTALL)
_PROMISE: Final = re.compile(r"^- \*\*(.+?)\*\*(.*?)(?=^- |^\n|\Z)", re.MULTILINE | re.DOTALL)
_TEST: Final = re.compile(r"`(test_\w+)`")


class Promise(NamedTuple):
    """What is promised, and the tests that are said to show it."""

    words: str
    tests: list[str]

    @property
    def name(self) -> str:
        """The name of the test that shows it."""
        words = re.sub(r"[^\w ]", "", self.words.lower())
        return "test_" + "_".join(words.split())


def _promises() -> list[Promise]:
    section = _SECTION.search((ROOT / "README.md").read_text())
    assert section is not None, "the README has no guarantees"
    return [
        Promise(" ".join(words.split()), _TEST.findall(more)) for words, more in _PROMISE.findall(section[1])
    ]


def _functions() -> dict[str, ast.AsyncFunctionDef | ast.FunctionDef]:
    nodes = ast.parse(TESTS.read_text()).body
    return {
        node.name: node
        for node in nodes
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("promise", _promises(), ids=lambda promise: promise.name)
def test_a_promise_names_the_test_that_bears_its_words(promise: Promise) -> None:
    assert promise.tests == [promise.name]


def test_promises_and_tests_are_the_same_in_the_same_order() -> None:
    assert [promise.name for promise in _promises()] == list(_functions())


@pytest.mark.parametrize("name", _functions())
def test_a_test_of_a_promise_asserts_something(name: str) -> None:
    body = list(ast.walk(_functions()[name]))
    asserts = any(isinstance(node, ast.Assert) for node in body)
    # One that was there before asserts where it stands.
    lends = any(isinstance(node, ast.Attribute) and node.attr.startswith("test_") for node in body)
    assert asserts or lends


def test_pytest_runs_all_of_them() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"::(test_\w+)$", collected, re.MULTILINE) == [promise.name for promise in _promises()]
    assert "skip" not in TESTS.read_text()
    assert "xfail" not in TESTS.read_text()


def test_what_is_not_promised_is_said() -> None:
    text = (ROOT / "README.md").read_text()
    said = text.partition("What is not promised:\n")[2].partition("\n## ")[0]
    for word in ("start", "lock", "token", "sync_interval", "suspect", "at least once"):
        assert word in said, word
