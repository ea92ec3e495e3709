"""What the archive takes and gives back: `python -m tests.bench.history_archive TASKS`.

Bytes an event in it, events a second out of it, and the server's memory once the log is
trimmed. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import psutil
import uvloop

from agentflow.bus import Bus
from agentflow.log.jetstream import JetStreamLog
from agentflow.objects.jetstream import ObjectStore
from agentflow_projections.archive import Archive
from agentflow_projections.archive_load import load
from agentflow_projections.archiver import Archiver, Keep
from agentflow_projections.database import Database
from tests.bench.history_replay import NAMESPACE, write
from tests.servers import NatsServer

_KEEP: Final = Keep(bytes=1024 * 1024, young_s=0.0)


def _size(folder: Path) -> int:
    """Bytes of the tables; a state of the fold is as large as what is open, not as the log."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


async def measure(tasks: int) -> dict[str, float]:
    """Write a log, archive it, load the archive, trim the log."""
    with tempfile.TemporaryDirectory(prefix="af-history-") as temporary:
        folder = Path(temporary)
        async with (
            NatsServer(sync="2m") as server,
            Bus(server.url, name="bench") as bus,
            JetStreamLog(bus, NAMESPACE) as log,
        ):
            writer = await write(log, tasks)
            archive = Archive(folder / "archive", NAMESPACE)
            begun = time.perf_counter()
            async with Archiver(log, archive, ObjectStore(bus, NAMESPACE), keep=_KEEP) as archiver:
                await archiver.run(until=writer.state.seq)
                archived_s = time.perf_counter() - begun
                before = _rss_mb(server)
                await archiver.trim()
            identity = await log.identity()
            begun = time.perf_counter()
            with Database(folder / "history.duckdb", NAMESPACE, threads=2) as database:
                assert load(archive, database, identity) == writer.state.seq
                loaded_s = time.perf_counter() - begun
            return {
                "archive_tasks": tasks,
                "archive_bytes_per_event": _size(folder / "archive") / writer.events,
                "archive_written_events_per_s": writer.events / archived_s,
                "archive_events_per_s": writer.events / loaded_s,
                "untrimmed_server_rss_mb": before,
                "trimmed_server_rss_mb": _rss_mb(server),
                "trimmed_log_mb": identity.bytes / 2**20,
            }


def _rss_mb(server: NatsServer) -> float:
    rss: int = psutil.Process(server.pid).memory_info().rss
    return rss / 2**20


def main() -> None:
    """Print the figures as JSON."""
    gc.set_threshold(100_000, 20, 100)
    print(json.dumps(uvloop.run(measure(int(sys.argv[1])))))


if __name__ == "__main__":
    main()
