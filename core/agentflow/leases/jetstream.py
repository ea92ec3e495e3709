"""Leases in a JetStream key-value bucket. See `port`.

A write that was refused, or not answered, says nothing by itself: an earlier attempt of ours
may have arrived. So the key is read back from the bucket's leader, and what lies there is
ours if its message id begins with our nonce. That reading only chooses what to write upon;
what counts is the compare-and-set that succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Final, Self

from msgspec.structs import replace

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, LogGone, OperatingError
from agentflow.leases import bucket as layout
from agentflow.leases.port import MARGIN_SHARE, Change, Entry, Lease, Snapshot
from agentflow.leases.reading import read_last
from agentflow.log.follow import follow
from agentflow.log.port import Message
from agentflow.log.publisher import NOT_PERMITTED, Ack, ApiError, PubAck, Publisher
from agentflow.log.stored import msg_id_of
from agentflow.log.stream import StreamInfo, get_message, parse_time_ns

_READ_TIMEOUT_S: Final = 2.0
# A write not answered by then was probably lost, as while the bucket elects its leader: reading
# the key back tells.
_WRITE_TIMEOUT_S: Final = 1.0
_ATTEMPTS_MAX: Final = 5
_PAUSE_S_MAX: Final = 0.05


class JetStreamLeases:
    """See `agentflow.leases.port.Leases`.

    Entering creates the bucket if it is missing and `create` is set, with revisions from
    `first_seq` on and with `metadata` for whoever opens it. Raises StreamMismatch, LogGone, Disconnected.
    """

    def __init__(
        self,
        bus: Bus,
        bucket: str,
        *,
        replicas: int = 1,
        first_seq: int = 0,
        create: bool = True,
        metadata: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._bucket = bucket
        self._stream = wire.bucket_stream(bucket)
        self._config = layout.bucket_config(bucket, replicas=replicas, first_seq=first_seq, metadata=metadata)
        self._create = create
        self._clock = clock
        self._publisher = Publisher(bus)
        self._opened: StreamInfo | None = None
        self._acked = 0

    async def __aenter__(self) -> Self:
        self._opened = await layout.open_bucket(self._bus, self._config, create=self._create)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: leases end by themselves, the bus belongs to the caller."""

    @property
    def first_seq(self) -> int:
        """The revision at which the bucket began when it was created."""
        found: int = self._open().config.get("first_seq", 0)
        return found

    @property
    def metadata(self) -> dict[str, str]:
        """What whoever created the bucket left for those who open it."""
        found: dict[str, str] = self._open().config.get("metadata", {})
        return found

    @property
    def age_s(self) -> float:
        """How old the bucket was when it was opened, by the server's clock."""
        opened = self._open()
        return max((parse_time_ns(opened.ts) - parse_time_ns(opened.created)) / 1e9, 0.0)

    async def acquire(self, key: str, value: bytes, ttl_s: int, *, nonce: str | None = None) -> Lease | None:
        """Take the lease, or None if somebody holds it; see the port."""
        assert ttl_s >= 1, f"{ttl_s}: the server takes whole seconds"
        lease = Lease(key, value, ttl_s, nonce or secrets.token_hex(8), epoch=0, revision=0, deadline=0.0)
        return await self._write(lease)

    async def renew(self, lease: Lease, value: bytes | None = None) -> Lease | None:
        """Hold on for another `ttl_s`, or None if it is lost; see the port."""
        assert lease.epoch, "a lease that was never held"
        try:
            return await self._write(lease if value is None else replace(lease, value=value))
        except LogGone:
            return None

    async def release(self, lease: Lease) -> None:
        """Give it back, if it is still ours; see the port."""
        base = lease.revision
        with contextlib.suppress(LogGone):
            for _ in range(_ATTEMPTS_MAX):
                if isinstance(await self._remove(lease.key, base, lease.nonce), PubAck):
                    return
                last = await self._last(lease.key)
                if last is None or layout.is_removed(last) or not _is_ours(last, lease.nonce):
                    return
                base = last.seq
                await _pause()
            raise Disconnected(f"lease {lease.key} was not released in {_ATTEMPTS_MAX} attempts")

    async def evict(self, entry: Entry) -> bool:
        """Take a silent holder's lease away; see the port."""
        nonce, base = secrets.token_hex(8), entry.revision
        for _ in range(_ATTEMPTS_MAX):
            if isinstance(await self._remove(entry.key, base, nonce), PubAck):
                return True
            last = await self._last(entry.key)
            if last is not None and layout.is_deleted(last):
                return True  # by a write already: ours, the holder's or another's
            if last is None or layout.is_removed(last):
                base = 0 if last is None else last.seq
            elif last.seq != entry.revision:
                return self._entry(last).epoch != entry.epoch
            await _pause()
        raise Disconnected(f"lease {entry.key} was not evicted in {_ATTEMPTS_MAX} attempts")

    async def read(self, key: str) -> Entry | None:
        """The lease now, or None; see the port."""
        message = await self._last(key)
        return None if message is None or layout.is_removed(message) else self._entry(message)

    async def entries(self, pattern: str) -> Snapshot:
        """All leases under a pattern; see the port."""
        config = self._open().config
        last = await read_last(
            self._bus,
            self._stream,
            self._subject(pattern),
            self._acked,
            replicated=config["num_replicas"] > 1,
            uniform=layout.is_uniform(config),
        )
        found = [self._entry(message) for message in last.messages if not layout.is_removed(message)]
        return Snapshot(last.revision, sorted(found, key=lambda entry: entry.epoch))

    async def watch(self, pattern: str, after: int) -> AsyncGenerator[list[Change], None]:
        """What changes under a pattern after revision `after`; see the port."""
        messages = follow(self._bus, self._open(), after, (self._subject(pattern),), compacted=True)
        async with contextlib.aclosing(messages):
            async for batch in messages:
                seen = self._clock()
                yield [layout.change(self._bucket, message, seen) for message in batch]

    async def _write(self, lease: Lease) -> Lease | None:
        """Write until it is known who holds the lease. Revision 0 is a lease not held yet."""
        ack: Ack = None
        for _ in range(_ATTEMPTS_MAX):
            before = self._clock()
            write_id = _write_id(lease.nonce)
            ack = await self._put(lease, write_id)
            if isinstance(ack, PubAck):
                return _held(lease, ack.seq, before)
            last = await self._last(lease.key)
            if last is not None and msg_id_of(last) == write_id:
                return _held(lease, last.seq, before)
            based = self._based(lease, last)
            if based is None:
                return None
            lease = based
            await _pause()
        why = ack or "the server says nothing: its disk may be full, or its majority gone"
        raise Disconnected(f"lease {lease.key}: no write was accepted in {_ATTEMPTS_MAX} attempts: {why}")

    def _based(self, lease: Lease, last: Message | None) -> Lease | None:
        """The lease to write after a refusal, or None if it is not to be had.

        A holder whose key is gone has lost it, even if nobody took it: somebody may have in
        between.
        """
        if last is not None and not layout.is_removed(last) and _is_ours(last, lease.nonce):
            # An earlier write of ours that we did not hear of; but not an acquisition that was
            # still under way when the lease was lost, and lies there now: its place is another.
            epoch = self._entry(last).epoch
            return replace(lease, epoch=epoch, revision=last.seq) if lease.epoch in (0, epoch) else None
        if lease.epoch:
            return None
        if last is None:
            return replace(lease, revision=0)
        return replace(lease, revision=last.seq) if layout.is_removed(last) else None

    async def _put(self, lease: Lease, write_id: str) -> Ack:
        headers = {
            wire.MSG_ID: write_id,
            wire.EXPECTED_SUBJECT_SEQ: str(lease.revision),
            wire.TTL: str(lease.ttl_s),
        }
        if lease.epoch:
            headers[wire.LEASE_EPOCH] = str(lease.epoch)
        return await self._publish(lease.key, lease.value, headers, min(lease.ttl_s / 2, _WRITE_TIMEOUT_S))

    async def _remove(self, key: str, base: int, nonce: str) -> Ack:
        headers = {
            wire.MSG_ID: _write_id(nonce),
            wire.EXPECTED_SUBJECT_SEQ: str(base),
            wire.TTL: str(layout.MARKER_TTL_S),
            wire.KV_OPERATION: wire.KV_DELETED,
        }
        return await self._publish(key, b"", headers, _WRITE_TIMEOUT_S)

    async def _publish(self, key: str, data: bytes, headers: dict[str, str], timeout_s: float) -> Ack:
        await self._bus.wait_connected(timeout_s)
        ack = await self._publisher.publish(self._subject(key), data, headers, timeout_s=timeout_s)
        if isinstance(ack, PubAck):
            self._acked = max(self._acked, ack.seq)
        elif isinstance(ack, ApiError) and ack.code == NOT_PERMITTED:
            raise OperatingError(ack.description)
        return ack

    async def _last(self, key: str) -> Message | None:
        query = {"last_by_subj": self._subject(key)}
        return await get_message(self._bus, self._stream, query, _READ_TIMEOUT_S)

    def _entry(self, message: Message) -> Entry:
        return layout.entry(self._bucket, message, self._clock())

    def _subject(self, key: str) -> str:
        return wire.bucket_subject(self._bucket, key)

    def _open(self) -> StreamInfo:
        assert self._opened is not None, "the bucket was not entered"
        return self._opened


def _held(lease: Lease, revision: int, before: float) -> Lease:
    deadline = before + lease.ttl_s * (1 - MARGIN_SHARE)
    return replace(lease, epoch=lease.epoch or revision, revision=revision, deadline=deadline)


def _write_id(nonce: str) -> str:
    return f"{nonce}.{secrets.token_hex(4)}"


def _is_ours(message: Message, nonce: str) -> bool:
    return (msg_id_of(message) or "").startswith(f"{nonce}.")


async def _pause() -> None:
    await asyncio.sleep(random.uniform(0, _PAUSE_S_MAX))
