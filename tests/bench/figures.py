"""The figures of `just bench`: each measured on a cluster of real processes, fsync on every write."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

import agentflow
from agentflow import frames, wire
from agentflow.bus import Bus
from agentflow.events import Needs, TaskSubmitted
from agentflow.log.publisher import PubAck, Publisher
from tests.bench import relay
from tests.bench.app import noop, total
from tests.bench.noop import measure
from tests.bench.stack import ROOT, Stack
from tests.servers import free_port

Figures = dict[str, float]
SINGLES_CLIENTS: Final = 50


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


async def noop_tasks(runs: int, tasks: int) -> Figures:
    """200,000 no-op tasks, one worker with 8 slots."""
    async with Stack(workers=1, slots=8) as stack:
        await measure(stack, 20_000)
        found = [await measure(stack, tasks) for _ in range(runs)]
    return {
        "noop_tasks_per_s": statistics.median(run["tasks_per_s"] for run in found),
        "cpu_us_per_task": statistics.median(run["cpu_us_per_task"] for run in found),
    }


async def noop8_tasks(runs: int, tasks: int) -> Figures:
    """The same with 8 worker processes of 4 slots."""
    async with Stack(workers=8, slots=4) as stack:
        await measure(stack, 20_000)
        found = [(await measure(stack, tasks))["tasks_per_s"] for _ in range(runs)]
    return {"noop8_tasks_per_s": statistics.median(found)}


async def latency(seconds: float, rounds: int) -> Figures:
    """One task at a time, 100 a second, from submit to result; and chains of three tasks.

    In the same rounds the relay: three bare messages on the same way.
    """
    found = [await _latency_round(seconds) for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


async def _latency_round(seconds: float) -> Figures:
    bare = await relay.measure(int(seconds * 100), 100)
    async with Stack() as stack, agentflow.Client(stack.url, name="bench") as client:

        async def single(number: int) -> None:
            assert await (await client.submit(noop, number)).result() == number

        async def chain(number: int) -> None:
            flow = agentflow.Workflow()
            flow.add(noop, flow.add(noop, flow.add(noop, number)))
            handle = await client.submit_workflow(flow)
            assert (await handle.outcome()).state == "completed"

        await paced(single, 1.0, 100)
        singles = await paced(single, seconds, 100)
        await paced(chain, 1.0, 50)
        chains = await paced(chain, seconds, 50)
    return {
        "latency_p50_ms": percentile(singles, 0.50) * 1000,
        "latency_p99_ms": percentile(singles, 0.99) * 1000,
        "relay_p50_ms": percentile(bare, 0.50) * 1000,
        "relay_p99_ms": percentile(bare, 0.99) * 1000,
        "latency_ratio_to_relay": percentile(singles, 0.50) / percentile(bare, 0.50),
        "chain3_p50_ms": percentile(chains, 0.50) * 1000,
        "chain3_p99_ms": percentile(chains, 0.99) * 1000,
    }


async def paced(work: Callable[[int], Awaitable[None]], seconds: float, rate: float) -> list[float]:
    """How long each piece of work took, begun at a steady rate, one at a time."""
    times = []
    begin = time.perf_counter()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        before = time.perf_counter()
        await work(number)
        times.append(time.perf_counter() - before)
    return times


async def singles(seconds: float, rounds: int) -> Figures:
    """50 clients, each submitting single tasks and awaiting each acknowledgement, beside bare publishes."""
    async with Stack() as stack:
        found = [
            (await _submit_singles(stack, seconds), await _publish_singles(stack, seconds))
            for _ in range(rounds)
        ]
    return {
        "singles_per_s": statistics.median(ours for ours, _ in found),
        "bare_publishes_per_s": statistics.median(bare for _, bare in found),
        "singles_ratio": statistics.median(ours / bare for ours, bare in found),
    }


async def _submit_singles(stack: Stack, seconds: float) -> float:
    clients = [agentflow.Client(stack.url, name=f"single{number}") for number in range(SINGLES_CLIENTS)]
    await asyncio.gather(*(client.__aenter__() for client in clients))
    try:

        async def submit(client: agentflow.Client, number: int) -> None:
            await client.submit(noop, number)

        return await _rate([partial(submit, client) for client in clients], seconds)
    finally:
        await asyncio.gather(*(client.__aexit__(None, None, None) for client in clients))


async def _publish_singles(stack: Stack, seconds: float) -> float:
    """The same clients' connections, publishing a message of the same size to a stream like the log."""
    buses = [Bus(stack.url, name=f"bare{number}") for number in range(SINGLES_CLIENTS)]
    await asyncio.gather(*(bus.__aenter__() for bus in buses))
    try:
        name = f"BARE{secrets.token_hex(4)}"
        config = f'{{"name":"{name}","subjects":["bare.{name}"],"storage":"file","num_replicas":1}}'
        await buses[0].js_api(f"STREAM.CREATE.{name}", config.encode(), 5.0)
        data = TaskSubmitted(id="0" * 36, function="bench.noop", args=[1], notify="0" * 16)
        frame = b"[" + frames.encode(data) + b"]"
        numbers = itertools.count()

        async def publish(publisher: Publisher, _number: int) -> None:
            headers = {wire.MSG_ID: f"bare.{next(numbers)}"}
            ack = await publisher.publish(f"bare.{name}", frame, headers, timeout_s=5.0)
            assert isinstance(ack, PubAck), ack

        publishers = [Publisher(bus) for bus in buses]
        rate = await _rate([partial(publish, publisher) for publisher in publishers], seconds)
        await buses[0].js_api(f"STREAM.DELETE.{name}", b"", 5.0)
        return rate
    finally:
        await asyncio.gather(*(bus.__aexit__(None, None, None) for bus in buses))


async def _rate(workers: list[Callable[[int], Awaitable[None]]], seconds: float) -> float:
    """Completed calls a second of several loops, each awaiting one call after the other."""
    until = time.perf_counter() + seconds
    counts = [0] * len(workers)

    async def loop(place: int) -> None:
        while time.perf_counter() < until:
            await workers[place](counts[place])
            counts[place] += 1

    before = time.perf_counter()
    await asyncio.gather(*map(loop, range(len(workers))))
    return sum(counts) / (time.perf_counter() - before)


async def fan(runs: int, width: int) -> Figures:
    """One workflow: a task, 10,000 that depend on it, and one that depends on them all."""
    async with Stack() as stack, agentflow.Client(stack.url, name="bench") as client:
        times = []
        for _ in range(runs + 1):
            flow = agentflow.Workflow("fan")
            first = flow.add(noop, 0)
            middle = [flow.add(noop, number) for number in range(width)]
            for step in middle:
                flow.after(step, first)
            flow.after(flow.add(total, 1), *middle)
            before = time.perf_counter()
            outcome = await (await client.submit_workflow(flow)).outcome()
            times.append(time.perf_counter() - before)
            assert outcome.state == "completed", outcome
    return {"fan10k_s": statistics.median(times[1:])}


async def infeasible(runs: int, tasks: int, blocked: int) -> Figures:
    """Rate of plain tasks behind queued ones that fit no worker, to their rate without them."""
    async with Stack() as stack, agentflow.Client(stack.url, name="bench") as client:
        await measure(stack, 20_000)
        free = [(await measure(stack, tasks))["tasks_per_s"] for _ in range(runs)]
        impossible = noop.options(needs=Needs(gpus=64), priority="urgent")
        await client.submit_many(impossible, ((number,) for number in range(blocked)))
        behind = [(await measure(stack, tasks))["tasks_per_s"] for _ in range(runs)]
    return {"infeasible_ratio": statistics.median(behind) / statistics.median(free)}


async def backlog(small: int, large: int) -> Figures:
    """A million tasks queued on no worker, then worked off: memory, and rate against a small backlog."""
    rates = {}
    memory: Figures = {}
    for count in (small, large):
        async with Stack(workers=0) as stack, agentflow.Client(stack.url, name="bench") as client:
            handles = await client.submit_many(noop, ((number,) for number in range(count)))
            await _queued(client, count)
            if count == large:
                memory = {
                    "backlog1m_leader_rss_mb": stack.rss_mb("m1"),
                    "backlog1m_server_rss_mb": stack.rss_mb("nats-server"),
                }
            before = time.perf_counter()
            await stack.start("worker", "w1", 8)
            joined = time.perf_counter()
            for handle in handles:
                await handle.outcome()
            rates[count] = count / (time.perf_counter() - joined)
            assert joined > before
            if count == large:
                memory["backlog1m_leader_rss_mb"] = max(memory["backlog1m_leader_rss_mb"], stack.rss_mb("m1"))
                memory["backlog1m_server_rss_mb"] = max(
                    memory["backlog1m_server_rss_mb"], stack.rss_mb("nats-server")
                )
    return {
        **memory,
        "backlog1m_rate_per_s": rates[large],
        "backlog1m_rate_ratio": rates[large] / rates[small],
    }


async def _queued(client: agentflow.Client, count: int) -> None:
    """Wait until the leader has `count` tasks ready."""
    while True:
        answer = await client.bus.request(wire.service(client.namespace, "queue"), b"{}", 10.0)
        ready = frames.decode_any(answer)["ready"]
        if ready >= count:
            return
        await asyncio.sleep(0.1)


async def shell(tasks: int, rounds: int) -> Figures:
    """Shell tasks (`true`) a second, to what a bare asyncio subprocess loop reaches here."""
    async with Stack(slots=4) as stack, agentflow.Client(stack.url, name="bench") as client:
        found = []
        for _ in range(rounds):
            before = time.perf_counter()
            handles = [await client.shell("true") for _ in range(tasks)]
            for handle in handles:
                await handle.result()
            ours = tasks / (time.perf_counter() - before)
            found.append((ours, await _bare_processes(tasks, 4)))
    return {
        "shell_per_s": statistics.median(ours for ours, _ in found),
        "bare_process_per_s": statistics.median(bare for _, bare in found),
        "shell_ratio": statistics.median(ours / bare for ours, bare in found),
    }


async def _bare_processes(count: int, at_once: int) -> float:
    loop = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.processes",
        str(count),
        str(at_once),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    said, _ = await loop.communicate()
    return float(said)


async def start(runs: int) -> Figures:
    """How long `agentflow up` takes until it is ready, and `import agentflow`."""
    ups = [await _up_ready_s() for _ in range(runs)]
    imports = [_import_s("agentflow") - _import_s("sys") for _ in range(2 * runs + 1)]
    return {"up_ready_s": statistics.median(ups), "import_ms": statistics.median(imports) * 1000}


async def _up_ready_s() -> float:
    """From starting `agentflow up` on an empty folder to the line that says it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        up = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "agentflow_nodes",
            "up",
            "--data-dir",
            folder,
            "--port",
            str(free_port()),
            "--json",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert up.stdout is not None
        line = await asyncio.wait_for(up.stdout.readline(), 60)
        took = time.perf_counter() - before
        up.terminate()
        await up.wait()
    assert json.loads(line), "`agentflow up --json` said nothing"
    return took


def _import_s(module: str) -> float:
    before = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT)
    return time.perf_counter() - before


def all_figures(quick: Any) -> dict[str, Callable[[], Awaitable[Figures]]]:
    """Every figure by name; `quick` for a look at whether they work."""
    few = 1 if quick else 3
    share = 10 if quick else 1
    return {
        "noop": lambda: noop_tasks(few, 200_000 // share),
        "noop8": lambda: noop8_tasks(few, 200_000 // share),
        "latency": lambda: latency(2.0 if quick else 8.0, few),
        "singles": lambda: singles(1.0 if quick else 4.0, few),
        "fan": lambda: fan(few, 10_000),
        "infeasible": lambda: infeasible(few, 100_000 // share, 200_000 // share),
        "backlog": lambda: backlog(10_000, 1_000_000 // share),
        "shell": lambda: shell(2_000 // share, few),
        "start": lambda: start(few),
    }
