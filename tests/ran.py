"""What a command ended in."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Ran(NamedTuple):
    """Its status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[Any]:
        """The JSON documents it printed, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]
