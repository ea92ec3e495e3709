"""taskiq-nats: a pull consumer on JetStream.

Tried by hand on two busy cores (tasks/s, 6,000 to 20,000 tasks), unrecorded: the default of one message
per pull 4,600; 20 per pull 6,700; 100 per pull 7,000 to 9,500; 1,000 per pull with 1,000 tasks in
flight and 10,000 unacknowledged 10,100 to 10,500, the best; one worker process 7,900; three
10,200 to 10,700, within the noise; `--no-parse` likewise. The push broker does not start with two
workers. Without a pull timeout a batch that is not filled can wait for tens of seconds. 500
submits are under way at once, each awaiting its acknowledgement, on uvloop, which taskiq's
workers also choose. JetStream is as it comes: it acknowledges before it syncs, every two minutes.

Recorded (tasks/s and CPU microseconds a task of all processes, 4,000 to 5,000 tasks, on cores that others
were using as well): taskiq-nats' own NATSObjectStoreResultBackend 290 to 470, 2,300, and a few
hundred results are its end, as every look at one leaves a consumer on the server until that says
"maximum consumers limit reached". So it is RedisAsyncResultBackend of taskiq-redis, with hiredis, which
redis-py recommends: `wait_result` by 20 readers 1,250 to 1,640, 860 to 900; by 100 readers 1,260 to
1,320, 960; by 500 870 to 960; `taskiq.gather` 890 to 1,330, 1,050; each submit followed by its wait
1,160. `get_result` that looks again when there is none, one command a result instead of the two
of `wait_result`, 710 to 720, the best; with 1,000 tasks in flight 1,020 to 1,250, with 100 2,070.
A pool of 8 or 20 connections 880, of 100 710. msgpack or removing results once read: no more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvloop
from nats.js.api import ConsumerConfig
from taskiq import AsyncTaskiqDecoratedTask, AsyncTaskiqTask, ResultGetError
from taskiq_nats import PullBasedJetStreamBroker
from taskiq_redis import RedisAsyncResultBackend

from tests.bench.conditions import cores
from tests.bench.peers.processes import BROKER_VARIABLE, Process, nats_server, redis_server, worker
from tests.bench.peers.tally import completed, wait_for_completions
from tests.bench.peers.way import RECORDED, UNRECORDED, Way, check

PACKAGES = ("taskiq", "taskiq-nats", "taskiq-redis", "nats-py", "redis", "hiredis", "uvloop")
_RESULTS_VARIABLE: Final = "PEER_RESULTS_URL"
_BATCH: Final = 1000
_IN_FLIGHT_RECORDED: Final = 100
_IN_FLIGHT_UNRECORDED: Final = 1000
_UNACKNOWLEDGED: Final = 10_000
_PULL_TIMEOUT_S: Final = 0.1
_SUBMITS_AT_ONCE: Final = 500
_READERS: Final = 20
_CONNECTIONS: Final = 100
_POLL_S: Final = 0.05
_STALL_LIMIT_S: Final = 60.0
_DURABLE: Final = "taskiq_durable"

Task = AsyncTaskiqDecoratedTask[Any, Any]


async def noop() -> None:
    """Do nothing but be counted."""
    completed()


async def echo(number: int) -> int:
    """Give back what it was given."""
    return number


def make_noop_broker() -> PullBasedJetStreamBroker:
    """What the command line of taskiq calls in each worker process, and the client once."""
    broker = PullBasedJetStreamBroker(
        os.environ[BROKER_VARIABLE],
        durable=_DURABLE,
        consumer_config=ConsumerConfig(durable_name=_DURABLE, max_ack_pending=_UNACKNOWLEDGED),
        pull_consume_batch=_BATCH,
        pull_consume_timeout=_PULL_TIMEOUT_S,
    )
    broker.register_task(noop, task_name="noop")
    broker.register_task(echo, task_name="echo")
    return broker


def make_echo_broker() -> PullBasedJetStreamBroker:
    """The same with a result store."""
    broker = make_noop_broker()
    broker.result_backend = RedisAsyncResultBackend(
        os.environ[_RESULTS_VARIABLE], max_connection_pool_size=_CONNECTIONS
    )
    return broker


def measure_recorded(tasks: int, warm_up: int, *, fsync: bool = False) -> float:
    """Seconds from the first submit until the client has read every result from Redis."""
    with nats_server(fsync=fsync) as url, redis_server(fsync=fsync) as results:
        os.environ[BROKER_VARIABLE] = url
        os.environ[_RESULTS_VARIABLE] = results
        command = _command(make_echo_broker.__name__, _IN_FLIGHT_RECORDED)
        with worker("taskiq", *command, broker_url=url):
            return uvloop.run(_measure_recorded(tasks, warm_up))


def measure_unrecorded(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit until the last body ran."""
    with tempfile.TemporaryDirectory(prefix="peer-tally-") as tally, nats_server() as url:
        os.environ[BROKER_VARIABLE] = url
        command = _command(make_noop_broker.__name__, _IN_FLIGHT_UNRECORDED)
        with worker("taskiq", *command, broker_url=url, tally=tally) as process:
            return uvloop.run(_measure_unrecorded(tasks, warm_up, Path(tally), [process]))


async def _measure_recorded(tasks: int, warm_up: int) -> float:
    broker = make_echo_broker()
    await broker.startup()
    try:
        task = _found(broker, "echo")
        check(await _echo_all(task, warm_up))
        before = time.perf_counter()
        outcomes = await _echo_all(task, tasks)
        seconds = time.perf_counter() - before
        check(outcomes)
        return seconds
    finally:
        await broker.shutdown()


async def _measure_unrecorded(tasks: int, warm_up: int, tally: Path, workers: list[Process]) -> float:
    broker = make_noop_broker()
    await broker.startup()
    try:
        task = _found(broker, "noop")
        await _submit_noops(task, warm_up)
        await asyncio.to_thread(wait_for_completions, tally, warm_up, workers)
        before = time.perf_counter()
        await _submit_noops(task, tasks)
        await asyncio.to_thread(wait_for_completions, tally, warm_up + tasks, workers)
        return time.perf_counter() - before
    finally:
        await broker.shutdown()


def _command(make_broker: str, in_flight: int) -> tuple[str, ...]:
    sizes = ("--workers", str(cores()), "--max-async-tasks", str(in_flight))
    return ("worker", f"{__name__}:{make_broker}", *sizes, "--log-level", "WARNING")


def _found(broker: PullBasedJetStreamBroker, name: str) -> Task:
    task = broker.find_task(name)
    assert task is not None, "the task was registered a moment ago"
    return task


async def _submit_noops(task: Task, tasks: int) -> None:
    async def submit(_number: int) -> None:
        await task.kiq()

    await _for_each(tasks, _SUBMITS_AT_ONCE, submit)


async def _echo_all(task: Task, tasks: int) -> list[int]:
    submitted: dict[int, AsyncTaskiqTask[Any]] = {}
    outcomes = [-1] * tasks

    async def submit(number: int) -> None:
        submitted[number] = await task.kiq(number)

    async def read(number: int) -> None:
        outcomes[number] = await _result(submitted[number])

    await _for_each(tasks, _SUBMITS_AT_ONCE, submit)
    await _for_each(tasks, _READERS, read)
    return outcomes


async def _result(task: AsyncTaskiqTask[Any]) -> int:
    async with asyncio.timeout(_STALL_LIMIT_S):
        while True:
            with contextlib.suppress(ResultGetError):
                result = await task.get_result()
                result.raise_for_error()
                number: int = result.return_value
                return number
            await asyncio.sleep(_POLL_S)


async def _for_each(tasks: int, at_once: int, do: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(tasks))

    async def do_some() -> None:
        for number in numbers:
            await do(number)

    await asyncio.gather(*(do_some() for _ in range(at_once)))


def _base(in_flight: int) -> str:
    return (
        f"PullBasedJetStreamBroker, file storage, {cores()} workers (one per core) on uvloop, {_BATCH} per"
        f" pull, {in_flight} in flight, max_ack_pending {_UNACKNOWLEDGED}, {_SUBMITS_AT_ONCE} submits at once"
    )


SETTINGS_RECORDED: Final = (
    f"{_base(_IN_FLIGHT_RECORDED)}; RedisAsyncResultBackend of taskiq-redis, {_CONNECTIONS} connections,"
    f" get_result by {_READERS} readers"
)
WAYS = {
    RECORDED: Way(measure_recorded, 10_000, SETTINGS_RECORDED),
    UNRECORDED: Way(
        measure_unrecorded,
        40_000,
        f"{_base(_IN_FLIGHT_UNRECORDED)}; no result store, completions counted in shared memory",
    ),
}
