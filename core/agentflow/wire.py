"""Every name on the wire: streams, subjects, headers, buckets.

Nothing else in the project composes or parses one.

    af.<namespace>.<entity>.<event>.<actor>     events, kept in stream AF_<namespace>
    afq.<namespace>.<service>                   requests answered by the leader or a master
    afq.<namespace>.heartbeat.<worker>          a worker's sign of life, not kept
    afq.<namespace>.folds                       hashes of folds, compared by all who fold, not kept
    afn.<namespace>.<client>.<token>            notices to one client, not kept

`actor` is who speaks. For what is addressed to somebody (`task.assigned`, `task.stop`)
it is the worker spoken to. Ids never appear in a subject: every distinct subject costs
the server memory for as long as its messages live.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import Final, NamedTuple

# A namespace, worker, client or master name: one subject token.
NAME_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}$"
NAME: Final = re.compile(NAME_PATTERN)

# The subject a leader's election is written to, and the fence of all its decisions.
ELECTED_ACTOR: Final = "epoch"

# The actor in the subject under which the bucket of locks is opened.
LOCKS_ACTOR: Final = "bucket"

# Buckets.
LEASE_BUCKET: Final = "AF_LEASES"
# What a key-value bucket writes for a key that was removed, and the server for one that expired.
KV_OPERATION: Final = "KV-Operation"
KV_DELETED: Final = "DEL"
MARKER_REASON: Final = "Nats-Marker-Reason"

# Headers. The first four are JetStream's.
MSG_ID: Final = "Nats-Msg-Id"
EXPECTED_SUBJECT_SEQ: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
TTL: Final = "Nats-TTL"
BATCH_ID: Final = "Nats-Batch-Id"
BATCH_SEQ: Final = "Nats-Batch-Sequence"
BATCH_COMMIT: Final = "Nats-Batch-Commit"
# A message with it replaces all before it; on its subject, if the value is ROLLUP_SUBJECT.
ROLLUP: Final = "Nats-Rollup"
ROLLUP_SUBJECT: Final = "sub"
# On what a direct get returns: the sequence of the message.
SEQUENCE: Final = "Nats-Sequence"
# Contract level of the message's events; absent means level 1, for ever.
VERSION: Final = "Af-Version"
# On a lease's renewals: the sequence of the message by which it was acquired.
LEASE_EPOCH: Final = "Af-Epoch"
# On every message of a leader: "<epoch> <basis> <log time, ms> <policy version>".
DECISION: Final = "Af-Decision"

# On every message of an answer to a query: which it is, from 0, and "json" or "arrow".
QUERY_PART: Final = "Af-Part"
QUERY_FORM: Final = "Af-Form"
# The service that answers queries, and those of it that take turns.
QUERY_SERVICE: Final = "query"


class Route(NamedTuple):
    """A parsed event subject."""

    namespace: str
    kind: str
    """`<entity>.<event>`, for example `task.submitted`."""
    actor: str


def stream(namespace: str) -> str:
    """The JetStream stream that is the namespace's log."""
    return f"AF_{namespace}"


def parse_stream(name: str) -> str | None:
    """The namespace whose log a stream is; None if it is none."""
    namespace = name.removeprefix("AF_")
    return namespace if namespace != name and is_name(namespace) else None


def stream_subjects(namespace: str) -> str:
    """The subject filter the stream captures."""
    return f"af.{namespace}.>"


def event(namespace: str, kind: str, actor: str) -> str:
    """The subject of an event of `kind` ("task.submitted") said by, or to, `actor`."""
    return f"af.{namespace}.{kind}.{actor}"


def elected(namespace: str) -> str:
    """The one subject elections are written to."""
    return f"af.{namespace}.leader.elected.{ELECTED_ACTOR}"


def locks_opened(namespace: str) -> str:
    """The one subject generations of the bucket of locks are written to."""
    return f"af.{namespace}.lock.opened.{LOCKS_ACTOR}"


def parse_event(subject: str) -> Route | None:
    """Split an event subject; None if it is not five well-formed tokens."""
    tokens = subject.split(".")
    if len(tokens) != 5 or tokens[0] != "af":  # noqa: PLR2004 - the subject's shape
        return None
    return Route(tokens[1], f"{tokens[2]}.{tokens[3]}", tokens[4])


def notice(namespace: str, client: str, token: str) -> str:
    """Where a client listens for notices about what it submitted."""
    return f"afn.{namespace}.{client}.{token}"


def service(namespace: str, name: str) -> str:
    """The subject of a request/reply service."""
    return f"afq.{namespace}.{name}"


def heartbeat(namespace: str, worker: str) -> str:
    """Where a worker says that it lives ("*" listens to all)."""
    return f"afq.{namespace}.heartbeat.{worker}"


def folds(namespace: str) -> str:
    """Where those who fold the log tell each other the hashes of their states."""
    return f"afq.{namespace}.folds"


def lock_bucket(namespace: str) -> str:
    """The bucket of the tickets of those who hold locks, or wait for one."""
    return f"AF_LOCKS_{namespace}"


def lock_keys(name: str) -> str:
    """The pattern of all tickets of one lock; "" of all locks."""
    return f"{_lock_token(name)}.*" if name else "*.*"


def lock_key(name: str, ticket: str) -> str:
    """The key of one ticket of a lock."""
    return f"{_lock_token(name)}.{ticket}"


def _lock_token(name: str) -> str:
    """A lock's name as a token of a key: as it is if it may be, else encoded behind a "="."""
    return name if is_name(name) else "=" + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def bucket_stream(bucket: str) -> str:
    """The JetStream stream behind a key-value bucket (ADR-8)."""
    return f"KV_{bucket}"


def bucket_subject(bucket: str, key: str) -> str:
    """The subject of a key, or of a pattern of keys."""
    return f"$KV.{bucket}.{key}"


def bucket_key(bucket: str, subject: str) -> str:
    """The key a subject belongs to."""
    return subject.removeprefix(f"$KV.{bucket}.")


def object_bucket(namespace: str) -> str:
    """The object store bucket for arguments and results above the inline limit."""
    return f"AF_OBJECTS_{namespace}"


def object_stream(namespace: str) -> str:
    """The JetStream stream behind the object store bucket (ADR-20)."""
    return f"OBJ_{object_bucket(namespace)}"


def object_subjects(namespace: str) -> list[str]:
    """The subject filters the bucket's stream captures: chunks, then meta messages."""
    bucket = object_bucket(namespace)
    return [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"]


def object_chunks(namespace: str, nuid: str) -> str:
    """The subject of the chunks of one upload."""
    return f"$O.{object_bucket(namespace)}.C.{nuid}"


def object_meta(namespace: str, name: str) -> str:
    """The subject of an object's meta message."""
    encoded = base64.urlsafe_b64encode(name.encode()).decode()
    return f"$O.{object_bucket(namespace)}.M.{encoded}"


def master_session(name: str) -> str:
    """The key of a master's session lease ("*": all)."""
    return f"master.{name}"


@lru_cache(maxsize=4_096)
def is_name(text: str) -> bool:
    """Whether `text` may name a namespace, worker, client or master."""
    return NAME.fullmatch(text) is not None
