"""The same tasks in event stores that one would pick instead: `python -m tests.bench.peers.history_stores TASKS`.

The `eventsourcing` library on SQLite and on PostgreSQL, and PostgreSQL alone with one table;
AgentFlow's own file of the same tasks is asked the same. Prints one JSON object. PostgreSQL is
left out if it is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from agentflow.frames import decode_any
from agentflow_projections.database import Database
from agentflow_projections.query import Question, Reader
from tests.bench.history_file import Building, timed
from tests.bench.history_log import Writer
from tests.bench.history_replay import NAMESPACE
from tests.servers import free_port

_SAVE = 100
"""Tasks saved in one transaction."""
_PAGE = 1_000


class Task(Aggregate):
    """A task as the library keeps it."""

    @event("Submitted")
    def __init__(self, function: str, number: int) -> None:
        self.function, self.number, self.state = function, number, "ready"

    @event("Assigned")
    def assign(self, worker: str) -> None:
        self.worker, self.state = worker, "running"

    @event("Completed")
    def complete(self, run_us: int) -> None:
        self.run_us, self.state = run_us, "completed"


def eventsourcing_figures(name: str, environment: dict[str, str], tasks: int) -> dict[str, float]:
    """Events written and read back, with the library's own aggregates and notification log."""
    app = Application(env=environment)
    begun = time.perf_counter()
    for start in range(0, tasks, _SAVE):
        batch = [Task("bench.noop", number) for number in range(start, start + _SAVE)]
        app.save(*batch)
        for task in batch:
            task.assign("w1")
        app.save(*batch)
        for task in batch:
            task.complete(5)
        app.save(*batch)
    written_s = time.perf_counter() - begun
    begun, known, read, events = time.perf_counter(), {}, 1, 0
    while notifications := app.recorder.select_notifications(read, _PAGE):
        for each in notifications:
            said = app.mapper.to_domain_event(each)
            known[said.originator_id] = said.mutate(known.get(said.originator_id))
        events += len(notifications)
        read = notifications[-1].id + 1
    read_s = time.perf_counter() - begun
    app.close()
    assert events == 3 * tasks, events
    assert all(task.state == "completed" for task in known.values())
    return {f"{name}_write_per_s": events / written_s, f"{name}_replay_per_s": events / read_s}


@contextmanager
def postgres(folder: Path) -> Iterator[dict[str, Any]]:
    """A PostgreSQL of its own, with its own defaults; how to connect to it."""
    user = "postgres" if os.geteuid() == 0 else None
    data, port = folder / "pg", free_port()
    data.mkdir()
    if user is not None:
        folder.chmod(0o755)
        shutil.chown(data, user)
    programs = _programs()
    options: dict[str, Any] = {
        "user": user,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "cwd": data,
    }
    subprocess.run([programs / "initdb", "-D", data, "-U", "bench", "-A", "trust"], check=True, **options)
    server = subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port), "-k", data], **options)
    try:
        to = {"host": "127.0.0.1", "port": port, "user": "bench", "dbname": "postgres"}
        _wait_for(to)
        yield to
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for connections that somebody keeps
        server.wait()


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    beside = shutil.which("initdb")
    return Path(beside).parent if beside else found[-1].parent


def _has_postgres() -> bool:
    return bool(shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb")))


def _wait_for(to: dict[str, Any]) -> None:
    for _ in range(100):
        try:
            psycopg.connect(**to).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("PostgreSQL did not start")


def one_table(to: dict[str, Any], events: list[tuple[int, int, str, str, str]]) -> dict[str, float]:
    """Events in one table of PostgreSQL, read in order, and asked for the states as of the middle."""
    with psycopg.connect(**to) as connection:
        connection.execute(
            "CREATE TABLE events (seq bigint, index int, kind text, id text, body jsonb, PRIMARY KEY (seq, index))"
        )
        begun = time.perf_counter()
        with connection.cursor().copy("COPY events FROM STDIN") as copy:
            for row in events:
                copy.write_row(row)
        connection.commit()
        written_s = time.perf_counter() - begun
        connection.execute("CREATE INDEX ON events (id, seq, index)")
        connection.execute("ANALYZE events")
        begun, read = time.perf_counter(), 0
        with connection.cursor(name="replay") as cursor:
            cursor.itersize = _PAGE
            for _ in cursor.execute("SELECT seq, index, kind, id, body FROM events ORDER BY seq, index"):
                read += 1
        read_s = time.perf_counter() - begun
        assert read == len(events)
        begun = time.perf_counter()
        query = """SELECT kind, count(*) FROM (
                       SELECT DISTINCT ON (id) id, kind FROM events WHERE seq <= %s ORDER BY id, seq DESC, index DESC
                   ) AS latest GROUP BY kind"""
        assert connection.execute(query, (events[len(events) // 2][0],)).fetchall()
        as_of_s = time.perf_counter() - begun
    return {
        "postgres_write_per_s": len(events) / written_s,
        "postgres_replay_per_s": len(events) / read_s,
        "postgres_as_of_s": as_of_s,
    }


def ours(folder: Path, tasks: int) -> tuple[list[tuple[int, int, str, str, str]], dict[str, float]]:
    """AgentFlow's events of the same tasks, and what its file says as of the middle."""
    path, events = folder / "history.duckdb", []
    with Database(path, NAMESPACE) as database:
        building = Building(database)
        writer = Writer(building.recorder.state, building.take, begin_ns=1_750_000_000_000_000_000)
        for message in (*writer.begin(), *writer.work(tasks)):
            kind = ".".join(message.subject.split(".")[2:4])
            if kind.startswith("task."):
                for index, body in enumerate(decode_any(message.data)):
                    events.append((message.seq, index, kind, body["id"], json.dumps(body)))
        building.commit()
    with Reader(path) as reader:
        query = "SELECT state, count(*) FROM tasks GROUP BY state"
        took, rows = timed(reader, Question(query, as_of=events[len(events) // 2][0]))
    assert rows
    return events, {"agentflow_as_of_s": took}


def measure(tasks: int) -> dict[str, float]:
    """Everything that is installed here."""
    found: dict[str, float] = {"peers_tasks": tasks}
    with tempfile.TemporaryDirectory(prefix="af-history-") as temporary:
        folder = Path(temporary)
        events, said = ours(folder, tasks)
        found.update(said)
        sqlite = {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": str(folder / "events.sqlite"),
        }
        found.update(eventsourcing_figures("eventsourcing_sqlite", sqlite, tasks))
        if _has_postgres():
            with postgres(folder) as to:
                found.update(one_table(to, events))
                environment = {
                    "PERSISTENCE_MODULE": "eventsourcing.postgres",
                    "POSTGRES_DBNAME": to["dbname"],
                    "POSTGRES_HOST": to["host"],
                    "POSTGRES_PORT": str(to["port"]),
                    "POSTGRES_USER": to["user"],
                    "POSTGRES_PASSWORD": "unused",
                }
                found.update(eventsourcing_figures("eventsourcing_postgres", environment, tasks))
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
