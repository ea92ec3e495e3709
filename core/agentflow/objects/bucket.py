"""The configuration of a bucket, and what is wrong with one somebody else configured."""

from __future__ import annotations

from typing import Any, Final

from agentflow import wire
from agentflow.objects.writes import REPEAT_S_MAX

CHUNK_BYTES: Final = 128 * 1024
"""Data of one chunk, as ADR-20 proposes."""
BYTES_MAX: Final = -1
"""Default hard limit of a bucket: the server's own. A positive one is reserved on its disk."""

_DUPLICATE_WINDOW_S: Final = 120


def bucket_config(namespace: str, *, replicas: int, bytes_max: int) -> dict[str, Any]:
    """The configuration of a namespace's bucket."""
    return {
        "name": wire.object_stream(namespace),
        "subjects": wire.object_subjects(namespace),
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": replicas,
        "max_bytes": bytes_max,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_consumers": -1,
        "duplicate_window": _DUPLICATE_WINDOW_S * 1_000_000_000,
        "compression": "none",
        "allow_direct": True,
        # ADR-20: a meta message replaces the one before it.
        "allow_rollup_hdrs": True,
        "deny_delete": False,
        "deny_purge": False,
        "sealed": False,
        "no_ack": False,
        "mirror_direct": False,
        "allow_atomic": False,
        "allow_msg_ttl": False,
        "allow_msg_schedules": False,
        "allow_msg_counter": False,
        "allow_batched": False,
        "discard_new_per_subject": False,
    }


# Options of an existing bucket that must be as ours: others would lose or damage objects.
_ESSENTIAL: Final = (
    "storage", "retention", "discard", "allow_rollup_hdrs", "deny_purge", "sealed", "no_ack",
    "allow_msg_counter",
)  # fmt: skip
_MUST_BE_UNSET: Final = ("mirror", "sources", "subject_transform", "persist_mode")
_UNLIMITED: Final = ("max_msgs_per_subject", "max_msgs")


def faults(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Why an existing bucket cannot be used, in words. The server leaves out what is off."""
    wrong = [
        f"{option}: expected {expected[option]!r}, found {found.get(option)!r}"
        for option in _ESSENTIAL
        if found.get(option, False) != expected[option]
    ]
    wrong += [
        f"{option}: expected unset, found {found[option]!r}" for option in _MUST_BE_UNSET if found.get(option)
    ]
    wrong += [
        f"{option}: expected no limit, found {found[option]}"
        for option in _UNLIMITED
        if found.get(option, -1) > 0
    ]
    lacking = set(expected["subjects"]) - set(found.get("subjects") or ())
    if lacking:
        wrong.append(f"subjects: {sorted(lacking)} missing, found {found.get('subjects')}")
    if 0 < found.get("max_msg_size", -1) < CHUNK_BYTES + 4096:
        wrong.append(f"max_msg_size: {found['max_msg_size']} is less than a chunk")
    if found.get("duplicate_window", 0) < REPEAT_S_MAX * 1_000_000_000:
        wrong.append(
            f"duplicate_window: expected {REPEAT_S_MAX} s or more, found {found.get('duplicate_window')} ns"
        )
    return wrong
