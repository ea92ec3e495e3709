"""Celery on Redis.

Tried by hand on two busy cores (tasks/s, 5,000 tasks): prefork with one child per core
1,100; prefork with two per core 1,050; a thread pool in one or two processes 1,000 to 1,200; one
`solo` worker per core 1,550 to 1,850, the best, because the worker hands nothing over a pipe to
a child. Prefetch: 4 1,500, 64 to 1,000 about the same and a little more, so the 128 that the
guide to optimising names for short tasks. JSON beats msgpack (1,100). `group` costs a result
set and wins nothing over one pooled producer (1,720 to 1,850). A Redis result backend was
equal or slower, so results are off and completions counted as `tally` says. `chunks` is left
out: it makes one task of many. The C parser hiredis changed nothing measurable.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Final

from celery import Celery  # type: ignore[import-untyped,unused-ignore]  # Celery has no types

from tests.bench.conditions import cores
from tests.bench.peers.processes import redis_server, worker
from tests.bench.peers.tally import completed, wait_for_completions

PACKAGES = ("celery", "kombu", "redis")
TASKS = 10_000
SETTINGS = (
    f"Redis broker, {cores()} workers (one per core, solo pool), prefetch 128, early ack, JSON,"
    " no events, gossip, mingle or heartbeat, one pooled producer; results off, completions counted"
    " in shared memory"
)

_OPTIONS: Final = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")

app = Celery("peer")
app.conf.update(
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    task_acks_late=False,
    task_ignore_result=True,
    task_send_sent_event=False,
    task_serializer="json",
    worker_disable_rate_limits=True,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=128,
    worker_send_task_events=False,
)


@app.task(name="noop")  # type: ignore[untyped-decorator]  # Celery has no types
def noop() -> None:
    """Do nothing but be counted."""
    completed()


def measure(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit to the last completion."""
    with contextlib.ExitStack() as stack:
        tally = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer-tally-")))
        url = stack.enter_context(redis_server())
        app.conf.broker_url = url
        workers = [
            stack.enter_context(worker("celery", *_arguments(url, number), broker_url=url, tally=tally))
            for number in range(cores())
        ]
        _submit(warm_up)
        wait_for_completions(tally, warm_up, workers)
        before = time.perf_counter()
        _submit(tasks)
        wait_for_completions(tally, warm_up + tasks, workers)
        return time.perf_counter() - before


def _arguments(url: str, number: int) -> tuple[str, ...]:
    return ("-A", __name__, "-b", url, "worker", "--pool", "solo", "--hostname", f"w{number}", *_OPTIONS)


def _submit(tasks: int) -> None:
    with app.producer_or_acquire() as producer:
        for _ in range(tasks):
            noop.apply_async(producer=producer, retry=False)
