"""What the archive takes and gives back: `python -m tests.bench.history_archive TASKS`.

Bytes an event in it, events a second out of it, and the server's memory and disk while a log
of any length is archived and trimmed, a million tasks at a time. Says how far it is on standard
error, and prints one JSON object. The log of the full figure, 30 million events, takes some ten
minutes and 6 GB of memory: `python -m tests.bench.history_archive 10000000`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import psutil
import uvloop
from msgspec import Struct

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.objects.jetstream import ObjectStore
from agentflow_nodes.namespaces import collect_garbage_seldom
from agentflow_projections.archive import Archive
from agentflow_projections.archive_load import load
from agentflow_projections.archiver import Archiver, Keep
from agentflow_projections.database import Database
from tests.bench.history_replay import NAMESPACE, _append, write
from tests.servers import NatsServer

_KEEP: Final = Keep(bytes=1024 * 1024, young_s=0.0)
_ROUND_TASKS: Final = 1_000_000
_MB: Final = 2**20


class _Archived(Struct):
    """What was seen while a log was written, archived and trimmed."""

    events: int = 0
    seq: int = 0
    archiving_s: float = 0.0
    rss_mb: float = 0.0
    """The most the server took before a trim."""
    log_mb: float = 0.0
    """The longest the log was."""


def _size(folder: Path) -> int:
    """Bytes of the tables; a state of the fold is as large as what is open, not as the log."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


async def _archive(
    server: NatsServer, bus: Bus, log: JetStreamLog, archive: Archive, tasks: int
) -> _Archived:
    """Write a log, a part at a time; archive and trim each."""
    found = _Archived()
    writer = await write(log, 0)
    async with Archiver(log, archive, ObjectStore(bus, NAMESPACE), keep=_KEEP) as archiver:
        while writer.tasks < tasks:
            await _append(log, writer.work(min(writer.tasks + _ROUND_TASKS, tasks)))
            writer.state.ended.clear()
            found.rss_mb = max(found.rss_mb, _rss_mb(server))
            found.log_mb = max(found.log_mb, (await log.identity()).bytes / _MB)
            begun = time.perf_counter()
            await archiver.run(until=writer.state.seq)
            found.archiving_s += time.perf_counter() - begun
            print(
                f"{writer.tasks:,} of {tasks:,} tasks archived; the server takes {_rss_mb(server):.0f} MB",
                file=sys.stderr,
            )
    found.events, found.seq = writer.events, writer.state.seq
    return found


async def measure(tasks: int) -> dict[str, float]:
    """Write a log, archive and trim it, load the archive."""
    with tempfile.TemporaryDirectory(prefix="af-history-") as temporary:
        folder = Path(temporary)
        archive = Archive(folder / "archive", NAMESPACE)
        async with (
            NatsServer(sync="2m", folder=folder) as server,
            Bus(server.url, name="bench") as bus,
            JetStreamLog(bus, NAMESPACE) as log,
        ):
            found = await _archive(server, bus, log, archive, tasks)
            identity, trimmed_rss_mb = await log.identity(), _rss_mb(server)
        begun = time.perf_counter()
        with Database(folder / "history.duckdb", NAMESPACE, threads=2) as database:
            assert load(archive, database, identity) == found.seq
            loaded_s = time.perf_counter() - begun
        return {
            "archive_tasks": tasks,
            "archive_bytes_per_event": _size(folder / "archive") / found.events,
            "archive_written_events_per_s": found.events / found.archiving_s,
            "archive_events_per_s": found.events / loaded_s,
            "untrimmed_server_rss_mb": found.rss_mb,
            "untrimmed_log_mb": found.log_mb,
            "trimmed_server_rss_mb": trimmed_rss_mb,
            "trimmed_log_mb": identity.bytes / _MB,
        }


def _rss_mb(server: NatsServer) -> float:
    rss: int = psutil.Process(server.pid).memory_info().rss
    return rss / _MB


def main() -> None:
    """Print the figures as JSON."""
    collect_garbage_seldom()
    print(json.dumps(uvloop.run(measure(int(sys.argv[1])))))


if __name__ == "__main__":
    main()
