"""Which workers live: their heartbeats, counted by the leader's own monotonic clock.

Silence counts only over time in which the leader itself was connected: after an election
or a gap everybody has a fresh, full time to live.

A worker whose process lives while its event loop stands still, for a task that keeps the
interpreter to itself, cannot beat. Its keeper then beats for it and says that it is *stalled*:
a sign of life that proves no reading, good for a bounded time only.
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
from agentflow.errors import AgentFlowError
from agentflow.frames import encode
from agentflow.logs import get_logger

STALL_S_MAX: Final = 60.0
"""How long a worker may be stalled before it is given up all the same."""
SIGNS_SERVICE: Final = "workers"
"""The service that tells the workers' last signs of life."""
_SIGNS_MAX: Final = 2_000
"""Workers told of in one answer."""
_ROOM_MIN: Final = 1_000
_KEPT_TTLS: Final = 10
"""Times to live for which a silent worker is remembered: far longer than a leader takes to give it up."""

_log = get_logger(__name__)


class Heartbeat(Struct, frozen=True):
    """A worker's sign of life."""

    incarnation: int
    read: int
    """Sequence of the last assignment it has read: connected but deaf is lost."""
    running: int = 0
    queued: int = 0
    stalled: bool = False
    """Said by its keeper: the process lives, its event loop stands still."""


class Sign(Struct, frozen=True):
    """What a master last heard of a worker."""

    worker: str
    incarnation: int
    age_ms: int
    """Since the last sign of life."""
    running: int
    queued: int
    stalled: bool


class Signs(Struct, frozen=True):
    """The answer of the `workers` service; any master that listens gives it."""

    signs: list[Sign]


class _Heard(Struct):
    """The last sign of life of one incarnation."""

    at: float
    awake: float
    """When it was last heard without being stalled."""
    beat: Heartbeat | None = None
    """None: it was only looked for so far."""


_Key = tuple[str, int]
"""Name and incarnation."""

_decode: Final = msgspec.json.Decoder(Heartbeat).decode
decode_signs: Final = msgspec.json.Decoder(Signs).decode


class Liveness:
    """Listens to heartbeats and tells who has been silent for `ttl_s`, or stalled for `stall_s_max`."""

    def __init__(
        self,
        namespace: str,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        stall_s_max: float = STALL_S_MAX,
    ) -> None:
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._stall_s_max = stall_s_max
        self._clock = clock
        self._heard: dict[_Key, _Heard] = {}
        self._room = _ROOM_MIN
        """So many may be known before the silent ones are forgotten."""
        # Assignments that were not read when we looked: their sequence, and since when.
        self._unread: dict[_Key, tuple[int, float]] = {}
        self._fresh_at = clock()
        self._connected = True
        self._ends: list[Callable[[], object]] = []

    async def listen(self, bus: Bus) -> None:
        """Subscribe; heartbeats count from now on, and who asks is told of them."""
        beats = await bus.subscribe(wire.heartbeat(self._namespace, "*"), self._on_heartbeat)

        def answer(_subject: str, _data: bytes, reply: str, _headers: object) -> None:
            if reply:
                self._answer(bus, reply)

        asked = await bus.subscribe(wire.service(self._namespace, SIGNS_SERVICE), answer, "masters")
        self._ends += [beats.end, asked.end, bus.watch(self._on_connection)]

    def close(self) -> None:
        """Listen no more."""
        for end in self._ends:
            end()

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
        except (msgspec.MsgspecError, RecursionError) as error:
            _log.warning("a heartbeat could not be read", worker=worker[:64], error=str(error))
            return
        now = self._clock()
        if len(self._heard) >= self._room:
            self._forget_the_silent(now)
        heard = self._heard.setdefault((worker, beat.incarnation), _Heard(now, now))
        if not beat.stalled:
            heard.awake = now
        elif now - max(heard.awake, self._fresh_at) > self._stall_s_max:
            return  # whoever is stalled for so long is not coming back
        heard.at = now
        heard.beat = beat

    def silences(self, state: Namespace) -> list[Silence]:
        """The workers that have been silent, deaf or stalled for too long."""
        now = self._clock()
        if not self._connected:
            return []
        found = []
        for worker in state.workers.values():
            key = (worker.name, worker.incarnation)
            heard = self._heard.setdefault(key, _Heard(now, now))
            if now - max(heard.at, self._fresh_at) > self._ttl_s:
                found.append(Silence(worker.name, worker.incarnation, self._why_silent(heard)))
            elif self._is_deaf(key, heard, worker.assigned_seq, now):
                reason = f"it has not read its assignments for {self._ttl_s:g} s"
                found.append(Silence(worker.name, worker.incarnation, reason))
        if len(self._heard) > 2 * len(state.workers) + 64:
            self._forget({(worker.name, worker.incarnation) for worker in state.workers.values()})
        return found

    def _why_silent(self, heard: _Heard) -> str:
        if heard.beat is not None and heard.beat.stalled:
            return f"its event loop stood still, and then no heartbeat for {self._ttl_s:g} s"
        return f"no heartbeat for {self._ttl_s:g} s"

    def _is_deaf(self, key: _Key, heard: _Heard, assigned_seq: int, now: float) -> bool:
        """Whether it says that it lives, but not that it has read what it was told a while ago."""
        beat = heard.beat
        if beat is not None and beat.stalled:
            self._unread.pop(key, None)  # it cannot read; once it can, it has its full time for it
            return False
        read = assigned_seq if beat is None else beat.read
        unread = self._unread.get(key)
        if unread is not None and read < unread[0]:
            return now - unread[1] > self._ttl_s
        if read < assigned_seq:
            self._unread[key] = (assigned_seq, now)
        elif unread is not None:
            del self._unread[key]
        return False

    def _forget_the_silent(self, now: float) -> None:
        """Who only stands by is not told by a leader's look at the workers who is gone."""
        kept_s = _KEPT_TTLS * max(self._ttl_s, self._stall_s_max)
        self._forget({key for key, heard in self._heard.items() if now - heard.at <= kept_s})
        self._room = max(_ROOM_MIN, 2 * len(self._heard))

    def _answer(self, bus: Bus, reply: str) -> None:
        now = self._clock()
        signs = [
            Sign(name, incarnation, int((now - heard.at) * 1000), beat.running, beat.queued, beat.stalled)
            for (name, incarnation), heard in self._heard.items()
            if (beat := heard.beat) is not None
        ]
        try:
            bus.publish(reply, encode(Signs(signs[-_SIGNS_MAX:])))
        except AgentFlowError as error:
            _log.debug("an answer was lost", error=str(error))

    def _forget(self, known: AbstractSet[_Key]) -> None:
        self._heard = {key: heard for key, heard in self._heard.items() if key in known}
        self._unread = {key: unread for key, unread in self._unread.items() if key in known}
