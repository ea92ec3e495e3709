"""A worker's own view: what it was assigned and what it reported, in a small DuckDB file.

It is made of the log like any projection, of the messages that concern one worker. So a
worker that starts again, whatever ended it, learns from the file and a short tail what it had in hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from agentflow import wire
from agentflow.checks import Bad
from agentflow.events import (
    Event,
    TaskAssigned,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    WorkerJoined,
)
from agentflow.frames import judge
from agentflow.log.port import Identity, Message
from agentflow_projections.database import Checkpoint, Database

KEPT_ROWS: Final = 100_000
"""Of what was reported, about so much is kept."""
_SCHEMA: Final = ("worker.sql",)
_OUTCOMES: Final = {
    TaskCompleted: "completed",
    TaskFailed: "failed",
    TaskDeclined: "declined",
}
_KINDS: Final = (
    WorkerJoined.kind,
    TaskAssigned.kind,
    TaskCompleted.kind,
    TaskFailed.kind,
    TaskDeclined.kind,
)
_RUNS_SHOWN_MAX: Final = 200


class Unreported(Struct, frozen=True):
    """An attempt that an earlier incarnation was assigned and never reported."""

    task: str
    attempt: int
    runs: str
    incarnation: int


class Taken(Struct, frozen=True):
    """What is to be written in one transaction."""

    rows: dict[str, list[tuple[Any, ...]]]
    checkpoint: Checkpoint
    clock_ms: int


def subjects(namespace: str, worker: str) -> list[str]:
    """Those of the messages a view is made of."""
    return [wire.event(namespace, kind, worker) for kind in _KINDS]


class WorkerView:
    """One worker's file. A context manager, as its `Database` is."""

    def __init__(self, path: Path, namespace: str) -> None:
        self.database: Final = Database(path, namespace, schema=_SCHEMA, memory_mb=256)
        self._rows: dict[str, list[tuple[Any, ...]]] = {"joins": [], "assigned": [], "reported": []}
        self._checkpoint = Checkpoint("", 0, 0, 0, b"")
        self._clock_ms = 0
        self._since_trim = 0
        self._trim_before = 0
        """What was reported before this position is forgotten next."""

    @property
    def seq(self) -> int:
        """Everything about the worker up to this sequence is in the file, or about to be."""
        return self._checkpoint.seq

    @property
    def size(self) -> int:
        """Rows not yet in the file."""
        return sum(map(len, self._rows.values()))

    def open(self, identity: Identity) -> None:
        """Take up where the file left off; of another log, it is begun anew."""
        found = self.database.checkpoint()
        fault = found.fault(identity) if found is not None else ""
        if fault:
            self.database.begin_anew(fault)
            found = None
        self._checkpoint = found or Checkpoint(identity.name, identity.created_ns, 1, 0, b"")

    def read(self, message: Message) -> None:
        """Take a message in."""
        self._checkpoint = replace(self._checkpoint, seq=message.seq)
        self._clock_ms = max(self._clock_ms, message.time_ns // 1_000_000)
        for item in judge(message.subject, message.data, message.headers).items:
            if not isinstance(item, Bad):
                self._enter(item, message.seq)

    def _enter(self, event: Event, seq: int) -> None:
        at_ms = self._clock_ms
        match event:
            case WorkerJoined():
                self._rows["joins"].append((seq, event.instance, at_ms))
            case TaskAssigned():
                runs = event.function or event.shell or "a program"
                row = (event.incarnation, event.id, event.attempt, runs[:_RUNS_SHOWN_MAX], seq, at_ms)
                self._rows["assigned"].append(row)
            case TaskCompleted() | TaskFailed() | TaskDeclined():
                outcome = _OUTCOMES[type(event)]
                row = (event.incarnation, event.id, event.attempt, outcome, seq, at_ms)
                self._rows["reported"].append(row)
            case _:
                pass

    def take(self) -> Taken:
        """What was read since the last time."""
        rows = {table: found for table, found in self._rows.items() if found}
        self._rows = {table: [] for table in self._rows}
        return Taken(rows, self._checkpoint, self._clock_ms)

    def commit(self, taken: Taken) -> None:
        """Write it, in any thread; now and then forget what was reported long ago. Raises errors of the file."""
        self.database.commit(taken.rows, taken.checkpoint, at_ms=taken.clock_ms)
        self._since_trim += sum(map(len, taken.rows.values()))
        if self._since_trim > KEPT_ROWS:
            self.database.change("worker_trim.sql", [self._trim_before])
            self._trim_before = taken.checkpoint.seq
            self._since_trim = 0

    def unreported(self, before: int) -> list[Unreported]:
        """What incarnations before this one were assigned and did not report, the oldest first."""
        query = "SELECT task, attempt, runs, incarnation FROM unreported WHERE incarnation < ?"
        return [Unreported(*row) for row in self.database.ask(query, [before]).fetchall()]
