"""Where a command's questions about history are answered: a file, or the log projected into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct

from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.output import console
from agentflow_nodes.cli.session import Target, open_log
from agentflow_projections.cache import cache_folder, refresh
from agentflow_projections.queries import Ready
from agentflow_projections.query import Answer, Column, Question, Reader, Row, parse_when

_QUIET_S: Final = 0.5
"""What takes longer shows how far it is."""


class Wanted(Struct, frozen=True):
    """Which history is asked, and as of when."""

    where: Target
    file: Path | None = None
    as_of: str = ""
    at_least: int = 0
    wait_s: float = 30.0


class Found(Protocol):
    """An answer."""

    @property
    def columns(self) -> Sequence[Column]:
        """Its columns."""
        ...

    def rows(self) -> AsyncIterator[list[Row]]:
        """Its rows, in batches; once."""
        ...

    async def write_parquet(self, path: Path) -> int:
        """Write them to a file instead; how many they are."""
        ...


class History(Protocol):
    """What answers questions."""

    async def position(self, when: str) -> int:
        """The position that a text names: itself, or the last one at a time. Raises InvalidRequest."""
        ...

    def ask(self, question: Question) -> AbstractAsyncContextManager[Found]:
        """The answer to a question of anybody's."""
        ...

    def report(
        self, ready: Ready, told: dict[str, Any], as_of: int | None
    ) -> AbstractAsyncContextManager[Found]:
        """The answer to a ready-made one."""
        ...


class _FileHistory:
    """A file that nobody writes to."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def position(self, when: str) -> int:
        found = parse_when(when, datetime.now(UTC))
        return found if isinstance(found, int) else self._reader.position_at(found)

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncGenerator[Found]:
        with self._reader.ask(question) as answer:
            yield _FileFound(answer)

    def report(
        self, ready: Ready, told: dict[str, Any], as_of: int | None
    ) -> AbstractAsyncContextManager[Found]:
        return self.ask(ready.question(told, as_of))


class _FileFound:
    """An answer that DuckDB computes in this process."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.columns = answer.columns

    async def rows(self) -> AsyncIterator[list[Row]]:
        for batch in self._answer.rows():
            yield batch

    async def write_parquet(self, path: Path) -> int:
        return self._answer.write_parquet(path)


@asynccontextmanager
async def open_history(wanted: Wanted) -> AsyncGenerator[History]:
    """The file named, or this log's own, brought up to the log's end."""
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
        yield _FileHistory(reader)


async def position_of(wanted: Wanted, history: History) -> int | None:
    """The position that --as-of names; None: now. Raises InvalidRequest."""
    return await history.position(wanted.as_of) if wanted.as_of else None


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
