"""Why a task waits, went where it went, was tried again, skipped or cancelled: from the log alone.

The log is read twice. First the fold tells what happened to the task. Then, from the position
at which it was submitted, each decision that sent it to a worker is made again on the state
and at the log time that the decision names, and explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from agentflow.domain.explain import Waiting, why_there, why_waits
from agentflow.domain.fold import fold
from agentflow.domain.snapshot import restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.domain.story import Moment, Story
from agentflow.events import TaskAssigned
from agentflow.frames import judge
from agentflow.limits import LEVEL
from agentflow.log.port import Message
from agentflow_projections.past import TO_THE_END, Past, Progress, Until, begin_by, walk

PLACEMENTS_MAX: Final = 20
"""Most assignments of one task that are explained, the latest."""


class Answer(Struct, frozen=True, kw_only=True):
    """What is known of a task as of a position."""

    task: str
    seq: int
    """Position up to which the log was read."""
    time_ms: int
    """Log time of which it is told why the task waits."""
    state: str
    """The task's state; empty: there is no such task."""
    waiting: Waiting | None
    """None: it has ended, or is none."""
    moments: list[Moment]
    known: str
    """What the fold knows of the id: a state, also of a workflow, or "unknown"."""
    workflow: list[str] = []
    """The tasks, if the id is that of an open workflow."""


async def why(
    past: Past,
    wanted: str,
    *,
    until: Until = TO_THE_END,
    now_ms: int | None = None,
    progress: Progress | None = None,
) -> Answer:
    """Explain a task. `now_ms`: the log time it is asked at, if later than what is read."""
    teller = _Teller(begin_by(past, until), wanted)
    await walk(past, teller.state, teller.apply, until=until, progress=progress)
    state, story = teller.state, teller.story
    time_ms = max(state.clock_ms, until.ms or 0, now_ms or 0)
    task = state.tasks.get(wanted)
    if teller.seen is not None:
        await _explain(past, teller.seen, story.moments, wanted)
    workflow = state.workflows.get(wanted)
    return Answer(
        task=wanted,
        seq=state.seq,
        time_ms=time_ms,
        state=str(story.task.state) if story.task is not None else "",
        waiting=why_waits(state, task, time_ms) if task is not None else None,
        moments=story.moments,
        known=state.status(wanted)[0],
        workflow=[each.id for each in workflow.tasks.values()] if workflow is not None else [],
    )


class _Teller:
    """The first reading: what happened, and the state at which the task first was there."""

    def __init__(self, state: Namespace, wanted: str) -> None:
        self.state = state
        self.story = Story(state, wanted)
        self.seen: bytes | None = snapshot(state) if self.story.task is not None else None

    def apply(self, message: Message) -> None:
        judged = judge(message.subject, message.data, message.headers)
        self.story.apply(message.seq, message.time_ns, judged)
        if self.seen is None and self.story.task is not None:
            self.seen = snapshot(self.state)


async def _explain(past: Past, seen: bytes, moments: Sequence[Moment], wanted: str) -> None:
    """The second reading: make each plan again that sent the task somewhere."""
    assigned = [
        moment
        for moment in moments
        if moment.kind == TaskAssigned.kind and moment.verdict == "applied" and moment.decision is not None
    ]
    state = restore(seen, knows=LEVEL)

    def apply(message: Message) -> None:
        fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))
        state.ended.clear()

    for moment in assigned[-PLACEMENTS_MAX:]:
        decision = moment.decision
        assert decision is not None
        await walk(past, state, apply, until=Until(seq=decision.basis))
        task = state.tasks.get(wanted)
        if task is not None and state.seq == decision.basis:
            moment.placement = why_there(state, task, decision.now_ms, moment.silences)
