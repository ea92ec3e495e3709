"""The log port: an append-only, totally ordered, durable sequence of messages.

Two adapters implement it, `jetstream.JetStreamLog` and `memory.MemoryLog`; one
conformance suite (tests/integration/log_conformance.py) is run against both.

An append ends in one of three ways and never raises for what the server or the network
did, except LogGone when the log is no longer the one that was opened: `Done` (stored and fsynced, with its position), `Refused` (certainly not stored, with
the reason) or `Unknown` (sent, never acknowledged). An unknown write is repeated byte for
byte under the same message id, or looked up with `find`.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from msgspec import Struct

from agentflow.events import ObjectRef

BATCH_FRAMES_MAX: Final = 900
"""Most frames of one atomic append (the server's own limit is 1,000)."""


class Frame(Struct, frozen=True, gc=False):
    """One message to append."""

    subject: str
    data: bytes
    msg_id: str | None = None
    """Identity for deduplication; None for a write that must not be repeated."""
    headers: dict[str, str] | None = None
    """Headers beside those that the log itself writes."""


class Fence(Struct, frozen=True, gc=False):
    """Store only if the last message on `subject` has sequence `seq` (0: there is none)."""

    subject: str
    seq: int


class Message(Struct, frozen=True, gc=False):
    """One message read."""

    seq: int
    time_ns: int
    """Server time of storing, nanoseconds since 1970 UTC."""
    subject: str
    data: bytes
    headers: dict[str, str] | None = None


class KeptMessages(Struct, frozen=True):
    """Messages of the part that was trimmed that open work still needs, in the object store."""

    first_seq: int
    last_seq: int
    messages: ObjectRef
    """A list of `Message`, as MessagePack."""


class Trim(Struct, frozen=True):
    """What was written down before the beginning of the log was removed.

    It is part of the stream's own description, so that whoever learns where the log begins
    learns in the same answer whether that is as it should be.
    """

    seq: int
    """Everything up to this sequence is in an archive, and may be removed; 0: nothing yet."""
    snapshot_seq: int
    """Position of the newest snapshot of the fold, `seq` or later."""
    snapshot: ObjectRef
    """Where the snapshot is, in the namespace's object store."""
    digest: str
    """The snapshot's hash, as `agentflow.domain.snapshot.hash_of` says it."""
    chain: str
    """The hash chain over all messages up to the snapshot's position, in hex."""
    level: int
    """The contract level in force at the snapshot's position."""
    kept: tuple[KeptMessages, ...] = ()
    """In order: large arguments and results are read where they lie in the log, however old they are."""


class Identity(Struct, frozen=True):
    """What makes a log this log and no other."""

    name: str
    created_ns: int
    first_seq: int
    """Sequence of the first message from which on nothing is missing; last_seq + 1 if there is none."""
    last_seq: int
    replicas: int
    bytes: int
    bytes_max: int
    """Hard limit, or -1."""
    trim: Trim | None = None
    """Up to where the log was trimmed, if it ever was."""

    @property
    def trimmed_seq(self) -> int:
        """Everything up to this sequence may have been trimmed away, with our knowledge."""
        return 0 if self.trim is None else self.trim.seq


class Reason(enum.StrEnum):
    """Why an append was refused."""

    FENCED = "fenced"
    """The fence (or compare-and-set) does not hold: somebody wrote there."""
    BUSY = "busy"
    """Another fenced write to the same subject is in flight, or too many batches: try again."""
    FULL = "full"
    """The log is at its hard limit or the disk is full."""
    TOO_LARGE = "too_large"
    DENIED = "denied"
    """The connection may not publish there."""
    FOREIGN_ID = "foreign_id"
    """The message id is taken by a message that is not ours: nothing was stored."""
    GONE = "gone"
    """The stream does not exist."""
    OTHER = "other"


class Done(Struct, frozen=True, gc=False):
    """Stored and fsynced. Frame i of n has sequence `seq - n + 1 + i`, unless `duplicate`."""

    seq: int
    duplicate: bool = False
    """The log held it already: an earlier attempt of this same write had arrived."""


class Refused(Struct, frozen=True, gc=False):
    """Certainly not stored."""

    reason: Reason
    code: int
    detail: str


class Unknown(Struct, frozen=True, gc=False):
    """Sent and not acknowledged in time: it may be stored, or be stored later."""

    detail: str


Appended = Done | Refused | Unknown


class Log(Protocol):
    """One namespace's log. An async context manager: entered means open and checked.

    Entering raises `StreamMismatch` if the stream exists with another configuration
    (naming each difference) or cannot have the replicas asked for, `Disconnected` if no server answers in time.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def namespace(self) -> str:
        """The namespace this log belongs to."""
        ...

    async def identity(self) -> Identity:
        """The stream's identity and extent now.

        Raises LogGone if it is no longer the log that was opened, or ends before what is known
        to be stored; Disconnected if nobody can say.
        """
        ...

    async def append(
        self,
        frame: Frame,
        *,
        fence: Fence | None = None,
        timeout_s: float = 5.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store one frame.

        With a message id the write is repeated within `timeout_s` until its fate is known;
        without one it is sent once.

        Who repeats a write whose earlier call ended `Unknown` says so with `in_doubt_after`:
        the sequence after which that call can have stored it (the last one known before it, or
        0). The log is then searched before a refusal is believed.

        Raises LogGone if the log turns out to be another one than was opened.
        """
        ...

    async def append_batch(
        self,
        frames: Sequence[Frame],
        *,
        fence: Fence | None = None,
        timeout_s: float = 10.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store all frames next to each other, or none of them; otherwise like `append`."""
        ...

    async def find(self, msg_id: str, *, after: int) -> int | None:
        """Sequence of the message stored under `msg_id` after sequence `after`, or None.

        Reads the log; for learning the fate of an unknown write once the server's own
        deduplication window has passed.
        """
        ...

    async def read(self, seq: int) -> Message | None:
        """The message at `seq`, or None if it is not there."""
        ...

    async def last(self, subject: str) -> Message | None:
        """The last message on an exact subject, read from the stream's leader."""
        ...

    def follow(self, after: int, *, subjects: Sequence[str] = ()) -> AsyncIterator[list[Message]]:
        """Everything after sequence `after`, in order, without gaps, for ever.

        Yields whatever has arrived since the last yield, never an empty list. Survives
        lost connections and server restarts. `subjects` filters (subject patterns; none:
        all). Raises LogGone if the log was recreated, went backwards, or no longer holds
        `after + 1` while it holds later messages (unfiltered reading only); LogTrimmed if that
        is because it was trimmed. Who has read what is trimmed does not notice.
        """
        ...


class TrimmableLog(Log, Protocol):
    """A log whose beginning can be removed; only an archiver does that."""

    async def trim(self, to: Trim) -> int:
        """Write down where the log begins from now on, and remove what lies before; how many messages were.

        The last election and the generations of the bucket of locks stay. May be repeated.
        Raises InvalidRequest if it was trimmed further, or has no snapshot for what is removed.
        """
        ...
