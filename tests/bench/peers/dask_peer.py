"""Dask distributed: a LocalCluster of processes.

Tried by hand on two busy cores (tasks/s, 6,000 to 10,000 tasks): the defaults, one process per core
of one thread, 600; four threads each 1,100 to 1,500; one process of two threads 500. What holds
it back is that the scheduler sends a worker little more than it has threads for
(`worker-saturation` 1.1), and each task then waits for a round trip. Without that limit: 2,050 to
2,900; with `map` also sending the graph in batches of 1,000 2,900 to 3,400, the best. Four threads
each, no stealing, no profiling, or workers as threads of the scheduler's process: no more than
that. `wait` on the futures is as fast as `gather` or faster, and is their completion as the
scheduler tells the client. Dask has no broker and nothing durable.
"""

from __future__ import annotations

import time

import dask
from distributed import Client, Future, LocalCluster, wait

from tests.bench.conditions import cores

PACKAGES = ("dask", "distributed", "tornado", "msgpack")
TASKS = 20_000
_BATCH = 1000
SETTINGS = (
    f"LocalCluster, {cores()} processes (one per core) of 1 thread, worker-saturation inf, client.map in"
    f" batches of {_BATCH}, no dashboard; completions are the client's futures; nothing on disk"
)


def noop(_number: int) -> None:
    """Do nothing."""


def measure(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit to the last completion."""
    options = {"n_workers": cores(), "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.worker-saturation": float("inf")}),
        LocalCluster(**options) as cluster,  # type: ignore[no-untyped-call]  # no types
        Client(cluster) as client,  # type: ignore[no-untyped-call]  # no types
    ):
        _check(_run(client, warm_up))
        before = time.perf_counter()
        futures = _run(client, tasks)
        seconds = time.perf_counter() - before
        _check(futures)
        return seconds


def _run(client: Client, tasks: int) -> list[Future[None]]:
    futures: list[Future[None]] = client.map(noop, range(tasks), pure=False, batch_size=_BATCH)
    wait(futures)  # type: ignore[no-untyped-call]  # no types
    return futures


def _check(futures: list[Future[None]]) -> None:
    failed = sum(future.status != "finished" for future in futures)
    assert not failed, f"{failed} of {len(futures)} tasks failed"
