"""Leases in a JetStream key-value bucket: who should try, not who may.

A lease is a key that disappears unless its holder writes it again. It keeps two masters from
working against each other; what keeps them from doing harm is the log's fence.

- Every write is a compare-and-set, and carries its time to live: a renewal without one
  would make the key stay for ever.
- The holder's deadline counts from *before* the send, on the monotonic clock: the server's
  counts from later, so the holder always gives up first.
- A write without an answer is settled by reading the key: each holder writes under a nonce.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from types import TracebackType
from typing import Any, Final, Self

from msgspec import Struct
from msgspec.structs import replace

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected
from agentflow.log.port import Message
from agentflow.log.publisher import Ack, PubAck, Publisher
from agentflow.log.stored import msg_id_of
from agentflow.log.stream import get_message, open_stream

_STREAM: Final = f"KV_{wire.LEASE_BUCKET}"
_PREFIX: Final = f"$KV.{wire.LEASE_BUCKET}."
_OPERATION: Final = "KV-Operation"
_MARKER: Final = "Nats-Marker-Reason"

_OPEN_TIMEOUT_S: Final = 10.0
_ANSWER_TIMEOUT_S: Final = 2.0
_ATTEMPTS_MAX: Final = 5
_PAUSE_S_MAX: Final = 0.05
_VALUE_BYTES_MAX: Final = 64 * 1024
# A removed key's marker is of no use to us.
_MARKER_TTL_S: Final = 1


class Lease(Struct, frozen=True):
    """A lease as its holder knows it."""

    key: str
    value: bytes
    ttl_s: int
    nonce: str
    epoch: int
    """Revision at which it was acquired: later holders have a higher one."""
    revision: int
    deadline: float
    """`time.monotonic()` from which on somebody else may hold it."""

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class LeaseStore:
    """The bucket of leases. An async context manager: entered means the bucket is there."""

    def __init__(self, bus: Bus, *, replicas: int = 1) -> None:
        self._bus = bus
        self._publisher = Publisher(bus)
        self._replicas = replicas

    async def __aenter__(self) -> Self:
        await open_stream(self._bus, _config(self._replicas), create=True, timeout_s=_OPEN_TIMEOUT_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: leases end by themselves, the bus belongs to the caller."""

    async def acquire(self, key: str, value: bytes, ttl_s: int) -> Lease | None:
        """Take the lease, or None if somebody holds it. Raises Disconnected if that is not known."""
        lease = Lease(key, value, ttl_s, secrets.token_hex(8), epoch=0, revision=0, deadline=0.0)
        return await self._write(lease)

    async def renew(self, lease: Lease) -> Lease | None:
        """Hold on for another `ttl_s`, or None if it is lost.

        Raises Disconnected if that is not known; the lease counts until its old deadline
        then, and may be renewed again.
        """
        return await self._write(lease)

    async def release(self, lease: Lease) -> None:
        """Give it back, if it is still ours. Raises Disconnected if nothing could be sent."""
        headers = {_OPERATION: "DEL", wire.TTL: str(_MARKER_TTL_S)}
        await self._put(lease, b"", headers)

    async def holder(self, key: str) -> bytes | None:
        """The value the present holder wrote, or None. Raises Disconnected."""
        message = await self._last(key)
        return None if message is None or _is_removed(message) else message.data

    async def _write(self, lease: Lease) -> Lease | None:
        """Write until it is known who holds the lease. Revision 0 is a lease not held yet."""
        for number in itertools.count():
            before = time.monotonic()
            write_id = f"{lease.nonce}.{secrets.token_hex(4)}"
            ack = await self._put(lease, lease.value, {wire.MSG_ID: write_id, wire.TTL: str(lease.ttl_s)})
            if isinstance(ack, PubAck):
                return _held(lease, ack.seq, before)
            last = await self._last(lease.key)
            if last is not None and msg_id_of(last) == write_id:
                return _held(lease, last.seq, before)
            base = _base(lease, last)
            if base is None:
                return None
            if number == _ATTEMPTS_MAX:
                break
            lease = replace(lease, revision=base)
            await asyncio.sleep(random.uniform(0, _PAUSE_S_MAX))
        raise Disconnected(f"lease {lease.key}: no write was accepted in {_ATTEMPTS_MAX} attempts")

    async def _put(self, lease: Lease, data: bytes, headers: dict[str, str]) -> Ack:
        headers[wire.EXPECTED_SUBJECT_SEQ] = str(lease.revision)
        timeout_s = min(lease.ttl_s / 2, _ANSWER_TIMEOUT_S)
        await self._bus.wait_connected(timeout_s)
        return await self._publisher.publish(_PREFIX + lease.key, data, headers, timeout_s=timeout_s)

    async def _last(self, key: str) -> Message | None:
        return await get_message(self._bus, _STREAM, {"last_by_subj": _PREFIX + key}, _ANSWER_TIMEOUT_S)


def _held(lease: Lease, revision: int, before: float) -> Lease:
    return replace(lease, epoch=lease.epoch or revision, revision=revision, deadline=before + lease.ttl_s)


def _base(lease: Lease, last: Message | None) -> int | None:
    """The revision to write upon after a refusal, or None if the lease is not to be had.

    A holder whose key is gone has lost it, even if nobody took it: somebody may have in
    between.
    """
    if last is not None and (msg_id_of(last) or "").startswith(f"{lease.nonce}."):
        return last.seq  # an earlier write of ours that we did not hear of
    if lease.epoch:
        return None
    if last is None:
        return 0
    return last.seq if _is_removed(last) else None


def _is_removed(message: Message) -> bool:
    headers = message.headers or {}
    return _OPERATION in headers or _MARKER in headers


def _config(replicas: int) -> dict[str, Any]:
    """The bucket: the options that `nats kv` knows, plus TTLs and without direct reads."""
    return {
        "name": _STREAM,
        "subjects": [f"{_PREFIX}>"],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": replicas,
        "max_bytes": -1,
        "max_msgs": -1,
        "max_msgs_per_subject": 1,
        "max_age": 0,
        "max_msg_size": _VALUE_BYTES_MAX,
        "max_consumers": -1,
        "duplicate_window": 120_000_000_000,
        "compression": "none",
        "deny_delete": True,
        "deny_purge": False,
        "sealed": False,
        "no_ack": False,
        # A replica's answer may be old: who leads is decided by the leader of the bucket.
        "allow_direct": False,
        "mirror_direct": False,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "allow_atomic": False,
        "allow_msg_schedules": False,
        "allow_msg_counter": False,
        "allow_batched": False,
        "discard_new_per_subject": False,
    }
