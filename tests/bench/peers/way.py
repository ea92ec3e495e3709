"""The two ways in which a peer is measured.

`RECORDED` is AgentFlow's own job: the outcome of every task is stored by the peer's own result
mechanism, and the client that submitted has read every outcome. Its task gives back the number
it was given, and the client checks them all. `UNRECORDED` is the peer at its fastest: results
are off, the task does nothing, and it counts as done when its body ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RECORDED: Final = "recorded"
UNRECORDED: Final = "unrecorded"
WAYS: Final = (RECORDED, UNRECORDED)


@dataclass(frozen=True)
class Way:
    """How a peer is measured in one of them, and what to tell the reader of the table."""

    measure: Callable[[int, int], float]
    """Given tasks and warm-up tasks: start everything, warm up, return the seconds from before
    the first submit until the last completion is known."""
    tasks: int
    """So many that a run takes about five seconds on two cores."""
    settings: str
    """How client, workers, broker and results are set."""


def check(outcomes: list[int]) -> None:
    """Fail unless these are the numbers from zero on, in order, as the tasks were given them."""
    assert outcomes == list(range(len(outcomes))), f"wrong outcomes, beginning with {outcomes[:10]}"
