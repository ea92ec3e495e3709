"""Leases in memory: the same promises, no server, no disk.

Several `MemoryLeases` on one `MemoryLeaseServer` see the same buckets, as several processes
do. Time is simulated (`MemoryLeaseServer.advance`), or whatever clock is handed over; the
server lets keys expire by its own, each holder judges by his. Every fault is ordered in
advance, so a run repeats exactly.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Final, Self

from msgspec import Struct
from msgspec.structs import replace

from agentflow.errors import Disconnected, LogGone
from agentflow.leases.bucket import MARKER_TTL_S
from agentflow.leases.port import MARGIN_SHARE, Change, Entry, Lease, Removed, Snapshot

_EPOCH_MS: Final = 1_700_000_000_000


class Fault(enum.Enum):
    """What happens to one write."""

    ANSWER_LOST = "answer_lost"
    """Stored, and the writer never learns."""
    WRITE_LOST = "write_lost"
    """Not stored, and the writer never learns."""


class _Stored(Struct, frozen=True):
    """The last message of a key."""

    key: str
    revision: int
    value: bytes
    ttl_s: int
    nonce: str
    epoch: int
    expires: float
    written_ms: int
    removed: bool = False


class MemoryBucket:
    """One bucket's keys, on the server."""

    def __init__(self, name: str, first_seq: int, clock: Callable[[], float]) -> None:
        self.name: Final = name
        self.first_seq: Final = first_seq
        self.last_seq = max(first_seq, 1) - 1
        self.deleted = False
        self._clock = clock
        self._stored: dict[str, _Stored] = {}

    def last(self, key: str) -> _Stored | None:
        """What lies under a key: a lease, a removal, or nothing (also when it has expired)."""
        stored = self._stored.get(key)
        if stored is not None and stored.expires <= self._clock():
            del self._stored[key]
            return None
        return stored

    def write(
        self,
        key: str,
        expected: int,
        value: bytes,
        ttl_s: int,
        nonce: str,
        epoch: int,
        *,
        removed: bool = False,
    ) -> int | None:
        """Store if the key's last revision is the one expected; the new revision, or None."""
        last = self.last(key)
        if expected != (0 if last is None else last.revision):
            return None
        self.last_seq += 1
        now = self._clock()
        revision, written_ms = self.last_seq, _EPOCH_MS + int(now * 1_000)
        self._stored[key] = _Stored(
            key, revision, value, ttl_s, nonce, epoch or revision, now + ttl_s, written_ms, removed
        )
        return revision

    def matching(self, pattern: str, after: int = 0) -> list[_Stored]:
        """The last message of each key under a pattern, in order, from after a revision on."""
        live = [stored for key in list(self._stored) if (stored := self.last(key)) is not None]
        found = [each for each in live if each.revision > after and _matches(pattern, each.key)]
        return sorted(found, key=lambda each: each.revision)


class MemoryLeaseServer:
    """What a nats-server is for `JetStreamLeases`: the place where the buckets are."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.now = 1_000.0
        self.clock: Final = clock or (lambda: self.now)
        self.buckets: Final[dict[str, MemoryBucket]] = {}
        self.changed = asyncio.Event()
        """Set, and replaced, when something changes that a watcher may wait for."""
        self._faults: deque[Fault] = deque()
        self._unreachable: set[str] = set()
        self._down = False
        self._writes = _Gate()
        self._answers = _Gate()

    def advance(self, seconds: float) -> None:
        """Let simulated time pass."""
        self.now += seconds

    def inject(self, *faults: Fault) -> None:
        """The next writes, one each, end like this."""
        self._faults.extend(faults)

    def stop(self) -> None:
        """Be down for everybody; what is stored stays, and expires."""
        self._down = True

    def start(self) -> None:
        """Be there again."""
        self._down = False
        self.wake()

    def cut_off(self, holder: str) -> None:
        """Let the adapters of one holder reach us no more."""
        self._unreachable.add(holder)

    def heal(self, holder: str) -> None:
        """Let the adapters of one holder reach us again."""
        self._unreachable.discard(holder)
        self.wake()

    def hold_writes(self) -> None:
        """Let writes wait, before they are stored, until `let_go`."""
        self._writes.close()

    def hold_answers(self) -> None:
        """Let answers to writes wait, after they were stored, until `let_go`."""
        self._answers.close()

    def let_go(self) -> None:
        """Let what waits go on."""
        self._writes.open()
        self._answers.open()

    def create(self, name: str, first_seq: int = 0) -> MemoryBucket:
        """Create a bucket, or find it."""
        if name not in self.buckets:
            self.buckets[name] = MemoryBucket(name, first_seq, self.clock)
        return self.buckets[name]

    def delete(self, name: str) -> None:
        """Delete a bucket; who watches it is told."""
        self.buckets.pop(name).deleted = True
        self.wake()

    def wake(self) -> None:
        """Let watchers look."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def is_reachable(self, holder: str) -> bool:
        """Whether a holder's questions arrive."""
        return not self._down and holder not in self._unreachable

    def bucket(self, name: str, holder: str) -> MemoryBucket:
        """The bucket, for a holder. Raises Disconnected, LogGone."""
        if not self.is_reachable(holder):
            raise Disconnected(f"{holder or 'nobody'} reaches the server")
        if name not in self.buckets:
            raise LogGone(f"there is no bucket {name}")
        return self.buckets[name]

    async def carry_out(
        self, name: str, holder: str, write: Callable[[MemoryBucket], int | None]
    ) -> int | None:
        """Let a write in, carry it out, and its answer back. Raises Disconnected, LogGone."""
        await asyncio.sleep(0)
        self.bucket(name, holder)
        fault = self._faults.popleft() if self._faults else None
        await self._writes.passed()
        bucket = self.bucket(name, holder)
        if fault is Fault.WRITE_LOST:
            raise Disconnected("the write was lost")
        revision = write(bucket)
        self.wake()
        if fault is Fault.ANSWER_LOST:
            raise Disconnected("the answer was lost")
        await self._answers.passed()
        self.bucket(name, holder)
        return revision


class MemoryLeases:
    """See `agentflow.leases.port.Leases`. `name` is the holder's, for `MemoryLeaseServer.cut_off`."""

    def __init__(
        self,
        server: MemoryLeaseServer,
        bucket: str,
        *,
        clock: Callable[[], float] | None = None,
        name: str = "",
        first_seq: int = 0,
        create: bool = True,
    ) -> None:
        self._server = server
        self._name = name
        self._bucket_name = bucket
        self._clock = clock or server.clock
        self._first_seq = first_seq
        self._create = create
        self._opened: MemoryBucket | None = None

    async def __aenter__(self) -> Self:
        if self._create and self._server.is_reachable(self._name):
            self._server.create(self._bucket_name, self._first_seq)
        self._opened = self._bucket()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    @property
    def first_seq(self) -> int:
        """The revision at which the bucket began when it was created."""
        return self._open().first_seq

    async def acquire(self, key: str, value: bytes, ttl_s: int, *, nonce: str | None = None) -> Lease | None:
        """Take the lease, or None if somebody holds it; see the port."""
        lease = Lease(key, value, ttl_s, nonce or secrets.token_hex(8), epoch=0, revision=0, deadline=0.0)
        last = self._bucket().last(key)
        if last is not None and last.removed:
            lease = replace(lease, revision=last.revision)
        elif last is not None and last.nonce == lease.nonce:
            lease = replace(lease, epoch=last.epoch, revision=last.revision)
        return await self._write(lease)

    async def renew(self, lease: Lease, value: bytes | None = None) -> Lease | None:
        """Hold on for another `ttl_s`, or None if it is lost; see the port."""
        assert lease.epoch, "a lease that was never held"
        try:
            lease = replace(lease, value=lease.value if value is None else value, revision=self._ours(lease))
            return await self._write(lease)
        except LogGone:
            return None

    async def release(self, lease: Lease) -> None:
        """Give it back, if it is still ours; see the port."""
        try:
            await self._remove(lease.key, self._ours(lease), lease.nonce)
        except LogGone:
            return

    async def evict(self, entry: Entry) -> bool:
        """Take a silent holder's lease away; see the port."""
        nonce = secrets.token_hex(8)
        if await self._remove(entry.key, entry.revision, nonce):
            return True
        last = self._bucket().last(entry.key)
        if last is not None:
            return last.removed or last.epoch != entry.epoch
        if await self._remove(entry.key, 0, nonce):
            return True
        raise Disconnected(f"lease {entry.key}: somebody else writes to it")

    async def read(self, key: str) -> Entry | None:
        """The lease now, or None; see the port."""
        await asyncio.sleep(0)
        last = self._bucket().last(key)
        return None if last is None or last.removed else _entry(last, self._clock())

    async def entries(self, pattern: str) -> Snapshot:
        """All leases under a pattern; see the port."""
        await asyncio.sleep(0)
        bucket = self._bucket()
        seen = self._clock()
        found = [_entry(stored, seen) for stored in bucket.matching(pattern) if not stored.removed]
        return Snapshot(bucket.last_seq, sorted(found, key=lambda entry: entry.epoch))

    async def watch(self, pattern: str, after: int) -> AsyncGenerator[list[Change], None]:
        """What changes under a pattern after revision `after`; see the port."""
        opened = self._open()
        while True:
            changed = self._server.changed
            if self._server.is_reachable(self._name):
                if opened.deleted:
                    raise LogGone(f"bucket {opened.name} was deleted")
                found = opened.matching(pattern, after)
                if found:
                    after = found[-1].revision
                    seen = self._clock()
                    yield [_change(stored, seen) for stored in found]
                    continue
            await changed.wait()

    async def _write(self, lease: Lease) -> Lease | None:
        before = self._clock()

        def write(bucket: MemoryBucket) -> int | None:
            return bucket.write(lease.key, lease.revision, lease.value, lease.ttl_s, lease.nonce, lease.epoch)

        revision = await self._server.carry_out(self._bucket_name, self._name, write)
        if revision is None:
            return None
        deadline = before + lease.ttl_s * (1 - MARGIN_SHARE)
        return replace(lease, epoch=lease.epoch or revision, revision=revision, deadline=deadline)

    async def _remove(self, key: str, expected: int, nonce: str) -> bool:
        def write(bucket: MemoryBucket) -> int | None:
            return bucket.write(key, expected, b"", MARKER_TTL_S, nonce, 0, removed=True)

        return await self._server.carry_out(self._bucket_name, self._name, write) is not None

    def _ours(self, lease: Lease) -> int:
        """The revision to write upon: that of our own last write, heard of or not. Raises LogGone."""
        last = self._bucket().last(lease.key)
        if last is None or last.removed or last.nonce != lease.nonce:
            return lease.revision
        return last.revision if lease.epoch in (0, last.epoch) else lease.revision

    def _bucket(self) -> MemoryBucket:
        return self._server.bucket(self._bucket_name, self._name)

    def _open(self) -> MemoryBucket:
        assert self._opened is not None, "the bucket was not entered"
        return self._opened


class _Gate:
    """A way that is open, or where everybody waits."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._event.set()

    def close(self) -> None:
        self._event.clear()

    def open(self) -> None:
        self._event.set()

    async def passed(self) -> None:
        await self._event.wait()


def _entry(stored: _Stored, seen: float) -> Entry:
    return Entry(
        stored.key, stored.value, stored.ttl_s, stored.epoch, stored.revision, seen, stored.written_ms
    )


def _change(stored: _Stored, seen: float) -> Change:
    return Removed(stored.key, stored.revision) if stored.removed else _entry(stored, seen)


def _matches(pattern: str, key: str) -> bool:
    wanted, found = pattern.split("."), key.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        if len(found) <= len(wanted):
            return False
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(
        want in ("*", have) for want, have in zip(wanted, found, strict=True)
    )
