"""Ids of tasks and workflows.

    client-chosen   1 to 128 of A-Z a-z 0-9 _ -, not beginning with "at-"
    from the SDK    a UUIDv7: 36 characters, lower case, its creation time in front
    left out        "at-<seq>-<index>", the position of the submission in the log
    in a workflow   "<workflow id>/<task_id>"

UUIDv7: RFC 9562, section 5.7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from agentflow.limits import ID_LENGTH_MAX

DERIVED_PREFIX: Final = "at-"
TASK_SEPARATOR: Final = "/"
_ID: Final = re.compile(rf"(?!{DERIVED_PREFIX})[A-Za-z0-9_-]{{1,{ID_LENGTH_MAX}}}")
_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

_is_id = _ID.fullmatch


def is_id(text: str) -> bool:
    """Whether a client may choose `text` as the id of a task or workflow."""
    return _is_id(text) is not None


def are_ids(texts: Sequence[str]) -> bool:
    """Whether a client may choose each of these; the same as `is_id` of each, without a pattern."""
    if not texts or not 1 <= min(map(len, texts)) <= max(map(len, texts)) <= ID_LENGTH_MAX:
        return False
    joined = "\n" + "\n".join(texts)
    letters = joined.replace("-", "").replace("_", "").replace("\n", "")
    return (
        joined.count("\n") == len(texts)
        and f"\n{DERIVED_PREFIX}" not in joined
        and letters.isascii()
        and (letters.isalnum() or not letters)
    )


def uuid7_time_ms(text: str) -> int | None:
    """The creation time inside a UUIDv7, Unix milliseconds; None for any other id."""
    return int(text[:8] + text[9:13], 16) if _UUID7.fullmatch(text) else None


def uuid7_prefix(time_ms: int) -> str:
    """How a UUIDv7 made at a time begins: UUIDv7 sort by time, so two of these bound a span."""
    made = f"{time_ms:012x}"
    return f"{made[:8]}-{made[8:]}"


def derived(seq: int, index: int) -> str:
    """The id of what was submitted without one at a position."""
    return f"{DERIVED_PREFIX}{seq}-{index}"


def in_workflow(workflow: str, task_id: str) -> str:
    """The id of a workflow's task."""
    return f"{workflow}{TASK_SEPARATOR}{task_id}"


def workflow_of(task: str) -> str | None:
    """The workflow a task id belongs to, or None."""
    head, separator, _ = task.partition(TASK_SEPARATOR)
    return head if separator else None
