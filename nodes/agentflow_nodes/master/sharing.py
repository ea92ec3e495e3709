"""Who should lead which namespace: a pure function of what the masters say of themselves.

Every master comes to the same answer from the same sessions. Where views differ for a
moment, two try; the log lets one of them be elected.

- Who leads, or is about to, goes on.
- A namespace nobody leads goes to the master its last leader named, or else to the one that
  leads least.
- Whoever leads at least two more than somebody else hands one over to him, one at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from zlib import crc32

from msgspec import Struct


class Standing(enum.StrEnum):
    """What a master is in a namespace."""

    CATCHING_UP = "catching_up"
    """It has not folded what the log held when it started."""
    FOLLOWER = "follower"
    """It follows the log, ready to be elected."""
    CANDIDATE = "candidate"
    """It tries to be elected."""
    LEADER = "leader"
    OUTDATED = "outdated"
    """It follows, but the contract level in force is above what it knows."""


class SeatReport(Struct, frozen=True, omit_defaults=True):
    """A master's place in one namespace."""

    standing: Standing
    epoch: int = 0
    """Of the leader it knows."""
    seq: int = 0
    """Up to which it has folded."""
    successor: str = ""
    """To whom it hands the namespace over."""


class Session(Struct, frozen=True, omit_defaults=True):
    """What a master says of itself in its session lease."""

    name: str
    instance: str
    level: int = 1
    host: str = ""
    pid: int = 0
    started_ms: int = 0
    seats: dict[str, SeatReport] = {}

    @property
    def led(self) -> list[str]:
        """The namespaces it leads or is about to."""
        return sorted(name for name, seat in self.seats.items() if seat.standing in _LEADING)

    def stands(self, namespace: str, standing: Standing) -> bool:
        """Whether it is that in the namespace."""
        seat = self.seats.get(namespace)
        return seat is not None and seat.standing is standing


_LEADING = frozenset({Standing.LEADER, Standing.CANDIDATE})


def leader_of(namespace: str, sessions: Sequence[Session]) -> str | None:
    """Who says that it leads the namespace or is about to; None if nobody does."""
    claims = [
        (session.seats[namespace].epoch, session.name) for session in sessions if namespace in session.led
    ]
    return max(claims)[1] if claims else None


def ranking(namespace: str, sessions: Sequence[Session]) -> list[str]:
    """The masters that could take over a namespace nobody leads, the one that should first."""
    loads = {session.name: len(session.led) for session in sessions}
    _assign_others(namespace, sessions, loads)
    able = _able(namespace, sessions)
    named = {session.seats[namespace].successor for session in sessions if namespace in session.seats}
    return sorted(able, key=lambda name: (name not in named, _rank(namespace, name, loads)))


def _assign_others(namespace: str, sessions: Sequence[Session], loads: dict[str, int]) -> None:
    """Count the namespaces without a leader that come before this one for those that will get them."""
    served = {name for session in sessions for name in session.seats}
    for other in sorted(served):
        if other >= namespace:
            return
        able = _able(other, sessions)
        if able and leader_of(other, sessions) is None:
            loads[min(able, key=lambda name: _rank(other, name, loads))] += 1


def _able(namespace: str, sessions: Sequence[Session]) -> list[str]:
    return [session.name for session in sessions if session.stands(namespace, Standing.FOLLOWER)]


def _rank(namespace: str, name: str, loads: Mapping[str, int]) -> tuple[int, int]:
    return loads[name], crc32(f"{namespace} {name}".encode())


def handover(name: str, sessions: Sequence[Session]) -> tuple[str, str] | None:
    """The namespace that a master should give away now, and to whom; None if none."""
    loads = {session.name: len(session.led) for session in sessions}
    if name not in loads or name != max(loads, key=lambda each: (loads[each], each)):
        return None
    own = next(session for session in sessions if session.name == name)
    for namespace in own.led:
        able = [each for each in _able(namespace, sessions) if loads[each] + 2 <= loads[name]]
        if able and own.stands(namespace, Standing.LEADER):
            return namespace, min(able, key=lambda each: _rank(namespace, each, loads))
    return None
