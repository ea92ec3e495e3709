"""Celery on Redis.

Tried by hand on two busy cores (tasks/s, 5,000 tasks), unrecorded: prefork with one child per core
1,100; prefork with two per core 1,050; a thread pool in one or two processes 1,000 to 1,200; one
`solo` worker per core 1,550 to 1,850, the best, because the worker hands nothing over a pipe to
a child. Prefetch: 4 1,500, 64 to 1,000 about the same and a little more, so the 128 that the
guide to optimising names for short tasks. JSON beats msgpack (1,100). `group` costs a result
set and wins nothing over one pooled producer (1,720 to 1,850). `chunks` is left out: it makes one
task of many. redis-py has its C parser, hiredis, which it recommends.

Recorded, with the Redis result backend (tasks/s and CPU microseconds a task of all processes, 3,000
to 4,000 tasks, on cores that others were using as well): one producer and `ResultSet.join_native`
310 to 670, 1,950 to 2,040; `group` and `join_native` 250 to 460, a group for every thousand 310;
`get_many` of the backend, which polls with MGET, 490 to 740, 1,880; the same without the
subscription to every single result that `apply_async` makes otherwise (`denied_join_result`) 730
to 1,170, 1,540 to 1,600, the best; `join_native` without it 480; thread pools as slow as solo.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from celery import Celery  # type: ignore[import-untyped,unused-ignore]  # Celery has no types
from celery.result import AsyncResult, denied_join_result  # type: ignore[import-untyped,unused-ignore]

from tests.bench.conditions import cores
from tests.bench.peers.processes import Process, redis_server, worker
from tests.bench.peers.tally import completed, wait_for_completions
from tests.bench.peers.way import RECORDED, UNRECORDED, Way, check

PACKAGES = ("celery", "kombu", "redis", "hiredis")
_POLL_S: Final = 0.1
_OPTIONS: Final = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING")

app = Celery("peer")
app.conf.update(
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    task_acks_late=False,
    task_send_sent_event=False,
    task_serializer="json",
    worker_disable_rate_limits=True,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=128,
    worker_send_task_events=False,
)


@app.task(name="noop", ignore_result=True)  # type: ignore[untyped-decorator]  # Celery has no types
def noop() -> None:
    """Do nothing but be counted."""
    completed()


@app.task(name="echo", ignore_result=False)  # type: ignore[untyped-decorator]  # Celery has no types
def echo(number: int) -> int:
    """Give back what it was given."""
    return number


def measure_recorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the client has read every result from Redis."""
    with redis_server() as url:
        app.conf.result_backend = url
        with _workers(url, "--result-backend", url):
            check(_echo_all(warm_up))
            before = time.perf_counter()
            outcomes = _echo_all(tasks)
            seconds = time.perf_counter() - before
            check(outcomes)
            return seconds


def measure_unrecorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the last body ran."""
    with (
        tempfile.TemporaryDirectory(prefix="peer-tally-") as tally,
        redis_server() as url,
        _workers(url, tally=tally) as workers,
    ):
        _submit_noops(warm_up)
        wait_for_completions(Path(tally), warm_up, workers)
        before = time.perf_counter()
        _submit_noops(tasks)
        wait_for_completions(Path(tally), warm_up + tasks, workers)
        return time.perf_counter() - before


@contextlib.contextmanager
def _workers(url: str, *options: str, tally: str = "") -> Iterator[list[Process]]:
    app.conf.broker_url = url
    with contextlib.ExitStack() as stack:
        command = ("-A", __name__, "-b", url, *options, "worker", "--pool", "solo", *_OPTIONS)
        yield [
            stack.enter_context(
                worker("celery", *command, "--hostname", f"w{number}", broker_url=url, tally=tally)
            )
            for number in range(cores())
        ]


def _submit_noops(tasks: int) -> None:
    with app.producer_or_acquire() as producer:
        for _ in range(tasks):
            noop.apply_async(producer=producer, retry=False)


def _echo_all(tasks: int) -> list[int]:
    ids = [result.id for result in _submit_echoes(tasks)]
    metas = dict(app.backend.get_many(ids, interval=_POLL_S))
    return [metas[task]["result"] for task in ids]


def _submit_echoes(tasks: int) -> list[AsyncResult]:
    with app.producer_or_acquire() as producer, denied_join_result():
        return [echo.apply_async((number,), producer=producer, retry=False) for number in range(tasks)]


_BASE: Final = (
    f"Redis broker, {cores()} workers (one per core, solo pool), prefetch 128, early ack, JSON,"
    " no events, gossip, mingle or heartbeat, one pooled producer"
)
WAYS = {
    RECORDED: Way(
        measure_recorded, 4_000, f"{_BASE}; Redis result backend, get_many (MGET) every {_POLL_S} s"
    ),
    UNRECORDED: Way(measure_unrecorded, 6_000, f"{_BASE}; results off, completions counted in shared memory"),
}
