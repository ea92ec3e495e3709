"""Notices: what the leader tells a client at once, and nobody keeps.

A lost notice costs only latency: the client asks the status service and reads the log.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agentflow.events import ObjectRef

NOTICE_RESULT_MAX: Final = 32 * 1024
"""Larger results are left out; the client reads them at their position."""
NOTICES_MAX: Final = 2_000
"""Most notices in one message."""

REJECTED: Final = "rejected"
DUPLICATE: Final = "duplicate"


class Notice(Struct, frozen=True, omit_defaults=True, gc=False):
    """A task or workflow ended, or its submission was not accepted."""

    id: str
    state: str
    """A final state, or "rejected"."""
    seq: int = 0
    """Position of the event that said so."""
    index: int = 0
    result: Raw | UnsetType = UNSET
    """The result; absent also if it has to be read at the position."""
    object: ObjectRef | None = None
    error: str = ""
    message: str = ""
    fetch: bool = False
    """The result has to be read at the position."""


class StatusRequest(Struct, frozen=True):
    """What the status service is asked."""

    ids: list[str]


class Status(Struct, frozen=True, omit_defaults=True):
    """What the leader knows of one id."""

    id: str
    state: str
    """A task's or workflow's state; "unknown" if it never heard of it or forgot it."""
    seq: int = 0
    """Position of the event that ended it; 0 while it is open."""
    index: int = 0
    workflow: bool = False


class StatusReply(Struct, frozen=True):
    """The status service's answer: one for each id asked, in order."""

    leader: str
    seq: int
    """Up to where the leader had folded."""
    statuses: list[Status]


decode_notices: Final = msgspec.json.Decoder(list[Notice]).decode
decode_status_request: Final = msgspec.json.Decoder(StatusRequest).decode
decode_status_reply: Final = msgspec.json.Decoder(StatusReply).decode
