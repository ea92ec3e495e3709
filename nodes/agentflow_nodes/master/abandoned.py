"""Locks whose holder died while nobody waited: the leader says in the log that they are lost.

Whoever takes a lock from a silent holder says so himself. Where nobody wants it, only the
bucket forgets, when the ticket's time is over; then the log would name a holder for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from typing import Final

from agentflow import wire
from agentflow.domain.state import Namespace
from agentflow.errors import OperatingError
from agentflow.events import LockLost
from agentflow.frames import compose, level_headers
from agentflow.log.port import Done, Frame, Log
from agentflow.logs import get_logger

_EVENTS_MAX: Final = 500

_log = get_logger(__name__)


class Abandoned:
    """Compares what the log says is held with the tickets there are.

    `tickets` gives the tokens of all tickets in the bucket of locks. Raises OperatingError.
    """

    def __init__(
        self,
        log: Log,
        state: Namespace,
        master: str,
        nonce: str,
        tickets: Callable[[], Awaitable[AbstractSet[int]]],
    ) -> None:
        self._log = log
        self._state = state
        self._master = master
        self._nonce = nonce
        self._tickets = tickets
        self._numbers = itertools.count(1)
        self._missing: set[tuple[str, int]] = set()

    async def sweep(self) -> None:
        """Say of holders without a ticket, twice in a row, that they lost their lock."""
        if not self._state.locks:
            self._missing.clear()
            return
        tickets = await self._tickets()
        missing = {
            (name, token)
            for name, holdings in self._state.locks.items()
            for token in holdings
            if token not in tickets
        }
        gone, self._missing = missing & self._missing, missing
        lost = [self._loss(name, token) for name, token in sorted(gone)[:_EVENTS_MAX]]
        if lost:
            await self._say(lost)

    def _loss(self, name: str, token: int) -> LockLost:
        holding = self._state.locks.get(name, {}).get(token)
        holder = holding.holder if holding is not None else ""
        return LockLost(name=name, token=token, holder=holder, reason="its holder fell silent")

    async def _say(self, lost: list[LockLost]) -> None:
        _log.info("locks were abandoned", namespace=self._state.name, count=len(lost))
        subject = wire.event(self._state.name, LockLost.kind, self._master)
        for data, _ in compose(lost):
            msg_id = f"{self._master}.{self._nonce}.lost{next(self._numbers)}"
            appended = await self._log.append(Frame(subject, data, msg_id, level_headers(lost)))
            if not isinstance(appended, Done):
                raise OperatingError(appended.detail)
