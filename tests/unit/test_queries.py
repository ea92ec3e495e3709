"""Questions: what is described, what `--as-of` and `--param` understand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agentflow.errors import InvalidRequest
from agentflow_nodes.cli.errors import CliError
from agentflow_nodes.cli.query import parse_parameters
from agentflow_projections.query import described_here, parse_when

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
VIEWS = {
    *("attempts", "decisions", "dependencies", "events", "leaders", "locks"),
    *("quarantine", "queue", "tasks", "workers", "workflows"),
}


def test_every_table_says_what_it_is() -> None:
    known = described_here()
    assert {each.name for each in known if not each.base} >= VIEWS
    assert [each.name for each in known if not each.meaning] == []


def test_every_column_people_see_says_what_it_is() -> None:
    views = [each for each in described_here() if not each.base]
    assert [(each.name, column) for each in views for column, _, said in each.columns if not said] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4711", 4711),
        ("2026-01-01", datetime(2026, 1, 1, tzinfo=UTC)),
        ("2026-01-01T10:30", datetime(2026, 1, 1, 10, 30, tzinfo=UTC)),
        ("2026-01-01T10:30+02:00", datetime(2026, 1, 1, 8, 30, tzinfo=UTC)),
        ("-90s", NOW - timedelta(seconds=90)),
        ("-15m", NOW - timedelta(minutes=15)),
        ("-2h", NOW - timedelta(hours=2)),
        ("-3d", NOW - timedelta(days=3)),
    ],
)
def test_a_position_or_a_time(text: str, expected: int | datetime) -> None:
    assert parse_when(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "-5w", "-999999999d", "2026-13-01", "4711.5"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a position, a time"):
        parse_when(text, NOW)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("n=5", 5),
        ("x=0.5", 0.5),
        ("b=true", True),
        ("z=null", None),
        ("id=t=1", "t=1"),
        ("l=[1]", "[1]"),
        ("e=", ""),
    ],
)
def test_a_parameter_has_the_type_it_looks_like(given: str, expected: Any) -> None:
    assert list(parse_parameters([given]).values()) == [expected]


@pytest.mark.parametrize("given", ["n", "=5", "a b=1", "1=2"])
def test_a_parameter_without_a_name_or_value_is_refused(given: str) -> None:
    with pytest.raises(CliError, match="expected NAME=VALUE"):
        parse_parameters([given])
