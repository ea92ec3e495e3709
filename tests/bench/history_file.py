"""What a long history answers, and how fast a master begins with it.

    python -m tests.bench.history_file EVENTS FOLDER     builds the file; FOLDER keeps it for the next time

Prints one JSON object. The log is a mixed one: failures, retries, workflows, four workers; the
last thousand tasks are open. What is asked is asked of a process that has just opened the file.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from agentflow.domain.state import Namespace
from agentflow.log.port import Identity, Message
from agentflow_nodes.namespaces import collect_garbage_seldom
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.hydrate import StateFile, history_path, hydrate
from agentflow_projections.queries import Ready, ready_made
from agentflow_projections.query import Question, Reader
from agentflow_projections.rows import Recorder
from tests.bench.history_log import Writer
from tests.bench.history_replay import NAMESPACE

OPEN: Final = 1_000
_STREAM: Final = "AF_default"
_BEGIN_NS: Final = 1_750_000_000_000_000_000
_BATCH_ROWS: Final = 200_000
_MOMENTS: Final = (0.02, 0.3, 0.5, 0.8, 1.0)
"""Places in the history it is asked about, as shares of it."""
AS_OF: Final = {
    "tasks by state": "SELECT state, count(*) FROM tasks GROUP BY state",
    "queue depth": "SELECT count(*) FROM queue",
    "what runs where": "SELECT worker, count(*) FROM attempts WHERE outcome = 'running' GROUP BY worker",
    "who leads": "SELECT master FROM leaders WHERE leads",
    "who is there": "SELECT name, state FROM workers",
    "who holds locks": "SELECT name, holder FROM locks WHERE state = 'held'",
}


class Building:
    """A file in the making: what a projector would write, without a log in between."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.recorder = Recorder(Namespace(NAMESPACE))
        self.chain = START

    def take(self, message: Message) -> None:
        self.recorder.apply(message)
        self.recorder.state.ended.clear()
        self.chain = chained(self.chain, message)
        if self.recorder.size >= _BATCH_ROWS:
            self.commit()

    def commit(self) -> None:
        state = self.recorder.state
        checkpoint = Checkpoint(_STREAM, 1, 1, state.seq, self.chain)
        self.database.commit(self.recorder.take(), checkpoint, at_ms=state.clock_ms)


def build(folder: Path, events: int) -> None:
    """A history of about so many events, and the state beside it."""
    path = history_path(folder, NAMESPACE)
    with Database(path, NAMESPACE) as database:
        building = Building(database)
        state = building.recorder.state
        writer = Writer(state, building.take, begin_ns=_BEGIN_NS, mixed=True)
        for _ in writer.begin():
            pass
        for _ in writer.work(events // 3, leave=OPEN):
            pass
        building.commit()
    kept = StateFile(path, NAMESPACE)
    kept.write(kept.prepare(state, (_STREAM, 1), building.chain))


def timed(reader: Reader, question: Question) -> tuple[float, int]:
    """Seconds to the last row of an answer, and how many rows there are."""
    begun = time.perf_counter()
    with reader.ask(question) as answer:
        rows = sum(len(batch) for batch in answer.rows())
    return time.perf_counter() - begun, rows


def _one(reader: Reader, query: str) -> Any:
    with reader.ask(Question(query)) as answer:
        return next(answer.rows())[0][0]


def ready_made_queries(reader: Reader) -> dict[str, float]:
    """Seconds that each ready-made query takes, the first time."""
    middle = "SELECT id FROM {} LIMIT 1 OFFSET (SELECT count(*) // 2 FROM {})"
    known = {
        "task": _one(reader, middle.format("task_submissions", "task_submissions")),
        "workflow": _one(reader, middle.format("workflow_submissions", "workflow_submissions")),
    }
    took = {}
    for name, ready in ready_made().items():
        took[name], rows = timed(reader, _asked(ready, known))
        assert rows or name == "locks", f"{name} answered nothing"
    return took


def _asked(ready: Ready, known: dict[str, Any]) -> Question:
    return ready.question({each.name: known[each.name] for each in ready.parameters if each.required})


def as_of(reader: Reader) -> dict[str, float]:
    """Seconds each question takes as of any of some positions, at worst."""
    last = reader.position
    return {
        name: max(timed(reader, Question(query, as_of=max(1, int(last * share))))[0] for share in _MOMENTS)
        for name, query in AS_OF.items()
    }


def hydrated(folder: Path) -> float:
    """Seconds until a master has its history open and its state."""
    collect_garbage_seldom()
    identity = Identity(_STREAM, 1, 1, 1 << 40, 1, 0, -1)
    begun = time.perf_counter()
    with Database(history_path(folder, NAMESPACE), NAMESPACE) as database:
        checkpoint = database.checkpoint()
        kept = hydrate(folder, identity, NAMESPACE)
        took = time.perf_counter() - begun
    assert kept is not None
    assert checkpoint is not None
    assert kept.seq == checkpoint.seq
    assert len(kept.state.tasks) == OPEN
    return took


def measure(folder: Path, events: int) -> dict[str, Any]:
    """Build the file if it is not there, and ask."""
    path = history_path(folder, NAMESPACE)
    begun = time.perf_counter()
    if not path.exists():
        build(folder, events)
    built_s = time.perf_counter() - begun
    gc.collect()
    with Reader(path) as reader:
        found = _one(reader, "SELECT sum(events) FROM frames")
        queries = ready_made_queries(reader)
        moments = as_of(reader)
    return {
        "history_events": found,
        "history_built_s": built_s,
        "history_bytes_per_event": path.stat().st_size / found,
        "hydrate_s": hydrated(folder),
        "query_max_s": max(queries.values()),
        "as_of_s": max(moments.values()),
        "queries_s": queries,
        "as_of_each_s": moments,
    }


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[1]))))


if __name__ == "__main__":
    main()
