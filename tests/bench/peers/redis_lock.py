"""redis-py's `Lock`, asked the same as AgentFlow's locks.

As it comes: no order among those who wait, who ask again every 0.1 s (`sleep`); no renewal; its
token is random, so no resource can tell a late holder from the present one. Its `timeout` is
the time to live.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from typing import Final

import redis.asyncio  # type: ignore[import-not-found,unused-ignore]  # in its own environment
from redis.asyncio.lock import Lock  # type: ignore[import-not-found,unused-ignore]  # in its own environment
from redis.exceptions import LockNotOwnedError  # type: ignore[import-not-found,unused-ignore]  # in its own environment

from tests.bench.peers.processes import redis_server

SLEEP_S: Final = 0.1
_CONNECTIONS: Final = 20


class RedisLocks:
    """Locks of one Redis, from as many connections as asked for."""

    def __init__(self, url: str, clients: list[redis.asyncio.Redis], sleep_s: float) -> None:
        self.url = url
        self.module = "tests.bench.peers.redis_lock"
        self._clients = clients
        self._sleep_s = sleep_s

    async def acquire(self, client: int, key: str, ttl_s: int) -> Lock:
        """Wait until it is held."""
        lock = self._clients[client].lock(key, timeout=ttl_s, sleep=self._sleep_s)
        assert await lock.acquire()
        return lock

    @staticmethod
    async def release(lock: Lock) -> None:
        """Give it back. One that expired meanwhile, since nobody renews it, is no error here."""
        with contextlib.suppress(LockNotOwnedError):
            await lock.release()

    async def someone_waits(self, key: str) -> bool:
        """Whether a contender has come: nobody can know, so all have time to."""
        del key
        await asyncio.sleep(0.02)
        return True


@contextlib.asynccontextmanager
async def redis_locks(
    clients: int, *, fsync: bool, sleep_s: float = SLEEP_S
) -> AsyncGenerator[RedisLocks, None]:
    """A Redis of its own, which with `fsync` syncs each write before its answer."""
    with redis_server(fsync=fsync) as url:
        # By default a client raises once its connections are all in use.
        pools = [
            redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=None)
            for _ in range(clients)
        ]
        connected = [redis.asyncio.Redis(connection_pool=pool) for pool in pools]
        try:
            yield RedisLocks(url, connected, sleep_s)
        finally:
            for client in connected:
                await client.aclose()


async def hold(url: str, key: str, ttl_s: int) -> None:
    """Hold a lock until killed."""
    async with redis.asyncio.Redis.from_url(url) as client:
        assert await client.lock(key, timeout=ttl_s).acquire()
        print("held", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1], sys.argv[2], int(sys.argv[3])))
