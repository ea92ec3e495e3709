"""The lease port: who should try, not who may.

A lease is a key that disappears unless its holder writes it again. It keeps two masters, or
two holders of a lock, from working against each other; what keeps a late one from doing harm
is a fence: the log's, or the token that a lock's holder hands on.

- Every write is a compare-and-set, and nothing is decided on a read: a lease is acquired,
  renewed, released and taken from a silent holder (`evict`) by a write that succeeded.
- The holder's deadline counts from *before* the send, on the monotonic clock, and ends a
  margin early; whoever wants to take a lease counts a full time to live from *after* the
  last renewal reached him. So the holder has always given up first.
- A write without an answer is settled by reading the key back: each holder writes under a
  nonce that nobody can guess.

Two adapters implement it, `jetstream.JetStreamLeases` and `memory.MemoryLeases`; one
conformance suite (tests/integration/leases_conformance.py) is run against both.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from msgspec import Struct

MARGIN_SHARE: Final = 0.1
"""Part of the time to live by which a holder gives up early: clocks of servers differ, loops stall."""


class Lease(Struct, frozen=True):
    """A lease as its holder knows it."""

    key: str
    value: bytes
    ttl_s: int
    nonce: str
    epoch: int
    """Revision at which it was acquired: later holders have a higher one. The fencing token."""
    revision: int
    """Of its last write."""
    deadline: float
    """On the monotonic clock: from then on the holder must act as if it had lost it."""

    def left_s(self, now: float | None = None) -> float:
        """Seconds until the deadline, at `now` of the monotonic clock."""
        return self.deadline - (time.monotonic() if now is None else now)


class Entry(Struct, frozen=True):
    """A lease as others see it."""

    key: str
    value: bytes
    ttl_s: int
    epoch: int
    revision: int
    seen: float
    """On our monotonic clock: when this revision reached us. Its holder wrote it before that."""
    written_ms: int = 0
    """Server time of its last write, ms since 1970 UTC. For showing it to people: nothing is decided on it."""

    def is_silent(self, now: float) -> bool:
        """Whether its holder must have given up by now, if it has written nothing since."""
        return now - self.seen >= self.ttl_s


class Removed(Struct, frozen=True):
    """A lease that was released or taken away."""

    key: str
    revision: int
    expired: bool = False
    """The server let go of it: its holder fell silent, and nobody has taken it away by a write."""


Change = Entry | Removed


class Snapshot(Struct, frozen=True):
    """All leases under a pattern, as of one revision of the bucket."""

    revision: int
    """From here on `watch` tells what changes."""
    entries: Sequence[Entry]
    """In the order in which they were acquired."""


class Leases(Protocol):
    """A bucket of leases. An async context manager: entered means the bucket is there.

    Keys are one or more tokens of A-Z a-z 0-9 _ - = joined by dots. Patterns are keys in which
    `*` stands for one token and a last `>` for one or more.

    All methods raise `Disconnected` if the outcome is not known.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def acquire(self, key: str, value: bytes, ttl_s: int, *, nonce: str | None = None) -> Lease | None:
        """Take the lease, or None if somebody holds it. Raises LogGone if the bucket was deleted.

        Who repeats an acquisition that ended in `Disconnected` gives the same nonce each time
        (unguessable, by `secrets`): what an earlier attempt wrote then counts as his.
        """
        ...

    async def renew(self, lease: Lease, value: bytes | None = None) -> Lease | None:
        """Hold on for another `ttl_s`, with another value if given, or None if it is lost.

        After `Disconnected` the lease counts until its old deadline, and may be renewed again.
        """
        ...

    async def release(self, lease: Lease) -> None:
        """Give it back, if it is still ours. `Disconnected` if nothing could be sent."""
        ...

    async def evict(self, entry: Entry) -> bool:
        """Take a silent holder's lease away; True if it is gone for certain and its holder's next renewal fails.

        The decision is a write, also if the key has expired already. False if the holder wrote
        in the meantime; True if somebody has acquired it since, which that holder keeps. To be
        called only once `entry.is_silent`. Raises LogGone if the bucket was deleted.
        """
        ...

    async def read(self, key: str) -> Entry | None:
        """The lease now, or None. For showing it to people, and for knowing whom to wait for."""
        ...

    async def entries(self, pattern: str) -> Snapshot:
        """All leases under a pattern, no older than any write acknowledged before the call.

        What was written after the snapshot's revision may be in it already; watching from that
        revision on leaves nothing out. Raises LogGone if the bucket was deleted.
        """
        ...

    def watch(self, pattern: str, after: int) -> AsyncIterator[list[Change]]:
        """What changes under a pattern after revision `after`, in order, for ever.

        Survives lost connections. Of several writes to a key only the last may be told; a
        removal older than some seconds may be left out, like an expiry. An expiry is told as `Removed` where the server leaves a
        marker, and not at all elsewhere: who waits for one needs a timer of its own.
        Raises LogGone if the bucket was deleted or created again.
        """
        ...
