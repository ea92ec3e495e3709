"""The bucket of leases behind the network: the one in memory, asked through a node's link.

A question takes time on its way there and back, and gets lost where the link is cut. What was
not answered is not known: the write may have been carried out, or will never be.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

from msgspec.structs import replace

from agentflow.errors import Disconnected
from agentflow.leases.memory import MemoryLeases, MemoryLeaseServer
from agentflow.leases.port import MARGIN_SHARE, Change, Entry, Lease, Snapshot
from tests.sim.network import Link

T = TypeVar("T")

ANSWER_S: Final = 1.0


class SimLeases:
    """One process's bucket. See `agentflow.leases.port.Leases`."""

    def __init__(
        self,
        link: Link,
        server: MemoryLeaseServer,
        new_nonce: Callable[[], str],
        bucket: str,
        *,
        create: bool = True,
    ) -> None:
        self._link = link
        self._loop = link.network.loop
        self._leases = MemoryLeases(server, bucket, create=create)
        self._new_nonce = new_nonce

    async def __aenter__(self) -> Self:
        await self._over(self._leases.__aenter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    @property
    def first_seq(self) -> int:
        """See the port."""
        return self._leases.first_seq

    async def acquire(self, key: str, value: bytes, ttl_s: int, *, nonce: str | None = None) -> Lease | None:
        """See the port."""
        before = self._loop.time()
        nonce = nonce or self._new_nonce()
        return _from(before, await self._over(lambda: self._leases.acquire(key, value, ttl_s, nonce=nonce)))

    async def renew(self, lease: Lease, value: bytes | None = None) -> Lease | None:
        """See the port."""
        before = self._loop.time()
        return _from(before, await self._over(lambda: self._leases.renew(lease, value)))

    async def release(self, lease: Lease) -> None:
        """See the port."""
        await self._over(lambda: self._leases.release(lease))

    async def evict(self, entry: Entry) -> bool:
        """See the port."""
        return await self._over(lambda: self._leases.evict(entry))

    async def read(self, key: str) -> Entry | None:
        """See the port."""
        found = await self._over(lambda: self._leases.read(key))
        return None if found is None else replace(found, seen=self._loop.time())

    async def entries(self, pattern: str) -> Snapshot:
        """See the port."""
        found = await self._over(lambda: self._leases.entries(pattern))
        return replace(found, entries=_seen_at(found.entries, self._loop.time()))

    async def watch(self, pattern: str, after: int) -> AsyncGenerator[list[Change], None]:
        """See the port."""
        async for changes in self._leases.watch(pattern, after):
            await self._link.delivery()
            yield _seen_at(changes, self._loop.time())

    async def _over(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Ask, and wait for the answer: two messages either of which may get lost."""
        if not await self._link.until_connected(ANSWER_S):
            raise Disconnected("no connection")
        if not await self._link.ask(lambda: True, ANSWER_S, faulty=True):
            raise Disconnected("no answer: the question or the answer to it was lost")
        result = await operation()
        if not await self._link.ask(lambda: True, ANSWER_S, faulty=True):
            raise Disconnected("no answer: it may have been carried out")
        return result


def _from(before: float, lease: Lease | None) -> Lease | None:
    """The holder's deadline counts from before the send."""
    return None if lease is None else replace(lease, deadline=before + lease.ttl_s * (1 - MARGIN_SHARE))


def _seen_at(changes: Sequence[T], now: float) -> list[T]:
    """What reaches us is seen now."""
    return [replace(change, seen=now) if isinstance(change, Entry) else change for change in changes]
