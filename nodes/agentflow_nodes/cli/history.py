"""Where a command's questions about history are answered: a file, or the log projected into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from msgspec import Struct

from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.output import console
from agentflow_nodes.cli.session import Target, open_log
from agentflow_projections.cache import cache_folder, refresh
from agentflow_projections.query import Reader, parse_when

_QUIET_S: Final = 0.5
"""What takes longer shows how far it is."""


class Wanted(Struct, frozen=True):
    """Which history is asked, and as of when."""

    where: Target
    file: Path | None = None
    as_of: str = ""
    at_least: int = 0
    wait_s: float = 30.0


@asynccontextmanager
async def open_history(wanted: Wanted) -> AsyncGenerator[Reader]:
    """The file that answers: the one named, or this log's own, brought up to the log's end."""
    if wanted.file is not None:
        if not wanted.file.is_file():
            raise usage(f"--file: there is no file {wanted.file}")
        path = wanted.file
    else:
        async with open_log(wanted.where) as log:
            with progress_bar("Reading the log") as tell:
                path = await refresh(
                    log, cache_folder(), at_least=wanted.at_least, wait_s=wanted.wait_s, progress=tell
                )
    with Reader(path) as reader:
        yield reader


def position_of(wanted: Wanted, reader: Reader) -> int | None:
    """The position that --as-of names; None: now. Raises InvalidRequest."""
    if not wanted.as_of:
        return None
    when = parse_when(wanted.as_of, datetime.now(UTC))
    return when if isinstance(when, int) else reader.position_at(when)


@contextmanager
def progress_bar(title: str) -> Generator[Callable[[int, int], None]]:
    """A bar for people, once something takes longer than a moment."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    begun = loop.time()
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    bar = Progress(*columns, console=console(stderr=True), transient=True)
    shown = bar.add_task("", total=None)

    def tell(done: int, total: int) -> None:
        if loop.time() - begun > _QUIET_S and console(stderr=True).is_terminal:
            bar.start()
        bar.update(shown, completed=done, total=total)

    try:
        yield tell
    finally:
        bar.stop()
