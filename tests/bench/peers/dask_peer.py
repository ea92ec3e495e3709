"""Dask distributed: a LocalCluster of processes.

Tried by hand on two busy cores (tasks/s, 6,000 to 10,000 tasks): the defaults, one process per core
of one thread, 600; four threads each 1,100 to 1,500; one process of two threads 500. What holds
it back is that the scheduler sends a worker little more than it has threads for
(`worker-saturation` 1.1), and each task then waits for a round trip. Without that limit: 2,050 to
2,900; with `map` also sending the graph in batches of 1,000 2,900 to 3,400, the best. Four threads
each, no stealing, no profiling, or workers as threads of the scheduler's process: no more than
that. Dask has no broker and nothing durable.

Recorded: results stay in the workers' memory, which is where Dask records them, and `gather` brings
them to the client. Unrecorded: `wait` for the futures, their completion as the scheduler tells the
client, without their values.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import dask
from distributed import Client, Future, LocalCluster, wait

from tests.bench.conditions import cores
from tests.bench.peers.way import RECORDED, UNRECORDED, Way, check

PACKAGES = ("dask", "distributed", "tornado", "msgpack")
_BATCH: Final = 1000


def echo(number: int) -> int:
    """Give back what it was given."""
    return number


def noop(_number: int) -> None:
    """Do nothing."""


def measure_recorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the client has every result."""
    with _cluster() as client:
        check(_echo_all(client, warm_up))
        before = time.perf_counter()
        outcomes = _echo_all(client, tasks)
        seconds = time.perf_counter() - before
        check(outcomes)
        return seconds


def measure_unrecorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the client knows that every task has finished."""
    with _cluster() as client:
        _expect_finished(_run_noops(client, warm_up))
        before = time.perf_counter()
        futures = _run_noops(client, tasks)
        seconds = time.perf_counter() - before
        _expect_finished(futures)
        return seconds


@contextlib.contextmanager
def _cluster() -> Iterator[Client]:
    options = {"n_workers": cores(), "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.worker-saturation": float("inf")}),
        LocalCluster(**options) as cluster,  # type: ignore[no-untyped-call]  # no types
        Client(cluster) as client,  # type: ignore[no-untyped-call]  # no types
    ):
        yield client


def _echo_all(client: Client, tasks: int) -> list[int]:
    futures = client.map(echo, range(tasks), pure=False, batch_size=_BATCH)
    outcomes: list[int] = client.gather(futures)  # type: ignore[no-untyped-call]  # no types
    return outcomes


def _run_noops(client: Client, tasks: int) -> list[Future[None]]:
    futures: list[Future[None]] = client.map(noop, range(tasks), pure=False, batch_size=_BATCH)
    wait(futures)  # type: ignore[no-untyped-call]  # no types
    return futures


def _expect_finished(futures: list[Future[None]]) -> None:
    failed = sum(future.status != "finished" for future in futures)
    assert not failed, f"{failed} of {len(futures)} tasks failed"


_BASE: Final = (
    f"LocalCluster, {cores()} processes (one per core) of 1 thread, worker-saturation inf, client.map in"
    f" batches of {_BATCH}, no dashboard"
)
WAYS = {
    RECORDED: Way(
        measure_recorded, 8_000, f"{_BASE}; results in the workers' memory, gathered by the client"
    ),
    UNRECORDED: Way(
        measure_unrecorded, 10_000, f"{_BASE}; the client waits for its futures, not their values"
    ),
}
