"""What the simulated tasks do, and the journal of their side effects.

A task's one argument says how it behaves: how long it runs, how many attempts fail first,
whether it kills its worker. So a task, wherever and whenever it runs, does the same.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from agentflow.events import TaskAssigned

BRIEF: Final = "brief"
"""What is known to be short: workers are handed more of it than they have slots."""
FUNCTIONS: Final = ("common", "special")
"""Every worker has the first; some have the second."""


class Body(Struct, frozen=True, array_like=True):
    """How a task behaves."""

    run_us: int = 0
    failures: int = 0
    """Attempts that fail before one succeeds."""
    fatal: bool = False
    """Failing, it says that trying again is of no use."""
    kills: bool = False
    """It takes its worker with it."""


class Began(Struct, frozen=True):
    """A side effect: an attempt of a task began."""

    task: str
    attempt: int
    incarnation: int
    worker: str
    suspect: bool
    at_s: float
    last_seq: int
    """Where the log ended at that moment."""
    inputs: int
    """Results it was handed."""
    wrong: bool
    """One of them was not the one it asked for."""


_decode: Final = msgspec.json.Decoder(list[Body]).decode


def body_of(assigned: TaskAssigned) -> Body:
    """What an attempt is to do."""
    return _decode(bytes(assigned.args))[0]  # type: ignore[arg-type]


def fails(body: Body, attempt: int) -> bool:
    """Whether this attempt fails."""
    return attempt <= body.failures


def result_of(task: str) -> bytes:
    """What a task's success gives, JSON."""
    return b'"of %s"' % task.encode()


def inputs_are_right(assigned: TaskAssigned) -> bool:
    """Whether the results handed over are those of the tasks named."""
    workflow = assigned.id.partition("/")[0]
    return all(
        bytes(given.value) == result_of(f"{workflow}/{name}")  # type: ignore[arg-type]
        for name, given in assigned.inputs.items()
    )
