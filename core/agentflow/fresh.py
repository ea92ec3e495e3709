"""Fresh ids: the one place where the clock and chance go into an id.

`agentflow.ids` says what ids look like and belongs to the contract, which reads no clock and
rolls no dice.
"""

from __future__ import annotations

import os
import time

from agentflow import ids


def new_id() -> str:
    """A fresh UUIDv7."""
    return ids.uuid7(time.time_ns() // 1_000_000, os.urandom(10))
