"""The limits of the contract.

They decide what a fold accepts, so they are part of the contract: changing one changes
the contract level. They hold for every client in every language.
"""

from __future__ import annotations

from typing import Final

LEVEL: Final = 2
"""The highest contract level this release knows. Level 2 adds registered masters, drains, and locks."""
LEVEL_FIRST: Final = 1
"""The level of a message without the header that names one, and of a log before its first election."""

FRAME_BYTES_MAX: Final = 512 * 1024
"""Largest data of one message."""
FRAME_EVENTS_MAX: Final = 5_000
"""Most events in one frame."""
DEPTH_MAX: Final = 32
"""Deepest nesting of arrays and objects inside one event, the event itself included."""
INPUT_DEPTH_MAX: Final = DEPTH_MAX - 3
"""Deepest nesting of a dependency's result handed over inside an assignment."""
FRAME_DEPTH_MAX: Final = 100
"""A frame nested deeper than this is not looked into: it is quarantined whole."""
INTEGER_MAX: Final = 2**63 - 1
"""Integers lie between -INTEGER_MAX and INTEGER_MAX; larger ones go as strings."""

ID_LENGTH_MAX: Final = 128
"""Longest task or workflow id."""
TEXT_LENGTH_MAX: Final = 4_096
"""Longest title, name, description, reason or error message, in characters."""
SCRIPT_LENGTH_MAX: Final = 128 * 1024
"""Longest shell script, in characters."""
TAIL_LENGTH_MAX: Final = 16 * 1024
"""Longest tail of stdout, stderr or a traceback in an outcome, in characters."""
LABELS_MAX: Final = 64
FUNCTIONS_MAX: Final = 4_096
NON_RETRYABLE_MAX: Final = 64

PRIORITY_MAX: Final = 1000
PRIORITIES: Final = {"urgent": 1000, "high": 750, "medium": 500, "low": 250}
ATTEMPTS_MAX: Final = 1_000
SECONDS_MAX: Final = 366 * 86_400.0
"""Longest timeout or backoff."""

WORKFLOW_TASKS_MAX: Final = 100_000
WORKFLOW_EDGES_MAX: Final = 1_000_000
"""Most dependencies in one workflow, all tasks together."""
WORKFLOW_PARTS_MAX: Final = 500

INLINE_BYTES_MAX: Final = 256 * 1024
"""An argument list or result above this goes to the object store."""
FOLD_BYTES_MAX: Final = 1024
"""An argument list or result above this is kept by the fold as a position only."""

CLOSED_IDS_MAX: Final = 500_000
"""Ids of closed tasks and workflows in one generation; two generations are remembered."""
ID_AHEAD_MS_MAX: Final = 3_600_000
"""A UUIDv7 may name a time this far ahead of the log, not further."""
EARLY_IDS_MAX: Final = 500_000
"""Closed UUIDv7 remembered beyond their generation because they named a time ahead of the log."""
OPEN_TASKS_MAX: Final = 2_000_000
"""Open tasks in one namespace; beyond it submissions are rejected as overloaded."""
MASTERS_MAX: Final = 1_000
"""Registered masters; beyond it the one that joined first is forgotten, and registers again if it lives."""
LOCKS_MAX: Final = 10_000
"""Lock holders a fold knows; beyond it their events are history only."""
LOCK_NAME_LENGTH_MAX: Final = 200
PERMITS_MAX: Final = 1_000_000
ANSWERS_MAX: Final = 10_000
"""Rejections waiting to be answered; beyond it events are quarantined without an answer."""
