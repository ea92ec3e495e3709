"""The histories that masters kept during a run, compared with what the recorded log makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

from agentflow.domain.state import Namespace
from agentflow.log.port import Message
from agentflow_projections.database import Database, DatabaseLocked
from agentflow_projections.hydrate import history_path
from agentflow_projections.replay import asking, verify
from tests.chaos.options import NAMESPACE
from tests.chaos.record import recorded

PREFIX: Final = "history-"
"""What the folder of a master's history begins with."""
_UNLOCKED_WITHIN_S: Final = 15.0
_LOOK_S: Final = 0.1


class Compared(Struct, frozen=True):
    """A table of a history."""

    folder: str
    table: str
    rows: int
    """As the log has it."""
    wrong: str
    """Empty: it is what the log says."""


class RecordedPast:
    """The log of a run, as it was recorded."""

    namespace = NAMESPACE

    def __init__(self, folder: Path) -> None:
        self._messages = list(recorded(folder))

    @property
    def last_seq(self) -> int:
        return self._messages[-1].seq

    def begin(self) -> Namespace:
        return Namespace(self.namespace)

    async def messages(self, after: int) -> AsyncGenerator[Sequence[Message], None]:
        yield [each for each in self._messages if each.seq > after]


def compared(folder: Path) -> Iterator[Compared]:
    """Each table of each history in a run's folder."""
    for kept in sorted(folder.glob(f"{PREFIX}*")):
        with _opened(history_path(kept, NAMESPACE)) as found:
            verified = asyncio.run(verify(RecordedPast(folder), asking(found)))
        wrong = {
            each.table: f"{each.found_rows} rows, expected {each.expected_rows}; differs at {verified.differs_at}"
            for each in verified.differences
        }
        for table, rows in {**dict.fromkeys(wrong, 0), **verified.tables}.items():
            yield Compared(kept.name, table, rows, wrong.get(table, ""))
        other_chain = verified.seq > 0 and not verified.chain
        yield Compared(kept.name, "checkpoint", 1, "another chain" if other_chain else "")


@contextmanager
def _opened(path: Path) -> Generator[Database]:
    """Whoever was killed with it open, or was started beside, lets go of it soon."""
    deadline = time.monotonic() + _UNLOCKED_WITHIN_S
    database = Database(path, NAMESPACE)
    while True:
        try:
            database.__enter__()
            break
        except DatabaseLocked:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)
    try:
        yield database
    finally:
        database.__exit__(None, None, None)
