"""taskiq-nats: a pull consumer on JetStream.

Tried by hand on two busy cores (tasks/s, 6,000 to 20,000 tasks): the default of one message per
pull 4,600; 20 per pull 6,700; 100 per pull 7,000 to 9,500; 1,000 per pull with 1,000 tasks in
flight and 10,000 unacknowledged 10,100 to 10,500, the best; one worker process 7,900; three
10,200 to 10,700, within the noise; `--no-parse` likewise. The push broker does not start with two
workers. Without a pull timeout a batch that is not filled can wait for tens of seconds. 500
submits are under way at once, each awaiting its acknowledgement, on uvloop, which taskiq's
workers also choose. Its result store is an object store that writes several messages a task, so
there is none; completions are counted as `tally` says. JetStream is as it comes: it acknowledges
before it syncs, every two minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import uvloop
from nats.js.api import ConsumerConfig
from taskiq import AsyncTaskiqDecoratedTask
from taskiq_nats import PullBasedJetStreamBroker

from tests.bench.conditions import cores
from tests.bench.peers.processes import BROKER_VARIABLE, Process, nats_server, worker
from tests.bench.peers.tally import completed, wait_for_completions

PACKAGES = ("taskiq", "taskiq-nats", "nats-py", "uvloop")
TASKS = 60_000
_BATCH: Final = 1000
_IN_FLIGHT: Final = 1000
_UNACKNOWLEDGED: Final = 10_000
_PULL_TIMEOUT_S: Final = 0.1
_SUBMITS_AT_ONCE: Final = 500
_DURABLE: Final = "taskiq_durable"
SETTINGS = (
    f"PullBasedJetStreamBroker, {cores()} workers (one per core) on uvloop, {_BATCH} per pull,"
    f" {_IN_FLIGHT} in flight, max_ack_pending {_UNACKNOWLEDGED}, {_SUBMITS_AT_ONCE} submits at once;"
    " no result store, completions counted in shared memory; file storage, JetStream's default"
    " sync_interval of 2 min"
)


async def noop() -> None:
    """Do nothing but be counted."""
    completed()


def make_broker() -> PullBasedJetStreamBroker:
    """What the command line of taskiq calls in each worker process, and the client once."""
    broker = PullBasedJetStreamBroker(
        os.environ[BROKER_VARIABLE],
        durable=_DURABLE,
        consumer_config=ConsumerConfig(durable_name=_DURABLE, max_ack_pending=_UNACKNOWLEDGED),
        pull_consume_batch=_BATCH,
        pull_consume_timeout=_PULL_TIMEOUT_S,
    )
    broker.register_task(noop, task_name="noop")
    return broker


def measure(tasks: int, warm_up: int) -> float:
    """Seconds from the first submit to the last completion."""
    with contextlib.ExitStack() as stack:
        tally = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer-tally-")))
        url = stack.enter_context(nats_server())
        os.environ[BROKER_VARIABLE] = url
        workers = [stack.enter_context(worker("taskiq", *_arguments(), broker_url=url, tally=tally))]
        return uvloop.run(_measure(tasks, warm_up, tally, workers))


async def _measure(tasks: int, warm_up: int, tally: Path, workers: list[Process]) -> float:
    broker = make_broker()
    await broker.startup()
    try:
        task = broker.find_task("noop")
        assert task is not None, "the task was registered a moment ago"
        await _submit(task, warm_up)
        await asyncio.to_thread(wait_for_completions, tally, warm_up, workers)
        before = time.perf_counter()
        await _submit(task, tasks)
        await asyncio.to_thread(wait_for_completions, tally, warm_up + tasks, workers)
        return time.perf_counter() - before
    finally:
        await broker.shutdown()


def _arguments() -> tuple[str, ...]:
    sizes = ("--workers", str(cores()), "--max-async-tasks", str(_IN_FLIGHT))
    return ("worker", f"{__name__}:make_broker", *sizes, "--log-level", "WARNING")


async def _submit(task: AsyncTaskiqDecoratedTask[Any, Any], tasks: int) -> None:
    numbers = iter(range(tasks))

    async def submit_some() -> None:
        for _ in numbers:
            await task.kiq()

    await asyncio.gather(*(submit_some() for _ in range(_SUBMITS_AT_ONCE)))
