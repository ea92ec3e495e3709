"""A bar for work that takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from agentflow_nodes.cli.output import console

_QUIET_S: Final = 0.5
"""What takes longer shows how far it is."""


@contextmanager
def bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar for people that shows up once it takes a while; yielded is what it has to be told."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    begun = time.monotonic()
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    shown = Progress(*columns, console=console(stderr=True), transient=True)
    line = shown.add_task("", total=None)

    def tell(done: int, total: int) -> None:
        if time.monotonic() - begun > _QUIET_S and console(stderr=True).is_terminal:
            shown.start()
        shown.update(line, completed=done, total=total)

    try:
        yield tell
    finally:
        if shown.live.is_started:  # it would end a line that nobody began
            shown.stop()
