"""What commands about the past show to people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from agentflow import events
from agentflow.domain.simulate import Change
from agentflow_nodes.cli import diff, replay, what_if, why
from agentflow_nodes.cli.errors import CliError
from agentflow_nodes.cli.output import console
from agentflow_nodes.cli.past import parse_until
from agentflow_projections.compare import compare
from agentflow_projections.history import History
from agentflow_projections.past import Until
from agentflow_projections.replay import Difference, Verified
from agentflow_projections.replay import replay as replayed
from agentflow_projections.whatif import what_if as simulated
from agentflow_projections.why import why as explained
from tests.unit.given import (
    NAMESPACE,
    Scene,
    assigned,
    completed,
    elected,
    failed,
    flow,
    given,
    joined,
    submitted,
)
from tests.unit.told import Told, messages_of

Captured = pytest.CaptureFixture[str]


def at_work() -> Scene:
    scene = given(elected(), joined("w1"), flow("f1", {"a": [], "b": ["a"]}), assigned("f1/a"))
    scene.after(300).given(completed("f1/a", run_us=300_000), assigned("f1/b"))
    scene.after(100).given(failed("f1/b", "exit", run_us=100_000))
    scene.given(flow("f2", {"a": [], "c": ["a"]}), assigned("f2/a")).after(900)
    return scene.given(completed("f2/a", run_us=900_000))


def lines(captured: Captured) -> list[list[str]]:
    return [line.split() for line in captured.readouterr().out.splitlines()]


async def test_why_shows_the_cause_the_workers_and_what_happened(capsys: Captured) -> None:
    scene = given(elected(), joined("w1"), submitted("a", needs=events.Needs(gpus=2), title="\x1b[31m"))
    console().print(why.described(await explained(Told(scene.messages), "a")))
    shown = lines(capsys)
    assert ["waits:", "no", "worker", "fits:", "no", "worker", "could", "run", "it,", "even", "idle"] in shown
    assert ["w1", "1", "0", "0.00", "has", "0", "gpus,", "not", "2"] in shown
    assert shown[-1][3:] == ["ready", "submitted", "by", "cli;", "ready", "from", "here", "on"]


async def test_why_shows_the_placement_below_the_assignment(capsys: Captured) -> None:
    scene = given(elected(), joined("w1"), joined("w2", functions=[]), submitted("a"))
    scene.lead()
    answer = await explained(Told(scene.messages), "a")
    console().print(why.described(answer))
    shown = capsys.readouterr().out
    assert "w1 was the only one that could take it; planned on position 4, first in the queue" in shown
    assert "does not know app.work" in shown
    document: Any = why.document(answer)
    assert document["moments"][-1]["placement"]["worker"] == "w1"
    assert document["waiting"]["cause"] == "none"


async def test_diff_shows_both_runs(capsys: Captured) -> None:
    history, scene = History(NAMESPACE), at_work()
    for message in messages_of(scene.messages):
        history.apply(message)
    diff._show(compare(history.workflows["f1"], history.workflows["f2"], scene.now_ms))
    shown = lines(capsys)
    assert [
        "a",
        "*",
        "✓",
        "completed",
        "1",
        "0",
        "ms",
        "300",
        "ms",
        "→",
        "900",
        "ms",
        "w1",
        "+600",
        "ms",
    ] in shown
    assert any(line[:5] == ["c", "—", "→", "○", "ready"] for line in shown)
    assert ["critical", "path", "of", "f1:", "a", "→", "b"] in shown


async def test_what_if_shows_three_columns_and_what_it_assumes(capsys: Captured) -> None:
    found = await simulated(Told(at_work().messages), Change(durations=(("*", 2.0),)))
    what_if._show(found)
    shown = lines(capsys)
    assert ["took", "1.3", "s", "1.7", "s", "3.5", "s"] in shown
    assert ["completed", "2", "3", "3"] in shown
    assert ["assumed:"] in shown


async def test_replay_shows_what_was_read_and_what_the_state_holds(capsys: Captured) -> None:
    found = await replayed(Told(at_work().messages))
    replay._show(found)
    shown = lines(capsys)
    assert ["open", "tasks", "2"] in shown
    assert ["hash", found.hash] in shown


def test_a_difference_names_table_and_position(capsys: Captured) -> None:
    differs = Difference(table="tasks", expected_rows=1_000, found_rows=999)
    replay._show_verified(
        Verified(seq=9, tables={"frames": 5, "tasks": 1_000}, differences=[differs], differs_at=7, chain=True)
    )
    shown = lines(capsys)
    assert ["frames", "5", "5", "same"] in shown
    assert ["tasks", "1,000", "999", "differs"] in shown
    assert "first at position 7:" in " ".join(shown[-1])


def test_moments_are_positions_or_times() -> None:
    assert parse_until("--at", None) == Until()
    assert parse_until("--at", "17") == Until(seq=17)
    at = datetime(2026, 11, 21, 17, 0, tzinfo=UTC)
    assert parse_until("--at", "2026-11-21T17:00") == Until(ms=int(at.timestamp() * 1000))
    ago = parse_until("--at", "-10m").ms
    assert ago is not None
    with pytest.raises(CliError, match="--at: expected a position"):
        parse_until("--at", "soon")


@pytest.mark.parametrize("text", ["=2", "x=-1", "x=many", ""])
def test_a_factor_is_a_number(text: str) -> None:
    with pytest.raises(CliError, match="--durations: expected"):
        what_if._pair("--durations", text, what_if._factor)
