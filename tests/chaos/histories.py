"""The histories that masters kept during a run, compared with one made of the log in one go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from agentflow.domain.state import Namespace
from agentflow.log.port import Message
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, DatabaseLocked
from agentflow_projections.hydrate import history_path
from agentflow_projections.replay import asking, compare
from agentflow_projections.rows import Recorder
from tests.chaos.options import NAMESPACE
from tests.chaos.record import recorded

PREFIX: Final = "history-"
"""What the folder of a master's history begins with."""
_ROWS_MAX: Final = 200_000
_UNLOCKED_WITHIN_S: Final = 15.0


class Compared(Struct, frozen=True):
    """A table of a history."""

    folder: str
    table: str
    rows: int
    """As the log has it."""
    wrong: str
    """Empty: it is what the log says."""


def compared(folder: Path) -> Iterator[Compared]:
    """Each table of each history in a run's folder."""
    for kept in sorted(folder.glob(f"{PREFIX}*")):
        with _opened(history_path(kept, NAMESPACE)) as found, Database(None, NAMESPACE) as expected:
            checkpoint = found.checkpoint() or Checkpoint("", 0, 1, 0, START)
            chain = _project(folder, expected, checkpoint.seq)
            verified = asyncio.run(compare(asking(expected), asking(found), low=1, high=checkpoint.seq))
            wrong = {
                each.table: f"{each.found_rows} rows, expected {each.expected_rows}; differs at {verified.differs_at}"
                for each in verified.differences
            }
            for table, rows in verified.tables.items():
                yield Compared(kept.name, table, rows, wrong.pop(table, ""))
            for table, what in wrong.items():
                yield Compared(kept.name, table, 0, what)
            yield Compared(kept.name, "checkpoint", 1, "" if chain == checkpoint.chain else "another chain")


def _opened(path: Path) -> Database:
    """Whoever was killed with it open, or was started beside, lets go of it soon."""
    deadline = time.monotonic() + _UNLOCKED_WITHIN_S
    while True:
        database = Database(path, NAMESPACE)
        try:
            with database:
                return Database(path, NAMESPACE)
        except DatabaseLocked:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _project(folder: Path, database: Database, until: int) -> bytes:
    recorder, chain = Recorder(Namespace(NAMESPACE)), START
    state = recorder.state

    def commit() -> None:
        database.commit(recorder.take(), Checkpoint("", 0, 1, state.seq, chain), at_ms=state.clock_ms)

    for message in _up_to(folder, until):
        recorder.apply(message)
        state.ended.clear()
        chain = chained(chain, message)
        if recorder.size >= _ROWS_MAX:
            commit()
    commit()
    return chain


def _up_to(folder: Path, until: int) -> Iterator[Message]:
    for message in recorded(folder):
        if message.seq > until:
            return
        yield message
