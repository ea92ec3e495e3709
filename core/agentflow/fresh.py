"""Fresh ids: the one place where the clock and chance go into an id.

`agentflow.ids` says what ids look like and belongs to the contract, which reads no clock and
rolls no dice.
"""

from __future__ import annotations

import os
import time
from typing import Final

_DIGITS: Final = 20
"""Hex digits of chance an id takes; of one of them only two bits count, one is not used."""
_POOL_IDS: Final = 256
_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}

_pool: list[str] = []


def new_id() -> str:
    """A fresh UUIDv7 (RFC 9562): 36 characters, lower case."""
    if not _pool:
        digits = os.urandom(_DIGITS * _POOL_IDS // 2).hex()
        _pool.extend(digits[start : start + _DIGITS] for start in range(0, len(digits), _DIGITS))
    chance = _pool.pop()
    made = f"{time.time_ns() // 1_000_000:012x}"
    return f"{made[:8]}-{made[8:]}-7{chance[:3]}-{_VARIANT[chance[3]]}{chance[4:7]}-{chance[7:19]}"


# A forked child must not give out its parent's ids again.
os.register_at_fork(after_in_child=_pool.clear)
