"""No-op tasks per second: submitted, durable, assigned, run, recorded, and known to the client.

By itself:

    python -m tests.bench.noop [--tasks 200000] [--workers 1] [--slots 8] [--runs 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Protocol

import uvloop

import agentflow
from tests.bench.app import noop
from tests.bench.stack import Stack


class Site(Protocol):
    """A running cluster to measure."""

    @property
    def url(self) -> str:
        """Where its servers listen."""
        ...

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by process."""
        ...


async def measure(stack: Site, tasks: int) -> dict[str, float]:
    """Submit `tasks` no-op tasks and wait until the outcome of each is recorded and known."""
    async with agentflow.Client(stack.url, name="bench") as client:
        await (await client.submit(noop, 0)).result(30)
        cpu_before = stack.cpu_s()
        before = time.perf_counter()
        handles = await client.submit_many(noop, ((number,) for number in range(tasks)))
        submitted = time.perf_counter()
        for handle in handles:
            await handle.outcome()
        after = time.perf_counter()
        cpu = {name: used - cpu_before[name] for name, used in stack.cpu_s().items()}
        total = sum([await handle.result() for handle in handles[:1000]])
        assert total == sum(range(min(1000, tasks)))
    return {
        "tasks_per_s": tasks / (after - before),
        "submit_per_s": tasks / (submitted - before),
        "cpu_us_per_task": sum(cpu.values()) / tasks * 1e6,
        **{f"cpu_us_{name}": used / tasks * 1e6 for name, used in cpu.items()},
    }


async def run(tasks: int, workers: int, slots: int, runs: int) -> list[dict[str, float]]:
    """Several runs, on one cluster."""
    async with Stack(workers=workers, slots=slots) as stack:
        await measure(stack, min(tasks, 20_000))
        return [await measure(stack, tasks) for _ in range(runs)]


def main() -> None:
    """Print each run, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = uvloop.run(run(given.tasks, given.workers, given.slots, given.runs))
    if not given.json:
        for result in results:
            print({name: round(value, 1) for name, value in result.items()})
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    print(json.dumps({"noop_tasks_per_s": median.pop("tasks_per_s"), **median}))


if __name__ == "__main__":
    main()
