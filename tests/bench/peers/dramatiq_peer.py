"""Dramatiq on Redis.

Tried by hand on two busy cores (tasks/s, 8,000 to 10,000 tasks), unrecorded: the defaults, one process
per core with 8 threads, 4,200; twice the processes 3,900 to 4,100; 16 threads 3,600 to 4,100; one
thread per process with the default prefetch of two messages only 540, as the worker then sleeps
between fetches; one thread per process with a prefetch of 256 4,500 to 6,800, the best, since
threads only fight for the interpreter when a task does nothing; prefetch 64 and 1,000 a little
less; one process 4,500; three processes 5,100 to 5,600. `group` wins nothing over `send`. The
default middleware stays: without it Dramatiq neither retries nor enforces time limits. redis-py
has its C parser, hiredis, which it recommends.

Recorded, with the Results middleware and its Redis backend (tasks/s, 5,000 to 6,000 tasks, on cores
that others were using as well), read by `group.get_results` that blocks or by `get_result` of each
message that looks again after 10 ms: one thread per process 1,800 to 2,700 and 2,000 to 2,650; two
threads 2,270 and 2,760 to 3,240, the best, as a thread now waits for Redis; four threads 2,320 and
2,620. `send` and `get_result` that blocks 2,200 to 2,800.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import ResultMissing, Results
from dramatiq.results.backends import RedisBackend

from tests.bench.conditions import cores
from tests.bench.peers.processes import BROKER_VARIABLE, Process, redis_server, worker
from tests.bench.peers.tally import completed, wait_for_completions
from tests.bench.peers.way import RECORDED, UNRECORDED, Way, check

PACKAGES = ("dramatiq", "redis", "hiredis")
_PREFETCH: Final = 256
_THREADS_RECORDED: Final = 2
_THREADS_UNRECORDED: Final = 1
_POLL_S: Final = 0.01
_STALL_LIMIT_S: Final = 60.0

Actor = dramatiq.Actor[Any, Any]


def make_noop(url: str) -> Actor:
    """The no-op of a broker at that address, which becomes the process's broker."""
    return dramatiq.actor(actor_name="noop", broker=_broker(url))(completed)


def make_echo(url: str) -> Actor:
    """The task that gives back its number, of a broker that stores results."""
    broker = _broker(url)
    backend = RedisBackend(url=url)
    results = Results(backend=backend)  # type: ignore[no-untyped-call]  # Dramatiq's results have no types
    broker.add_middleware(results)
    return dramatiq.actor(actor_name="echo", broker=broker, store_results=True)(_echo)


def make_noop_broker() -> None:
    """What the command line of Dramatiq calls in each worker process."""
    make_noop(os.environ[BROKER_VARIABLE])


def make_echo_broker() -> None:
    """What the command line of Dramatiq calls in each worker process."""
    make_echo(os.environ[BROKER_VARIABLE])


def measure_recorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the client has read every result from Redis."""
    with redis_server() as url, _workers(url, make_echo_broker.__name__, _THREADS_RECORDED):
        echo = make_echo(url)
        check(_echo_all(echo, warm_up))
        before = time.perf_counter()
        outcomes = _echo_all(echo, tasks)
        seconds = time.perf_counter() - before
        check(outcomes)
        return seconds


def measure_unrecorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the last body ran."""
    with (
        tempfile.TemporaryDirectory(prefix="peer-tally-") as tally,
        redis_server() as url,
        _workers(url, make_noop_broker.__name__, _THREADS_UNRECORDED, tally=tally) as workers,
    ):
        noop = make_noop(url)
        _submit_noops(noop, warm_up)
        wait_for_completions(Path(tally), warm_up, workers)
        before = time.perf_counter()
        _submit_noops(noop, tasks)
        wait_for_completions(Path(tally), warm_up + tasks, workers)
        return time.perf_counter() - before


@contextlib.contextmanager
def _workers(url: str, make_broker: str, threads: int, tally: str = "") -> Iterator[list[Process]]:
    # The worker reads its prefetch from the environment only; it inherits ours.
    os.environ["dramatiq_queue_prefetch"] = str(_PREFETCH)  # noqa: SIM112  the name is Dramatiq's
    sizes = ("--processes", str(cores()), "--threads", str(threads))
    command = (f"{__name__}:{make_broker}", *sizes, "--skip-logging")
    with worker("dramatiq", *command, broker_url=url, tally=tally) as process:
        yield [process]


def _broker(url: str) -> RedisBroker:
    broker = RedisBroker(url=url)  # type: ignore[no-untyped-call]  # Dramatiq's brokers have no types
    dramatiq.set_broker(broker)
    return broker


def _echo(number: int) -> int:
    return number


def _submit_noops(noop: Actor, tasks: int) -> None:
    for _ in range(tasks):
        noop.send()


def _echo_all(echo: Actor, tasks: int) -> list[int]:
    messages = [echo.send(number) for number in range(tasks)]
    return [_result(message) for message in messages]


def _result(message: dramatiq.Message[Any]) -> int:
    deadline = time.monotonic() + _STALL_LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ResultMissing):
            number: int = message.get_result()
            return number
        time.sleep(_POLL_S)
    text = f"no result of message {message.message_id} after {_STALL_LIMIT_S:.0f} s"
    raise TimeoutError(text)


def _base(threads: int) -> str:
    return (
        f"Redis broker, {cores()} processes (one per core), threads each: {threads}, queue prefetch"
        f" {_PREFETCH}, default middleware"
    )


WAYS = {
    RECORDED: Way(
        measure_recorded,
        15_000,
        f"{_base(_THREADS_RECORDED)}; Results middleware with the Redis backend, get_result of every message",
    ),
    UNRECORDED: Way(
        measure_unrecorded,
        30_000,
        f"{_base(_THREADS_UNRECORDED)}; no result store, completions counted in shared memory",
    ),
}
