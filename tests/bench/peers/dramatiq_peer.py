"""Dramatiq on Redis.

Tried by hand on two busy cores (tasks/s, 8,000 to 10,000 tasks): the defaults, one process
per core with 8 threads, 4,200; twice the processes 3,900 to 4,100; 16 threads 3,600 to 4,100; one
thread per process with the default prefetch of two messages only 540, as the worker then sleeps
between fetches; one thread per process with a prefetch of 256 4,500 to 6,800, the best, since
threads only fight for the interpreter when a task does nothing; prefetch 64 and 1,000 a little
less; one process 4,500; three processes 5,100 to 5,600. `group` wins nothing over `send`. No
result store (it writes three commands a task); completions are counted as `tally` says. The
default middleware stays: without it Dramatiq neither retries nor enforces time limits.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tests.bench.conditions import cores
from tests.bench.peers.processes import BROKER_VARIABLE, redis_server, worker
from tests.bench.peers.tally import completed, wait_for_completions

PACKAGES = ("dramatiq", "redis")
TASKS = 40_000
_PREFETCH: Final = 256
SETTINGS = (
    f"Redis broker, {cores()} processes (one per core) of 1 thread, queue prefetch {_PREFETCH}, default"
    " middleware; no result store, completions counted in shared memory"
)


def make_actor(url: str) -> dramatiq.Actor[Any, Any]:
    """The no-op of a broker at that address, which becomes the process's broker."""
    broker = RedisBroker(url=url)  # type: ignore[no-untyped-call]  # Dramatiq's brokers have no types
    dramatiq.set_broker(broker)
    return dramatiq.actor(actor_name="noop", broker=broker)(completed)


def make_broker() -> None:
    """What the command line of Dramatiq calls in each worker process."""
    make_actor(os.environ[BROKER_VARIABLE])


def measure(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit to the last completion."""
    # The worker reads its prefetch from the environment only; it inherits ours.
    os.environ["dramatiq_queue_prefetch"] = str(_PREFETCH)  # noqa: SIM112  the name is Dramatiq's
    with contextlib.ExitStack() as stack:
        tally = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer-tally-")))
        url = stack.enter_context(redis_server())
        workers = [stack.enter_context(worker("dramatiq", *_arguments(), broker_url=url, tally=tally))]
        noop = make_actor(url)
        _submit(noop, warm_up)
        wait_for_completions(tally, warm_up, workers)
        before = time.perf_counter()
        _submit(noop, tasks)
        wait_for_completions(tally, warm_up + tasks, workers)
        return time.perf_counter() - before


def _arguments() -> tuple[str, ...]:
    return (f"{__name__}:make_broker", "--processes", str(cores()), "--threads", "1", "--skip-logging")


def _submit(noop: dramatiq.Actor[Any, Any], tasks: int) -> None:
    for _ in range(tasks):
        noop.send()
