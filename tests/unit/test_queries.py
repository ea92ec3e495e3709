"""Questions: what is described, what `--as-of` and `--param` understand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from agentflow.errors import InvalidRequest
from agentflow_nodes.cli.drawing import Bar, gantt_svg, gantt_text, mermaid, plot_svg
from agentflow_nodes.cli.errors import CliError
from agentflow_nodes.cli.query import parse_parameters
from agentflow_nodes.cli.report import bars_of
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


BARS = [
    Bar("first", "completed", 0, 10, 50),
    Bar('<b>"evil" & \x1b[31mred', "failed", 50, 60, 100),
]


def drawn(svg: str) -> ET.Element:
    """A picture, parsed; raises if it is no XML."""
    return ET.fromstring(svg)  # noqa: S314 - drawn a moment ago


def test_bars_of_text_are_in_proportion() -> None:
    first, second = (line.plain for line in gantt_text(BARS, 100))
    assert first.count("█") == pytest.approx(second.count("█"), abs=2)
    assert first.index("█") < second.index("█")
    assert "\x1b" not in second


def test_a_picture_is_sound_xml_whatever_names_contain() -> None:
    root = drawn(gantt_svg(BARS, "a <title> & more"))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert '<b>"evil" & red' in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2 * len(BARS)


def test_a_curve_has_a_point_for_each_stretch() -> None:
    root = drawn(plot_svg({"ready": [0, 5, 2], "running": [1, 1, 1]}, 3_000, "depth"))
    curves = [each.attrib["points"].split() for each in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in curves] == [3, 3]


def test_nothing_to_draw_is_drawn_too() -> None:
    assert gantt_text([], 80) == []
    drawn(gantt_svg([], "none"))
    drawn(plot_svg({"ready": []}, 0, "none"))


def test_a_graph_names_states_and_arrows() -> None:
    text = mermaid([("a", "completed"), ('b"]', "failed")], [("a", 'b"]')])
    assert text.splitlines() == [
        "flowchart LR",
        '    n0["a<br>completed"]:::completed',
        '    n1["b#34;#93;<br>failed"]:::failed',
        "    n0 --> n1",
        "    classDef completed fill:#3a9a3a,color:#fff",
        "    classDef failed fill:#c83030,color:#fff",
    ]


def test_what_has_not_ended_is_drawn_to_the_end_of_what_is_known() -> None:
    row = {
        "name": "a",
        "state": "completed",
        "submitted_at": "2026-01-01 00:00:00",
        "ready_at": "2026-01-01 00:00:01",
    }
    ended = {**row, "started_at": "2026-01-01 00:00:02", "ended_at": "2026-01-01 00:00:10.5"}
    waits = {**row, "state": "ready", "started_at": None, "ended_at": None}
    assert bars_of([ended, waits]) == [
        Bar("a", "completed", 1_000, 2_000, 10_500),
        Bar("a", "ready", 1_000, 10_500, 10_500),
    ]
