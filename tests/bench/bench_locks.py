"""`just bench-locks`: distributed locks, beside redis-py's `Lock` in the same run.

AgentFlow writes each ticket, and each word about it in the log, with an fsync before the
answer, keeps those who wait in order, renews, and hands out tokens that rise. Redis runs as it
comes (nothing on disk) and with `appendfsync always`. The last line is one JSON object.

    python -m tests.bench.bench_locks [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol

import uvloop
from msgspec import Struct
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agentflow import Client, Held
from tests.bench.conditions import FSYNC_ALWAYS, command_version, conditions
from tests.bench.figures import percentile
from tests.bench.results import print_last_line, show
from tests.bench.stack import ROOT
from tests.eventually import eventually
from tests.servers import NatsServer

TARGETS: Final[dict[str, tuple[str, float | None]]] = {
    "lock_acquire_p50_ms": ("acquire, nobody else wants it, p50, ms", 1.5),
    "lock_acquire_p99_ms": ("the same, p99, ms", None),
    "lock_handover_p50_ms": ("from the call of release to the next holder, p50, ms", 10.0),
    "lock_death_s": ("from kill -9 of the holder to the next one, the longest, s", None),
    "lock_contended_per_s": ("50 contenders for one lock: holds a second", None),
    "lock_keys_per_s": ("1,000 locks at once: acquired and released a second", None),
}
TTL_S: Final = 2
_CLIENTS: Final = 5
_CONTENDERS: Final = 50
_KEYS: Final = 1_000
_DEATH_MARGIN_S: Final = 0.5


class Sizes(Struct, frozen=True):
    """How much is measured."""

    acquires: int = 1_000
    handovers: int = 50
    deaths: int = 5
    contended_s: float = 5.0
    warm_up: int = 100


QUICK: Final = Sizes(acquires=100, handovers=5, deaths=1, contended_s=1.0, warm_up=20)


class Locks(Protocol):
    """What is measured: locks of one kind, from several connections."""

    url: str
    module: str

    async def acquire(self, client: int, key: str, ttl_s: int) -> Any:
        """Wait until it is held."""
        ...

    async def release(self, lock: Any) -> None:
        """Give it back."""
        ...

    async def someone_waits(self, key: str) -> bool:
        """Whether somebody stands in line."""
        ...


class AgentFlowLocks:
    """Locks of one nats-server that syncs every write."""

    def __init__(self, url: str, clients: list[Client]) -> None:
        self.url = url
        self.module = "tests.bench.bench_locks"
        self._clients = clients

    async def acquire(self, client: int, key: str, ttl_s: int) -> Held:
        """Wait until it is held."""
        return await self._clients[client].lock(key, ttl_s=ttl_s).acquire()

    async def release(self, lock: Held) -> None:
        """Give it back."""
        await lock.release()

    async def someone_waits(self, key: str) -> bool:
        """Whether somebody stands in line."""
        info = await self._clients[-1].lock_info(key)
        return info is not None and bool(info.waiters)


@contextlib.asynccontextmanager
async def agentflow_locks(clients: int) -> AsyncGenerator[AgentFlowLocks, None]:
    """A nats-server of its own."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer())
        many = [
            await stack.enter_async_context(Client(server.url, name=f"bench-{number}"))
            for number in range(clients)
        ]
        yield AgentFlowLocks(server.url, many)


async def acquire_ms(locks: Locks, sizes: Sizes) -> list[float]:
    """Milliseconds of each acquisition that nobody contests."""
    times: list[float] = []
    for number in range(sizes.warm_up + sizes.acquires):
        start = time.perf_counter()
        lock = await locks.acquire(0, f"free-{number}", 10)
        times.append((time.perf_counter() - start) * 1_000)
        await locks.release(lock)
    return times[sizes.warm_up :]


async def handover_ms(locks: Locks, sizes: Sizes) -> list[float]:
    """Milliseconds from the call of release until the one who waits holds it."""
    times: list[float] = []
    for number in range(sizes.handovers):
        key = f"handover-{number}"
        lock = await locks.acquire(0, key, 10)
        waiter = asyncio.create_task(timed(locks.acquire(1, key, 10)))
        await eventually(lambda of=key: locks.someone_waits(of))  # type: ignore[misc]
        start = time.perf_counter()
        await locks.release(lock)
        held_at, lock = await waiter
        times.append((held_at - start) * 1_000)
        await locks.release(lock)
    return times


async def timed(acquired: Awaitable[Any]) -> tuple[float, Any]:
    """What was acquired, and when."""
    lock = await acquired
    return time.perf_counter(), lock


async def death_s(locks: Locks, sizes: Sizes) -> list[float]:
    """Seconds from kill -9 of the holder's process until the one who waits holds it."""
    times: list[float] = []
    for number in range(sizes.deaths):
        key = f"death-{number}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", locks.module, locks.url, key, str(TTL_S)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"held\n"
        waiter = asyncio.create_task(timed(locks.acquire(0, key, TTL_S)))
        await eventually(lambda of=key: locks.someone_waits(of))  # type: ignore[misc]
        start = time.perf_counter()
        process.kill()
        await process.wait()
        held_at, lock = await waiter
        times.append(held_at - start)
        await locks.release(lock)
    return times


async def contended_per_s(locks: Locks, sizes: Sizes) -> float:
    """Holds a second of one lock that 50 contenders want all the time."""
    held = itertools.count()
    until = time.perf_counter() + sizes.contended_s

    async def contend(number: int) -> None:
        while time.perf_counter() < until:
            lock = await locks.acquire(number % _CLIENTS, "contended", 10)
            if time.perf_counter() < until:
                next(held)
            await locks.release(lock)

    await asyncio.gather(*(contend(number) for number in range(_CONTENDERS)))
    return next(held) / sizes.contended_s


async def keys_per_s(locks: Locks, sizes: Sizes) -> float:
    """Locks a second, 1,000 of them acquired and released at once."""
    del sizes

    async def once(number: int) -> None:
        await locks.release(await locks.acquire(number % _CLIENTS, f"key-{number}", 10))

    start = time.perf_counter()
    await asyncio.gather(*(once(number) for number in range(_KEYS)))
    return _KEYS / (time.perf_counter() - start)


async def measure(locks: Locks, sizes: Sizes) -> dict[str, float]:
    """All figures of one kind of locks."""
    acquired = await acquire_ms(locks, sizes)
    return {
        "lock_acquire_p50_ms": statistics.median(acquired),
        "lock_acquire_p99_ms": percentile(acquired, 0.99),
        "lock_handover_p50_ms": statistics.median(await handover_ms(locks, sizes)),
        "lock_death_s": max(await death_s(locks, sizes)),
        "lock_keys_per_s": await keys_per_s(locks, sizes),
        "lock_contended_per_s": await contended_per_s(locks, sizes),
    }


def ways() -> dict[str, Callable[[], AbstractAsyncContextManager[Locks]]]:
    """What is measured, by what it is called in the table."""
    # Installed in the recipe's own environment only.
    from tests.bench.peers.redis_lock import redis_locks  # noqa: PLC0415

    return {
        "agentflow": lambda: agentflow_locks(_CLIENTS),
        "redis_always": lambda: redis_locks(_CLIENTS, fsync=True),
        "redis_default": lambda: redis_locks(_CLIENTS, fsync=False),
        "redis_always_eager": lambda: redis_locks(_CLIENTS, fsync=True, sleep_s=0.001),
    }


TITLES: Final = {
    "agentflow": "AgentFlow (fsync)",
    "redis_always": "redis-py, appendfsync always",
    "redis_default": "redis-py, nothing on disk",
    "redis_always_eager": "appendfsync always, asking every 1 ms",
}


def table(found: dict[str, dict[str, float]]) -> Table:
    """The figures, one column for each kind of locks."""
    shown = Table(title="Distributed locks", title_justify="left")
    shown.add_column("", overflow="fold")
    for way in found:
        shown.add_column(TITLES[way], justify="right", overflow="fold")
    shown.add_column("target", justify="right")
    for key, (title, target) in targets().items():
        limit = "" if target is None else f"<= {target:g}"
        shown.add_row(title, *(f"{figures[key]:,.2f}" for figures in found.values()), limit)
    return shown


def targets() -> dict[str, tuple[str, float | None]]:
    """What is measured, and what it must not exceed."""
    title, _ = TARGETS["lock_death_s"]
    return {**TARGETS, "lock_death_s": (f"{title} (time to live {TTL_S} s)", TTL_S + _DEATH_MARGIN_S)}


async def run(sizes: Sizes, progress: Progress) -> dict[str, dict[str, float]]:
    """Measure one kind after the other."""
    found: dict[str, dict[str, float]] = {}
    for way, opened in progress.track(ways().items()):
        async with opened() as locks:
            found[way] = await measure(locks, sizes)
    return found


async def hold(url: str, key: str, ttl_s: int) -> None:
    """Hold a lock until killed."""
    async with Client(url, name="holder") as client, client.lock(key, ttl_s=ttl_s):
        print("held", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Measure, print the conditions, the table, and as the last line the JSON object."""
    if len(sys.argv) == 4:
        uvloop.run(hold(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each: does it work?")
    given = parser.parse_args()
    before = conditions(fsync=f"{FSYNC_ALWAYS}; Redis as the column says", packages=("redis", "hiredis"))
    before |= {"redis-server": command_version("redis-server", "--version").partition(" sha=")[0]}
    with Progress(console=Console(stderr=True)) as progress:
        found = uvloop.run(run(QUICK if given.quick else Sizes(), progress))
    show(before, table(found), width=140)
    flat = {
        (key if way == "agentflow" else f"{way}_{key}"): value
        for way, figures in found.items()
        for key, value in figures.items()
    }
    print_last_line(flat, before, lock_ttl_s=TTL_S)


if __name__ == "__main__":
    main()
