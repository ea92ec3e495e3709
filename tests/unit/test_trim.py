"""In how many steps the beginning of a log is removed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow.log.stream import StreamInfo, _State
from agentflow.log.trim import _STEP_BYTES, _steps


@given(size=st.integers(0, 40 * _STEP_BYTES), begin=st.integers(0, 10_000), length=st.integers(1, 10_000))
def test_steps_lead_to_the_end_and_are_alike(size: int, begin: int, length: int) -> None:
    steps = _steps(_info(size), begin, begin + length)
    assert steps[-1] == begin + length
    lengths = [after - before for before, after in pairwise([begin, *steps])]
    assert min(lengths) > 0
    assert len(set(lengths[:-1])) <= 1
    assert len(steps) <= 1 + size // _STEP_BYTES


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, [90]),
        (_STEP_BYTES - 1, [90]),
        (2 * _STEP_BYTES, [30, 60, 90]),
        (8 * _STEP_BYTES, [*range(10, 91, 10)]),
    ],
)
def test_a_long_log_is_removed_a_part_at_a_time(size: int, expected: list[int]) -> None:
    assert _steps(_info(size), 0, 90) == expected


def _info(size: int) -> StreamInfo:
    return StreamInfo(config={}, created="", state=_State(bytes=size))
