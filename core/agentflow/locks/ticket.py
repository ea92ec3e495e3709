"""Tickets, and who has to go before whom: no IO."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import Struct

from agentflow.errors import InvalidRequest
from agentflow.leases.port import Change, Entry, Removed, Snapshot


class Mode(enum.StrEnum):
    """Whom a holder tolerates beside him."""

    EXCLUSIVE = "exclusive"
    """Nobody."""
    SHARED = "shared"
    """Other shared holders."""
    SEMAPHORE = "semaphore"
    """As many as there are permits, himself included."""


class Ticket(Struct, frozen=True, omit_defaults=True):
    """What a contender writes under his key."""

    name: str
    """Of the lock."""
    holder: str
    client: str = ""
    mode: Mode = Mode.EXCLUSIVE
    permits: int = 1
    since_ms: int = 0
    """When he came, by his clock, ms since 1970 UTC."""
    held_ms: int = 0
    """When he found that the lock is his; 0 before, and until his next renewal."""
    metadata: dict[str, str] = {}

    def encoded(self) -> bytes:
        """As it is written."""
        return msgspec.json.encode(self)

    def agrees_with(self, other: Ticket) -> bool:
        """Whether the two can stand in one line."""
        one, two = self.mode is Mode.SEMAPHORE, other.mode is Mode.SEMAPHORE
        return one == two and (not one or self.permits == other.permits)

    def in_words(self) -> str:
        """For people: what is asked of the lock."""
        if self.mode is Mode.SEMAPHORE:
            return f"a semaphore with {self.permits} permit{'s' if self.permits != 1 else ''}"
        return f"{self.mode} access"


_decode: Final = msgspec.json.Decoder(Ticket).decode


def read_ticket(value: bytes) -> Ticket:
    """A ticket as written; what is none blocks everybody until it falls silent."""
    try:
        return _decode(value)
    except (msgspec.DecodeError, RecursionError):
        return Ticket(name="", holder="")


class Place(Struct, frozen=True):
    """A ticket in the line."""

    entry: Entry
    ticket: Ticket

    @property
    def token(self) -> int:
        """His place in line: lower is earlier."""
        return self.entry.epoch


class Line:
    """The tickets of one lock, as one contender knows them."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}

    def learn(self, snapshot: Snapshot) -> None:
        """Take over what was read anew.

        A ticket that is missing there is kept: it may only have expired, which is no
        removal. A revision that is known keeps the time at which it was first seen.
        """
        for entry in snapshot.entries:
            self.apply(entry)

    def apply(self, change: Change) -> None:
        """Take over one change."""
        known = self._places.get(change.key)
        if isinstance(change, Removed):
            # One that is told again may be older than a ticket that its owner brought anew.
            if not change.expired and known is not None and known.entry.revision < change.revision:
                del self._places[change.key]
        elif known is None or known.entry.revision < change.revision:
            self._places[change.key] = Place(change, read_ticket(change.value))

    def learn_from(self, other: Line) -> None:
        """Take over what is known there, and when it was seen."""
        for place in other._places.values():
            self.apply(place.entry)

    def remove(self, key: str) -> None:
        """Forget a ticket that was taken away."""
        self._places.pop(key, None)

    def place(self, key: str) -> Place | None:
        """The place of a key."""
        return self._places.get(key)

    def places(self) -> list[Place]:
        """All, in order."""
        return sorted(self._places.values(), key=_token)

    def before(self, key: str) -> list[Place]:
        """Who has to be gone before the owner of `key` holds the lock; nobody: he does.

        Of a semaphore's tickets all before his, if they leave no permit, or if one of them uses
        the lock differently: who does so may not have found out yet.
        """
        mine = self._places[key]
        token = mine.entry.epoch
        earlier = [place for place in self._places.values() if place.entry.epoch < token]
        earlier.sort(key=_token)
        if mine.ticket.mode is Mode.SEMAPHORE:
            is_full = len(earlier) >= mine.ticket.permits
            return earlier if is_full or not _agree(earlier, mine.ticket) else []
        if mine.ticket.mode is Mode.SHARED:
            return [place for place in earlier if place.ticket.mode is not Mode.SHARED]
        return earlier

    def require_agreement(self, key: str) -> None:
        """Raise InvalidRequest if the first in line asks for another kind of lock under that name.

        Who disagrees with the first is about to leave, and nobody's measure.
        """
        mine, first = self._places[key].ticket, self.places()[0].ticket
        if first.name and not first.agrees_with(mine):
            raise InvalidRequest(
                f"lock {mine.name!r}: {mine.in_words()} was asked for, but "
                f"{first.holder} uses it as {first.in_words()}"
            )


def _agree(places: Iterable[Place], ticket: Ticket) -> bool:
    return all(place.ticket.agrees_with(ticket) for place in places)


def _token(place: Place) -> int:
    return place.entry.epoch


def in_lines(entries: Iterable[Entry]) -> dict[str, Line]:
    """The lines of several locks, by the lock's name."""
    lines: dict[str, Line] = {}
    for entry in entries:
        name = read_ticket(entry.value).name
        if name:
            lines.setdefault(name, Line()).apply(entry)
    return lines
