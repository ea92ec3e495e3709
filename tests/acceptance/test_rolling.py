"""A cluster changed over from contract level 1 to 2 under load, one process after the other.

The longer run is `just bench-rolling`.
"""

from __future__ import annotations

import pytest

from tests.bench.rolling import MASTERS, Order, contradictions, roll
from tests.bench.rolling_master import Answer, answer
from tests.cluster import Audit


@pytest.mark.timeout(240)
@pytest.mark.parametrize("order", ["masters", "workers"])
async def test_nothing_is_lost_and_nobody_contradicts_the_log(order: Order) -> None:
    found = await roll(order, 0.5)
    assert found.contradictions == []
    assert found.lost == []
    assert found.tasks > 500
    assert found.refused == 0, "no fold had to put anything aside"
    assert all(found.answers[who] for who in (*MASTERS, "status", "queue")), "all were asked"


@pytest.mark.timeout(240)
async def test_the_level_rises_when_the_last_master_of_the_old_one_has_gone() -> None:
    levels = [level for _, level in (await roll("masters", 0.2)).levels]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (1, 2)


class TestTheAuditItself:
    """It finds what it is there to find."""

    def test_an_answer_the_log_does_not_bear_out(self) -> None:
        audit = Audit("default")
        right = answer("m", audit.state, ["x"])
        assert contradictions(audit, [right]) == []
        wrong_state = Answer("m", 0, 1, right.counts, {"x": ("completed", 3, 0)})
        wrong_count = Answer("m", 0, 1, {**right.counts, "open": 1}, right.states)
        wrong_level = Answer("m", 0, 2, right.counts, right.states)
        found = contradictions(audit, [wrong_state, wrong_count, wrong_level])
        assert [each.partition(":")[0] for each in found] == ["m at 0"] * 3
