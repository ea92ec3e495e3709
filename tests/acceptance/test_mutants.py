"""Defences switched off: those whose absence costs a unit test seconds to notice (all: `just mutants`)."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from tests.mutants.catalogue import MUTANTS
from tests.mutants.check import check
from tests.mutants.harness import ROOT
from tests.mutants.mutant import Mutant, Stale, mutated

QUICK = [mutant for mutant in MUTANTS if mutant.quick]
HARMLESS = Mutant(
    "nothing is off",
    "core/agentflow/domain/decided.py",
    "if at.epoch != state.epoch:",
    "if state.epoch != at.epoch:",
    ("tests/unit/test_fold.py::test_nothing_decided_in_an_old_term_changes_anything",),
)


@pytest.mark.timeout(300)
def test_without_a_defence_the_tests_go_red_and_with_it_they_do_not() -> None:
    verdicts = list(check([*QUICK, HARMLESS], Console(file=StringIO())))
    found = {verdict.mutant.name: verdict.what for verdict in verdicts}
    assert found == {mutant.name: "killed" for mutant in QUICK} | {HARMLESS.name: "survived"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies_and_its_tests_are_there(mutant: Mutant) -> None:
    mutated(mutant, (ROOT / mutant.file).read_text())
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_a_stale_mutant_is_named() -> None:
    mutant = Mutant("gone", "core/agentflow/ids.py", "this was never there", "", ())
    with pytest.raises(Stale, match=r"gone: expected once in core/agentflow/ids\.py, found 0 times"):
        mutated(mutant, (ROOT / mutant.file).read_text())


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
