"""Keeping a ticket alive, and knowing when it is not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from agentflow.ending import end_tasks
from agentflow.errors import Disconnected, OperatingError
from agentflow.leases.port import MARGIN_SHARE, Lease, Leases
from agentflow.logs import get_logger

RENEW_SHARE: Final = 1 / 3
"""Part of the time to live after which a ticket is renewed."""
_PAUSE_S_MAX: Final = 0.2

_log = get_logger(__name__)


class Keeper:
    """Renews a ticket until `stop`, or until it is lost: `lost` is set then, and stays.

    The deadline is watched apart from the renewals, which may hang: whoever was paused past
    it finds that it is lost before anything is sent. A renewal that succeeds later changes
    nothing.
    """

    def __init__(self, leases: Leases, lease: Lease, clock: Callable[[], float]) -> None:
        self.lost: Final = asyncio.Event()
        self.reason = ""
        """Why it was lost."""
        self.lease = lease
        """As of the last renewal that we heard of."""
        self._leases = leases
        self._clock = clock
        self._value: bytes | None = None
        self._on_lost: list[Callable[[], None]] = []
        self._renewing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._run(), name=f"ticket {lease.key}")
        self._watch_deadline()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 if it is lost."""
        return 0.0 if self.lost.is_set() else max(self.lease.left_s(self._clock()), 0.0)

    def is_kept(self) -> bool:
        """Whether it still counts, at this very moment."""
        if not self.left_s:
            self._lose("its time to live ran out before it was renewed")
        return not self.lost.is_set()

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call back when it is lost; from the event loop, once."""
        self._on_lost.append(callback)

    def write(self, value: bytes) -> None:
        """Let the next renewal write another value."""
        self._value = value

    async def renew(self, ttl_s: int | None = None) -> bool:
        """Renew now, for another time to live if given; false if it is lost. Raises Disconnected."""
        async with self._renewing:
            if not self.is_kept():
                return False
            lease = self.lease if ttl_s is None else replace(self.lease, ttl_s=ttl_s)
            renewed = await self._leases.renew(lease, self._value)
            if renewed is None:
                self._lose("it was taken away")
            elif self.is_kept():
                self.lease = renewed
                self._watch_deadline()
            return self.is_kept()

    async def stop(self) -> Lease:
        """Renew no more. What is lost later is not told."""
        self._on_lost.clear()
        if self._timer is not None:
            self._timer.cancel()
        await end_tasks(self._task)
        return self.lease

    async def _run(self) -> None:
        while not self.lost.is_set():
            await asyncio.sleep(max(self._renewal_due_s(), 0.0))
            try:
                await self.renew()
            except OperatingError as error:
                level = _log.info if isinstance(error, Disconnected) else _log.warning
                level("a ticket could not be renewed", key=self.lease.key, error=str(error))
                await asyncio.sleep(random.uniform(0, _PAUSE_S_MAX))

    def _renewal_due_s(self) -> float:
        """Seconds until the next renewal: a third of the time to live after the last was sent."""
        lease = self.lease
        return lease.left_s(self._clock()) - lease.ttl_s * (1 - RENEW_SHARE - MARGIN_SHARE)

    def _watch_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.left_s, self._on_deadline)

    def _on_deadline(self) -> None:
        if self.is_kept():  # the loop's clock is ahead of ours
            self._watch_deadline()

    def _lose(self, reason: str) -> None:
        if self.lost.is_set():
            return
        self.reason = reason
        self.lost.set()
        callbacks, self._on_lost = self._on_lost, []
        for callback in callbacks:
            callback()
