"""The JetStream bucket that leases are kept in: its configuration, and how a lease lies in it.

Every write carries its time to live. How the server lets go of a key that was not renewed
differs. Without `subject_delete_marker_ttl` each replica forgets it by a clock of its own, so
that one may know nothing of a ticket which another still lets renew: an answer "there is
nobody" would be worth nothing, however new it is. With it, an expiry is a message in the
stream, the same for all. So a bucket of ours has it as soon as it has replicas. On one server
it would only be one more fsynced write: nothing is decided on the marker itself, and a waiter
needs a timer of his own anyway, because a bucket that stalls tells nothing.

A bucket found otherwise is taken as well; with replicas and without markers its leader alone
is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agentflow import wire
from agentflow.bus import Bus
from agentflow.leases.port import Change, Entry, Removed
from agentflow.log.port import Message
from agentflow.log.stream import StreamInfo, open_stream

MARKER_TTL_S: Final = 3
"""How long a removal can be read: who was disconnected for less hears of it.

Whoever was for longer finds out when he thinks the key silent. Longer ones would make
reading a busy line slow: each is read with it.
"""

_VALUE_BYTES_MAX: Final = 64 * 1024
# One for each who waits. A named limit: unset means 1,000 on a current server.
_CONSUMERS_MAX: Final = 5_000
_OPEN_TIMEOUT_S: Final = 10.0
# What a write that is not ours, without a time to live, is waited for.
_TTL_S_UNKNOWN: Final = 60
_TOLERATED: Final = ("subject_delete_marker_ttl", "first_seq", "metadata")


async def open_bucket(bus: Bus, config: dict[str, Any], *, create: bool) -> StreamInfo:
    """Describe the bucket, creating it if it is missing and `create` is set, and check it.

    One that another has just created, and that elects its leader, is waited for. Raises StreamMismatch
    naming every difference, LogGone if it is missing, Disconnected.
    """
    return await open_stream(bus, config, create=create, timeout_s=_OPEN_TIMEOUT_S, tolerated=_TOLERATED)


def bucket_config(
    bucket: str, *, replicas: int, first_seq: int, metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The configuration of a bucket of leases, whose revisions begin at `first_seq`."""
    config: dict[str, Any] = {
        "name": wire.bucket_stream(bucket),
        "subjects": [wire.bucket_subject(bucket, ">")],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": replicas,
        "max_bytes": -1,
        "max_msgs": -1,
        "max_msgs_per_subject": 1,
        "max_age": 0,
        "max_msg_size": _VALUE_BYTES_MAX,
        "max_consumers": _CONSUMERS_MAX,
        "duplicate_window": 120_000_000_000,
        "compression": "none",
        "deny_delete": True,
        "deny_purge": False,
        "sealed": False,
        "no_ack": False,
        # Answers of replicas count only once they are as new as the leader was (see reading.py).
        "allow_direct": True,
        "mirror_direct": False,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "allow_atomic": False,
        "allow_msg_schedules": False,
        "allow_msg_counter": False,
        "allow_batched": False,
        "discard_new_per_subject": False,
    }
    if metadata:
        config["metadata"] = dict(metadata)
    if replicas > 1:
        config["subject_delete_marker_ttl"] = MARKER_TTL_S * 1_000_000_000
    return config | ({"first_seq": first_seq} if first_seq else {})


def is_uniform(config: Mapping[str, Any]) -> bool:
    """Whether all replicas of a bucket let go of the same keys at the same place in the stream."""
    return config["num_replicas"] == 1 or bool(config.get("subject_delete_marker_ttl"))


def is_removed(message: Message) -> bool:
    """Whether it marks a key that was removed, or expired."""
    headers = message.headers or {}
    return wire.KV_OPERATION in headers or wire.MARKER_REASON in headers


def is_deleted(message: Message) -> bool:
    """Whether it marks a key that somebody removed by a write; an expiry is none."""
    return wire.KV_OPERATION in (message.headers or {})


def change(bucket: str, message: Message, seen: float) -> Change:
    """What a message says of a lease."""
    key = wire.bucket_key(bucket, message.subject)
    if is_removed(message):
        return Removed(key, message.seq, expired=not is_deleted(message))
    return entry(bucket, message, seen)


def entry(bucket: str, message: Message, seen: float) -> Entry:
    """The lease that a message wrote."""
    headers = message.headers or {}
    return Entry(
        key=wire.bucket_key(bucket, message.subject),
        value=message.data,
        ttl_s=_number(headers.get(wire.TTL)) or _TTL_S_UNKNOWN,
        epoch=_number(headers.get(wire.LEASE_EPOCH)) or message.seq,
        revision=message.seq,
        seen=seen,
        written_ms=message.time_ns // 1_000_000,
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
