"""Recorded logs fold to what they folded to when they were recorded."""

from __future__ import annotations

import msgspec
import pytest

from tests.golden.record import SCENES, Expected, expectation, expected_of, read_log


def stored(name: str) -> Expected:
    return msgspec.json.decode(expected_of(name).read_bytes(), type=Expected)


@pytest.mark.parametrize("name", SCENES)
def test_a_recorded_log_means_what_it_meant(name: str) -> None:
    found, expected = expectation(read_log(name)), stored(name)
    assert msgspec.structs.asdict(found) | {"digest": ""} == msgspec.structs.asdict(expected) | {"digest": ""}


@pytest.mark.parametrize("name", SCENES)
def test_a_recorded_log_folds_to_the_same_state(name: str) -> None:
    assert expectation(read_log(name)).digest == stored(name).digest


def test_the_logs_show_every_verdict() -> None:
    seen = {word for name in SCENES for verdict in stored(name).verdicts for word in verdict.split()[1:2]}
    assert seen == {"applied", "duplicate", "superseded", "rejected", "quarantined"}
