"""What if: a stretch of history again, under another policy, beside what happened."""

from __future__ import annotations

from msgspec import Struct

from agentflow.domain.fold import fold
from agentflow.domain.recording import Figures, Recording
from agentflow.domain.simulate import ASSUMPTIONS, Change, Simulation
from agentflow.domain.snapshot import restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.errors import InvalidRequest
from agentflow.frames import judge
from agentflow.limits import LEVEL
from agentflow.log.port import Message
from agentflow_projections.export import state_before
from agentflow_projections.past import TO_THE_END, Past, Progress, Until, walk


class WhatIf(Struct, frozen=True, kw_only=True):
    """What happened, what the simulation makes of it, and what it makes of it otherwise.

    The second is there to be compared with the first: as far as they differ, the simulation does
    not know something.
    """

    basis: int
    """Position of the state that all begin with."""
    last_seq: int
    begin_ms: int
    """Log time of the beginning."""
    happened: Figures
    simulated: Figures
    otherwise: Figures
    estimated: int
    """Runs of the third whose length is not known and was estimated."""
    assumptions: list[str]


async def what_if(
    past: Past,
    change: Change,
    *,
    begin: Until = TO_THE_END,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
) -> WhatIf:
    """Simulate a stretch. Raises InvalidRequest if the change makes no sense there."""
    state = await state_before(past, begin, progress)
    basis, begun = state.seq, snapshot(state)
    recording = Recording(state)
    await walk(past, state, _Folding(state, recording), until=until, progress=progress)
    if state.seq == basis:
        raise InvalidRequest(f"nothing lies in that stretch: it would begin after {basis}")
    simulated = Simulation(restore(begun, knows=LEVEL), recording, Change()).run(progress)
    try:
        other = Simulation(restore(begun, knows=LEVEL), recording, change)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    otherwise = other.run(progress)
    return WhatIf(
        basis=basis,
        last_seq=state.seq,
        begin_ms=recording.journal.begin_ms,
        happened=recording.journal.figures(),
        simulated=simulated,
        otherwise=otherwise,
        estimated=other.estimated,
        assumptions=list(ASSUMPTIONS),
    )


class _Folding:
    """Folds messages while a recording looks on."""

    def __init__(self, state: Namespace, recording: Recording) -> None:
        self._state = state
        self._observe = recording.observe

    def __call__(self, message: Message) -> None:
        judged = judge(message.subject, message.data, message.headers)
        fold(self._state, message.seq, message.time_ns, judged, self._observe)
        self._state.ended.clear()
