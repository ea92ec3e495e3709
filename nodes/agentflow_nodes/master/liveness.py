"""Which workers live: their heartbeats, counted by the leader's own monotonic clock.

Silence counts only over time in which the leader itself was connected: after an election
or a gap everybody has a fresh, full time to live.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.domain.plan import Silence
from agentflow.domain.state import Namespace
from agentflow.logs import get_logger

_log = get_logger(__name__)


class Heartbeat(Struct, frozen=True):
    """A worker's sign of life."""

    incarnation: int
    read: int
    """Sequence of the last assignment it has read: connected but deaf is lost."""
    running: int = 0
    queued: int = 0


_decode: Final = msgspec.json.Decoder(Heartbeat).decode


class Liveness:
    """Listens to heartbeats and tells who has been silent for `ttl_s`."""

    def __init__(self, namespace: str, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._clock = clock
        self._heard: dict[tuple[str, int], float] = {}
        self._read: dict[tuple[str, int], int] = {}
        # Assignments that were not read when we looked: their sequence, and since when.
        self._unread: dict[tuple[str, int], tuple[int, float]] = {}
        self._fresh_at = clock()
        self._connected = True

    async def listen(self, bus: Bus) -> None:
        """Subscribe; heartbeats count from now on."""
        await bus.subscribe(wire.heartbeat(self._namespace, "*"), self._on_heartbeat)
        bus.watch(self._on_connection)

    def refresh(self) -> None:
        """Give everybody a full time to live from now."""
        self._fresh_at = self._clock()
        self._unread.clear()

    def _on_connection(self, connected: bool) -> None:  # noqa: FBT001 - the bus calls it
        self._connected = connected
        self.refresh()

    def _on_heartbeat(self, subject: str, data: bytes, _reply: str, _headers: object) -> None:
        worker = subject.rpartition(".")[2]
        try:
            beat = _decode(data)
        except msgspec.MsgspecError as error:
            _log.warning("a heartbeat could not be read", worker=worker[:64], error=str(error))
            return
        self._heard[worker, beat.incarnation] = self._clock()
        self._read[worker, beat.incarnation] = beat.read

    def silences(self, state: Namespace) -> list[Silence]:
        """The workers that have been silent for too long."""
        now = self._clock()
        if not self._connected:
            return []
        found = []
        for worker in state.workers.values():
            key = (worker.name, worker.incarnation)
            heard = self._heard.setdefault(key, now)
            if now - max(heard, self._fresh_at) > self._ttl_s:
                reason = f"no heartbeat for {self._ttl_s:g} s"
                found.append(Silence(worker.name, worker.incarnation, reason))
            elif self._is_deaf(key, worker.assigned_seq, now):
                reason = f"it has not read its assignments for {self._ttl_s:g} s"
                found.append(Silence(worker.name, worker.incarnation, reason))
        if len(self._heard) > 2 * len(state.workers) + 64:
            self._forget({(worker.name, worker.incarnation) for worker in state.workers.values()})
        return found

    def _is_deaf(self, key: tuple[str, int], assigned_seq: int, now: float) -> bool:
        """Whether it says that it lives, but not that it has read what it was told a while ago."""
        read = self._read.get(key, assigned_seq)
        unread = self._unread.get(key)
        if unread is not None and read < unread[0]:
            return now - unread[1] > self._ttl_s
        if read < assigned_seq:
            self._unread[key] = (assigned_seq, now)
        elif unread is not None:
            del self._unread[key]
        return False

    def _forget(self, known: AbstractSet[tuple[str, int]]) -> None:
        self._heard = {key: heard for key, heard in self._heard.items() if key in known}
        self._read = {key: read for key, read in self._read.items() if key in known}
        self._unread = {key: unread for key, unread in self._unread.items() if key in known}
