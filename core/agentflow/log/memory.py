"""The log in memory: the same promises, no server, no disk, no clock.

Several `MemoryLog`s on one `MemoryServer` see the same log, as several processes do. Time
moves only when told (`MemoryServer.advance`) or with a clock that is handed over, and every
fault is ordered in advance (`MemoryServer.inject`), so a run repeats exactly. It behaves like
one replica: a fence is checked before duplicates are.

Nodes that are to be apart from the server, by latency or a partition, are put there by who
simulates the network: what reaches the server is stored by `MemoryLog.arrive`.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import lru_cache
from itertools import islice
from types import TracebackType
from typing import Final, Self

from agentflow import wire
from agentflow.errors import LogGone
from agentflow.log.port import (
    Appended,
    Done,
    Fence,
    Frame,
    Identity,
    Message,
    Reason,
    Refused,
    Trim,
    Unknown,
)
from agentflow.log.stored import DUPLICATE_WINDOW_S, headers_of, is_stored_as, msg_id_of, oversize
from agentflow.log.stream import trimmed_off
from agentflow.log.trim import check_trim

_DUPLICATE_WINDOW_NS: Final = DUPLICATE_WINDOW_S * 1_000_000_000
_EPOCH_NS: Final = 1_700_000_000_000_000_000
_TICK_NS: Final = 1_000


class Fault(enum.Enum):
    """What happens to one append."""

    ACK_LOST = "ack_lost"
    """Stored; the answer is lost, and the write repeated if it has a message id."""
    STORED_UNKNOWN = "stored_unknown"
    """Stored, and the writer never learns."""
    LOST_UNKNOWN = "lost_unknown"
    """Not stored, and the writer never learns."""


class MemoryServer:
    """What a nats-server is for `JetStreamLog`s: the place where the logs are."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._ahead_ns = _EPOCH_NS
        """What the time is ahead of the clock."""
        self.streams: Final[dict[str, MemoryStream]] = {}
        self._faults: deque[Fault | Refused] = deque()
        self._open = asyncio.Event()
        self._open.set()

    @property
    def now_ns(self) -> int:
        """The server's time, nanoseconds since 1970 UTC."""
        return self._ahead_ns + int(self._clock() * 1e9)

    def advance(self, seconds: float) -> None:
        """Let time pass; with less than 0 s the server's clock is set back."""
        self._ahead_ns += int(seconds * 1e9)

    def inject(self, *faults: Fault | Refused) -> None:
        """The next appends, one each, end like this; a `Refused` is answered as it is."""
        self._faults.extend(faults)

    def hold(self) -> None:
        """Let appends wait until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Let appends go on."""
        self._open.set()

    def create(self, namespace: str, *, bytes_max: int = -1) -> MemoryStream:
        """Create a namespace's log, or find it."""
        if namespace not in self.streams:
            self.streams[namespace] = MemoryStream(wire.stream(namespace), self.tick(), bytes_max)
        return self.streams[namespace]

    def delete(self, namespace: str) -> None:
        """Delete a namespace's log; its readers are told."""
        self.streams.pop(namespace).wake()

    def tick(self) -> int:
        """The time now; no two calls get the same, unless the clock was set back."""
        self._ahead_ns += _TICK_NS
        return self.now_ns

    async def admit(self) -> Fault | Refused | None:
        """Let an append in, and tell its fault."""
        await asyncio.sleep(0)
        await self._open.wait()
        return self._faults.popleft() if self._faults else None


class MemoryStream:
    """One stream's messages."""

    def __init__(self, name: str, created_ns: int, bytes_max: int) -> None:
        self.name: Final = name
        self.created_ns: Final = created_ns
        self.bytes_max: Final = bytes_max
        self.messages: deque[Message] = deque()
        self.last_seq = 0
        self.bytes = 0
        self._seq_by_id: dict[str, int] = {}
        self._last_by_subject: dict[str, int] = {}
        self.trim: Trim | None = None
        self._kept: dict[int, Message] = {}
        """What stays of the part that was trimmed away."""
        # With the subjects they wait for. In the order in which they came: a set has another one in every process.
        self._readers: dict[asyncio.Event, tuple[str, ...]] = {}

    @property
    def first_seq(self) -> int:
        """Sequence of the first message held, last_seq + 1 if there is none."""
        return self.last_seq + 1 - len(self.messages)

    def message(self, seq: int) -> Message | None:
        """The message at `seq`."""
        at = seq - self.first_seq
        return self.messages[at] if 0 <= at < len(self.messages) else self._kept.get(seq)

    def after(self, seq: int) -> list[Message]:
        """The messages after sequence `seq`."""
        count = min(self.last_seq - seq, len(self.messages))
        latest = list(islice(reversed(self.messages), count))
        latest.reverse()
        return [message for at, message in self._kept.items() if at > seq] + latest

    def last(self, subject: str) -> Message | None:
        """The last message on `subject`."""
        return self.message(self._last_by_subject.get(subject, 0))

    def find(self, msg_id: str, after: int) -> int | None:
        """Sequence of the message stored under the message id after sequence `after`."""
        return next((each.seq for each in self.after(after) if msg_id_of(each) == msg_id), None)

    def known(self, msg_id: str, now_ns: int) -> int | None:
        """Sequence stored under the message id within the window for duplicates."""
        message = self.message(self._seq_by_id.get(msg_id, 0))
        return (
            message.seq if message is not None and now_ns - message.time_ns <= _DUPLICATE_WINDOW_NS else None
        )

    def holds(self, fence: Fence) -> bool:
        """Whether the fence holds."""
        last = self.last(fence.subject)
        return fence.seq == (0 if last is None else last.seq)

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more fit."""
        return self.bytes_max < 0 or self.bytes + size <= self.bytes_max

    def store(self, frame: Frame, fence: Fence | None, time_ns: int) -> int:
        """Store one message."""
        self.last_seq += 1
        message = Message(self.last_seq, time_ns, frame.subject, frame.data, headers_of(frame, fence) or None)
        self.messages.append(message)
        self.bytes += len(frame.data)
        self._last_by_subject[frame.subject] = self.last_seq
        if frame.msg_id is not None:
            self._seq_by_id[frame.msg_id] = self.last_seq
        for reader, patterns in self._readers.items():
            if not patterns or matches_any(patterns, frame.subject):
                reader.set()
        return self.last_seq

    def purge(self, before: int) -> None:
        """Remove all messages before sequence `before`."""
        self._kept = {seq: message for seq, message in self._kept.items() if seq >= before}
        while self.messages and self.messages[0].seq < before:
            self.bytes -= len(self.messages.popleft().data)

    def cut(self, to: Trim, namespace: str) -> int:
        """Remove what was archived, but the last election and the generations of the bucket of locks."""
        check_trim(self.trim, to)
        last_election = self._last_by_subject.get(wire.elected(namespace), 0)
        opened = wire.locks_opened(namespace)
        gone = [message for message in self.after(0) if message.seq <= to.seq]
        stays = [each for each in gone if each.seq == last_election or each.subject == opened]
        self.purge(to.seq + 1)
        self._kept = {message.seq: message for message in stays}
        self.trim = to
        self.wake()
        return len(gone) - len(stays)

    def truncate(self, last_seq: int) -> None:
        """Lose all messages after `last_seq`, as a damaged disk does."""
        while self.messages and self.last_seq > last_seq:
            self.bytes -= len(self.messages.pop().data)
            self.last_seq -= 1
        self._last_by_subject = {message.subject: message.seq for message in self.messages}
        self.wake()

    def wake(self) -> None:
        """Tell the readers that something changed."""
        for reader in self._readers:
            reader.set()

    async def wait(self, patterns: tuple[str, ...]) -> None:
        """Wait for a message on one of the subjects (none: any), or for something worse."""
        changed = asyncio.Event()
        self._readers[changed] = patterns
        try:
            await changed.wait()
        finally:
            del self._readers[changed]


class MemoryLog:
    """See `agentflow.log.port.Log`."""

    def __init__(
        self, server: MemoryServer, namespace: str, *, bytes_max: int = -1, create: bool = True
    ) -> None:
        self._server = server
        self._namespace = namespace
        self._bytes_max = bytes_max
        self._create = create
        self._created_ns = 0

    async def __aenter__(self) -> Self:
        if self._create:
            self._server.create(self._namespace, bytes_max=self._bytes_max)
        self._created_ns = self._stream().created_ns
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    @property
    def namespace(self) -> str:
        """The namespace this log belongs to."""
        return self._namespace

    async def identity(self) -> Identity:
        """The stream's identity and extent now. Raises LogGone."""
        stream = self._stream()
        return Identity(
            name=stream.name,
            created_ns=stream.created_ns,
            first_seq=stream.first_seq,
            last_seq=stream.last_seq,
            replicas=1,
            bytes=stream.bytes,
            bytes_max=stream.bytes_max,
            trim=stream.trim,
        )

    async def trim(self, to: Trim) -> int:
        """Remove what was archived; see `agentflow.log.trim`."""
        return self._stream().cut(to, self._namespace)

    async def append(
        self,
        frame: Frame,
        *,
        fence: Fence | None = None,
        timeout_s: float = 5.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store one frame; see the port."""
        return await self.append_batch(
            (frame,), fence=fence, timeout_s=timeout_s, in_doubt_after=in_doubt_after
        )

    async def append_batch(
        self,
        frames: Sequence[Frame],
        *,
        fence: Fence | None = None,
        timeout_s: float = 10.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store all frames next to each other, or none of them; see the port."""
        del timeout_s
        appended = await self._append(tuple(frames), fence)
        if in_doubt_after is None or isinstance(appended, Done):
            return appended
        return self._search(frames, appended, in_doubt_after)

    async def find(self, msg_id: str, *, after: int) -> int | None:
        """Sequence of the message stored under `msg_id` after sequence `after`, or None."""
        return self._stream().find(msg_id, after)

    async def read(self, seq: int) -> Message | None:
        """The message at `seq`, or None if it is not there."""
        return self._stream().message(seq)

    async def last(self, subject: str) -> Message | None:
        """The last message on an exact subject."""
        return self._stream().last(subject)

    async def follow(
        self, after: int, *, subjects: Sequence[str] = ()
    ) -> AsyncGenerator[list[Message], None]:
        """Everything after sequence `after`; see the port."""
        patterns = tuple(subjects)
        # Who reads some subjects only may begin before the place where the log begins.
        tolerated = (await self.identity()).trimmed_seq if patterns else 0
        while True:
            stream = self._stream()
            if stream.created_ns != self._created_ns:
                raise LogGone(f"stream {stream.name} was deleted and created again")
            if stream.last_seq < after:
                raise LogGone(
                    f"stream {stream.name} went back: it ends at {stream.last_seq}, {after} was seen"
                )
            identity = await self.identity()
            if identity.trimmed_seq > max(after, tolerated):
                raise trimmed_off(identity, after + 1)
            if not subjects and stream.first_seq > after + 1:
                raise LogGone(f"stream {stream.name} begins at {stream.first_seq}, {after + 1} is wanted")
            wanted = stream.after(after)
            after = stream.last_seq
            if patterns:
                wanted = [message for message in wanted if matches_any(patterns, message.subject)]
            if not wanted:
                await stream.wait(patterns)
            else:
                yield wanted

    def arrive(self, frames: Sequence[Frame], fence: Fence | None) -> Appended:
        """What the server does, now, with frames that reach it."""
        try:
            stream = self._stream()
        except LogGone as gone:
            return Refused(Reason.GONE, 503, str(gone))
        now_ns = self._server.tick()
        if fence is not None and not stream.holds(fence):
            if fence.subject == frames[0].subject and self._known(stream, frames, now_ns):
                return self._duplicate(stream, frames, now_ns)
            return Refused(Reason.FENCED, 10071, f"wrong last sequence on {fence.subject}")
        if self._known(stream, frames, now_ns):
            return self._duplicate(stream, frames, now_ns)
        if not stream.has_room(sum(len(frame.data) for frame in frames)):
            return Refused(Reason.FULL, 10077, "maximum bytes exceeded")
        for number, frame in enumerate(frames):
            stream.store(frame, fence if number == 0 else None, now_ns)
        return Done(stream.last_seq)

    def _search(self, frames: Sequence[Frame], appended: Refused | Unknown, after: int) -> Appended:
        """What became of an earlier call of a write that this call did not store."""
        stream = self._server.streams.get(self._namespace)
        at = None if stream is None or frames[0].msg_id is None else stream.find(frames[0].msg_id, after)
        if stream is not None and at is not None:
            stored = [stream.message(seq) for seq in range(at, at + len(frames))]
            if all(each and is_stored_as(frame, each) for frame, each in zip(frames, stored, strict=True)):
                return Done(at + len(frames) - 1, duplicate=True)
        if isinstance(appended, Refused) and appended.reason is not Reason.FENCED:
            return Unknown(f"an earlier attempt may arrive yet; the last was refused: {appended.detail}")
        return appended

    def _stream(self) -> MemoryStream:
        stream = self._server.streams.get(self._namespace)
        if stream is None:
            raise LogGone(f"there is no stream {wire.stream(self._namespace)}")
        return stream

    async def _append(self, frames: Sequence[Frame], fence: Fence | None) -> Appended:
        assert frames, "nothing to append"
        refused = oversize(frames)
        if refused is not None:
            return refused
        fault = await self._server.admit()
        if isinstance(fault, Refused):
            return fault
        if fault is Fault.LOST_UNKNOWN:
            return Unknown("no acknowledgement came")
        result = self.arrive(frames, fence)
        if not isinstance(result, Done) or fault is None:
            return result
        repeatable = all(frame.msg_id is not None for frame in frames)
        if fault is Fault.ACK_LOST and repeatable:
            return Done(result.seq, duplicate=True)
        return Unknown("no acknowledgement came")

    def _known(self, stream: MemoryStream, frames: Sequence[Frame], now_ns: int) -> bool:
        return any(frame.msg_id is not None and stream.known(frame.msg_id, now_ns) for frame in frames)

    def _duplicate(self, stream: MemoryStream, frames: Sequence[Frame], now_ns: int) -> Appended:
        """A message id is known: are all of them stored next to each other, and ours?"""
        first = None if frames[0].msg_id is None else stream.known(frames[0].msg_id, now_ns)
        for seq, frame in enumerate(frames, 0 if first is None else first):
            message = stream.message(seq)
            if message is None or not is_stored_as(frame, message):
                return Refused(
                    Reason.FOREIGN_ID, 0, f"a message id of the write is taken, near message {seq}"
                )
        assert first is not None, "frames without an id are never ours"
        return Done(first + len(frames) - 1, duplicate=True)


@lru_cache(maxsize=4_096)
def matches_any(patterns: tuple[str, ...], subject: str) -> bool:
    """Whether a subject matches one of these patterns."""
    tokens = subject.split(".")
    return any(_matches(pattern.split("."), tokens) for pattern in patterns)


def _matches(pattern: list[str], subject: list[str]) -> bool:
    """Whether a subject split at its dots matches a pattern split likewise."""
    if pattern[-1] == ">":
        head = len(pattern) - 1
        return len(subject) > head and _matches_tokens(pattern[:head], subject[:head])
    return len(pattern) == len(subject) and _matches_tokens(pattern, subject)


def _matches_tokens(pattern: list[str], subject: list[str]) -> bool:
    return all(wanted in ("*", found) for wanted, found in zip(pattern, subject, strict=True))
