"""Composing: a leader's decisions as frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from agentflow import wire
from agentflow.domain.state import Namespace
from agentflow.events import Event, Role, TaskAssigned, TaskQuarantined
from agentflow.frames import Decision, Judged, TooLarge, compose, level_headers, level_of
from agentflow.log.port import Frame

_FRAME_EVENTS: Final = 1_000


class Composer:
    """Puts the decisions of one master into frames, each with what a fold will read in it."""

    def __init__(self, state: Namespace, master: str, new_msg_id: Callable[[], str]) -> None:
        self._state = state
        self._master = master
        self._new_msg_id = new_msg_id

    def frames(
        self, kind: str, actor: str, events: list[Event], decision: Decision
    ) -> Iterator[tuple[Frame, Judged]]:
        """The frames for events of one kind and route. What does not fit a frame fails its task, once."""
        subject = wire.event(self._state.name, kind, actor)
        for start in range(0, len(events), _FRAME_EVENTS):
            chunk = events[start : start + _FRAME_EVENTS]
            try:
                filled = compose(chunk)
            except TooLarge:
                yield from self._one_by_one(chunk, decision)
                continue
            level = level_of(chunk)
            headers = {wire.DECISION: decision.header(), **(level_headers(chunk) or {})}
            place = 0
            for data, count in filled:
                held = chunk[place : place + count]
                judged = Judged(kind, actor, Role.LEADER, held, None, decision, level)
                yield Frame(subject, data, self._new_msg_id(), headers), judged
                place += count

    def _one_by_one(self, events: list[Event], decision: Decision) -> Iterator[tuple[Frame, Judged]]:
        for event in events:
            actor = self._worker_of(event)
            try:
                compose([event])
            except TooLarge as error:
                given_up = TaskQuarantined(id=getattr(event, "id", ""), reason="too_large", detail=str(error))
                yield from self.frames(given_up.kind, self._master, [given_up], decision)
            else:
                yield from self.frames(event.kind, actor, [event], decision)

    def _worker_of(self, event: Event) -> str:
        if isinstance(event, TaskAssigned):
            workers = self._state.workers.values()
            return next(
                (worker.name for worker in workers if worker.incarnation == event.incarnation), self._master
            )
        return self._master
