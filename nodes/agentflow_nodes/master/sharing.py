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

from agentflow.domain.digest import Difference


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
    differs: Difference | None = None
    """A fold of the same log that came to something else than its own."""


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


def leader_of(namespace: str, sessions: Sequence[Session], elected: str = "", epoch: int = 0) -> str | None:
    """Who leads the namespace or is about to; None if nobody does.

    That is who says so, or else whom the log says was `elected` with `epoch`, as long as his
    session is older than that.
    """
    claims = [
        (session.seats[namespace].epoch, session.name) for session in sessions if namespace in session.led
    ]
    if claims:
        return max(claims)[1]
    known = next((session.seats.get(namespace) for session in sessions if session.name == elected), None)
    return elected if known is not None and known.epoch < epoch else None


def ranking(namespace: str, sessions: Sequence[Session]) -> list[str]:
    """The masters that could take over a namespace nobody leads, the one that should first."""
    served = {name for session in sessions for name in session.seats}
    loads = _loads(sessions, sorted(name for name in served if name < namespace))
    return _ranked(namespace, sessions, loads)


def is_named(name: str, namespace: str, sessions: Sequence[Session]) -> bool:
    """Whether somebody hands the namespace over to this master."""
    seats = [session.seats.get(namespace) for session in sessions]
    return any(seat.successor == name for seat in seats if seat is not None)


def handover(name: str, sessions: Sequence[Session]) -> tuple[str, str] | None:
    """The namespace that a master should give away now, and to whom; None if none.

    Of all that could give one away the one that leads most does, so that two do not at once.
    """
    loads = _loads(sessions, sorted({name for session in sessions for name in session.seats}))
    for session in sorted(sessions, key=lambda each: (-loads[each.name], each.name)):
        move = _move(session, sessions, loads)
        if move is not None:
            return move if session.name == name else None
    return None


def _loads(sessions: Sequence[Session], namespaces: Sequence[str]) -> dict[str, int]:
    """How many each leads, with those of these namespaces that he will get because nobody leads them."""
    loads = {session.name: len(session.led) for session in sessions}
    for namespace in namespaces:
        if leader_of(namespace, sessions) is None:
            for taker in _ranked(namespace, sessions, loads)[:1]:
                loads[taker] += 1
    return loads


def _ranked(namespace: str, sessions: Sequence[Session], loads: Mapping[str, int]) -> list[str]:
    able = _able(namespace, sessions)
    return sorted(
        able, key=lambda name: (not is_named(name, namespace, sessions), _rank(namespace, name, loads))
    )


def _move(session: Session, sessions: Sequence[Session], loads: Mapping[str, int]) -> tuple[str, str] | None:
    """What this master could give away to one that leads at least two fewer."""
    for namespace in session.led:
        able = [name for name in _able(namespace, sessions) if loads[name] + 2 <= loads[session.name]]
        if able and session.stands(namespace, Standing.LEADER):
            return namespace, min(able, key=lambda name: _rank(namespace, name, loads))
    return None


def _able(namespace: str, sessions: Sequence[Session]) -> list[str]:
    return [session.name for session in sessions if session.stands(namespace, Standing.FOLLOWER)]


def _rank(namespace: str, name: str, loads: Mapping[str, int]) -> tuple[int, int]:
    return loads[name], crc32(f"{namespace} {name}".encode())
