"""taskiq-nats made as durable as AgentFlow is: nothing is acknowledged before it is on disk.

Like `taskiq_nats_peer` recorded, but JetStream has `sync_interval: always`, and the Redis that keeps
the results has an append-only file with `appendfsync always`.
"""

from __future__ import annotations

import functools

from tests.bench.peers.taskiq_nats_peer import PACKAGES, SETTINGS_RECORDED, measure_recorded
from tests.bench.peers.way import RECORDED, Way

__all__ = ["PACKAGES", "WAYS"]

WAYS = {
    RECORDED: Way(
        functools.partial(measure_recorded, fsync=True),
        5_000,
        f"{SETTINGS_RECORDED}; JetStream with sync_interval always, Redis with appendfsync always",
    )
}
