"""`just bench-history`: what history costs and answers, beside event stores one would pick instead.

With names, only those figures; the last line is one JSON object:

    python -m tests.bench.bench_history [NAME ...] [--quick] [--tasks N] [--events N] [--keep DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.table import Table

from tests.bench.conditions import command_version, conditions
from tests.bench.history_live import beside_noop
from tests.bench.results import Targets, figures_table, measure_named, print_last_line, show
from tests.bench.stack import ROOT

FSYNC: Final = (
    "beside the cluster: nats-server fsyncs each write; replay only reads; DuckDB fsyncs each commit; "
    "SQLite and PostgreSQL as they come"
)
_QUICK: Final = {"tasks": 20_000, "events": 300_000, "noop": 20_000, "peers": 10_000, "runs": 1}
_FULL: Final = {"tasks": 1_000_000, "events": 10_000_000, "noop": 200_000, "peers": 100_000, "runs": 3}

TARGETS: Final[Targets] = {
    "replay_events_per_s": (
        "replay: live JetStream, fold, fresh file, all tables; events/s",
        200_000,
        True,
    ),
    "replay_cpu_us_per_event": ("its CPU, µs an event, second process included", None, False),
    "replay_file_bytes_per_event": ("the file, bytes an event", None, False),
    "lag_p99_ms": ("kept by the master under the no-op benchmark: lag p99, ms", 500, False),
    "projector_cpu_us_per_task": ("CPU it adds to the cluster, µs a task", 12, False),
    "noop_with_projector_per_s": ("no-op tasks/s with it", 40_000, True),
    "noop_without_history_per_s": ("no-op tasks/s without a history", None, True),
    "point_query_p99_ms": ("a task's states asked meanwhile, p99, ms", 50, False),
    "beside_lag_p99_ms": ("by a projector beside: lag p99, ms", None, False),
    "beside_cpu_us_per_task": ("CPU of that projector, µs a task", None, False),
    "beside_noop_per_s": ("no-op tasks/s beside it", None, True),
    "history_events": ("a long history: events", None, True),
    "history_bytes_per_event": ("its file, bytes an event", None, False),
    "hydrate_s": ("a master has its state, s", 2, False),
    "query_max_s": ("slowest ready-made query, s", 1, False),
    "as_of_s": ("slowest question as of a position, s", 1, False),
    "archive_bytes_per_event": ("archive in Parquet, all tables, bytes an event", 20, False),
    "archive_events_per_s": ("history loaded from the archive, events/s", 1_000_000, True),
    "archive_written_events_per_s": ("archived, events/s", None, True),
    "untrimmed_server_rss_mb": ("nats-server before the trim, MB", None, False),
    "trimmed_server_rss_mb": ("nats-server after the trim, MB", 300, False),
    "eventsourcing_sqlite_replay_per_s": ("eventsourcing on SQLite: events read and applied/s", None, True),
    "eventsourcing_sqlite_write_per_s": ("the same, events written/s", None, True),
    "eventsourcing_postgres_replay_per_s": (
        "eventsourcing on PostgreSQL: events read and applied/s",
        None,
        True,
    ),
    "eventsourcing_postgres_write_per_s": ("the same, events written/s", None, True),
    "postgres_replay_per_s": ("PostgreSQL, one table: events read in order/s", None, True),
    "postgres_as_of_s": ("PostgreSQL, one table: states as of a position, s", None, False),
    "agentflow_as_of_s": ("AgentFlow, the same events: states as of a position, s", None, False),
}

Figures = dict[str, Any]


async def _run(*argv: str) -> Figures:
    """The JSON that a bench in a process of its own prints last."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *argv,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, f"{argv[0]} ended with {process.returncode}"
    found: Figures = json.loads(output.splitlines()[-1])
    return found


def figures(sizes: dict[str, int], folder: Path) -> dict[str, Callable[[], Awaitable[Figures]]]:
    """All that can be measured, by name."""
    return {
        "replay": partial(_run, "tests.bench.history_replay", str(sizes["tasks"])),
        "file": partial(_run, "tests.bench.history_file", str(sizes["events"]), str(folder)),
        "live": partial(beside_noop, sizes["noop"], sizes["runs"]),
        "archive": partial(_run, "tests.bench.history_archive", str(sizes["tasks"])),
        "peers": partial(_run, "tests.bench.peers.history_stores", str(sizes["peers"])),
    }


def each_query(found: Figures) -> Table:
    """How long each question took."""
    shown = Table("question", "s", title="Asked of the long history")
    for key in ("queries_s", "as_of_each_s"):
        for name, took in found.get(key, {}).items():
            shown.add_row(name if key == "queries_s" else f"as of: {name}", f"{took:.3f}")
    return shown


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="replay, file, live, archive, peers; none: all")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it work?")
    parser.add_argument("--tasks", type=int, help="tasks in the log that is replayed")
    parser.add_argument("--events", type=int, help="events in the long history")
    parser.add_argument("--keep", type=Path, help="folder that keeps the long history for the next time")
    return parser.parse_args()


def main() -> None:
    """Measure, print the conditions, the tables, and as the last line the JSON object."""
    given = _parsed()
    sizes = dict(_QUICK if given.quick else _FULL)
    sizes.update({name: getattr(given, name) for name in ("tasks", "events") if getattr(given, name)})
    before = conditions(fsync=FSYNC, packages=("pyarrow", "eventsourcing", "psycopg"))
    before["postgres"] = command_version("postgres", "--version")
    with tempfile.TemporaryDirectory(prefix="af-history-") as temporary:
        folder = given.keep or Path(temporary)
        found = uvloop.run(measure_named(figures(sizes, folder), given.names, Console(stderr=True)))
    queries = (each_query(found),) if "queries_s" in found else ()
    show(before, figures_table("History", TARGETS, found), *queries)
    print_last_line(found, before)


if __name__ == "__main__":
    main()
