"""What a bucket of leases promises: the suite that every adapter must pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

import pytest
from msgspec import structs

from agentflow.errors import Disconnected, LogGone
from agentflow.leases.port import Change, Entry, Lease, Leases, Removed
from tests.eventually import eventually

BUCKET = "AF_LEASES"
KEY = "leader.default"
LONG_S = 30
SHORT_S = 1


class Harness(Protocol):
    """Two holders on one bucket, and the power over their world."""

    leases: Leases
    other: Leases

    async def pass_ttl(self, lease: Lease) -> None:
        """Return when the lease has expired at the server and for its holder."""
        ...

    async def recreate(self) -> None:
        """Delete the bucket and create it again, empty."""
        ...

    async def delete(self) -> None:
        """Delete the bucket."""
        ...

    async def silence(self) -> None:
        """Let what `leases` writes arrive and what it is answered get lost, from now on."""
        ...

    async def stall(self) -> None:
        """Let the bucket answer nobody, from now on."""
        ...

    async def heal(self) -> None:
        """End all faults."""
        ...

    def now(self) -> float:
        """The holders' monotonic clock."""
        ...


async def held(leases: Leases, value: bytes = b"a", ttl_s: int = LONG_S, key: str = KEY) -> Lease:
    """A lease that must be free."""
    lease = await leases.acquire(key, value, ttl_s)
    assert lease is not None
    return lease


async def seen(leases: Leases, key: str = KEY) -> Entry:
    """A lease that must be there."""
    entry = await leases.read(key)
    assert entry is not None
    return entry


async def known(attempt: Callable[[], Awaitable[Lease | None]]) -> Lease:
    """The lease, once an attempt's outcome is known; it must be held."""

    async def settled() -> list[Lease | None] | None:
        try:
            return [await attempt()]
        except Disconnected:
            return None

    (lease,) = await eventually(settled)
    assert lease is not None
    return lease


class Watching:
    """Collects what a watch tells."""

    def __init__(self, leases: Leases, pattern: str, after: int) -> None:
        changes = leases.watch(pattern, after)
        assert isinstance(changes, AsyncGenerator)
        self._changes = changes
        self.told: list[Change] = []

    async def until(self, done: Callable[[list[Change]], bool]) -> list[Change]:
        """Everything told, as soon as it is enough."""
        async with asyncio.timeout(20):
            while not done(self.told):
                self.told += await anext(self._changes)
        return self.told

    async def close(self) -> None:
        """Watch no more."""
        await self._changes.aclose()


class LeasesConformance:
    """Subclasses bring a `harness` fixture."""

    # Holding.

    async def test_one_of_many_acquires(self, harness: Harness) -> None:
        contenders = [
            each.acquire(KEY, b"%d" % number, LONG_S)
            for number in range(5)
            for each in (harness.leases, harness.other)
        ]
        won = [lease for lease in await asyncio.gather(*contenders) if lease is not None]
        assert len(won) == 1
        assert (await seen(harness.other)).value == won[0].value

    async def test_a_renewal_keeps_the_epoch_and_moves_the_deadline(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        renewed = await harness.leases.renew(lease, b"b")
        assert renewed is not None
        assert (renewed.epoch, renewed.value) == (lease.epoch, b"b")
        assert renewed.revision > lease.revision
        assert lease.deadline <= renewed.deadline < harness.now() + lease.ttl_s
        entry = await seen(harness.other)
        assert (entry.epoch, entry.revision) == (lease.epoch, renewed.revision)
        assert (entry.value, entry.ttl_s) == (b"b", LONG_S)

    async def test_a_released_lease_is_free_and_its_epoch_past(self, harness: Harness) -> None:
        first = await held(harness.leases, b"a")
        await harness.leases.release(first)
        assert await harness.other.read(KEY) is None
        second = await held(harness.other, b"b")
        assert second.epoch > first.epoch
        assert await harness.leases.renew(first) is None
        await harness.leases.release(first)
        assert (await seen(harness.leases)).value == b"b", "only the holder gives back"

    async def test_a_lease_ends_by_itself_though_it_was_renewed(self, harness: Harness) -> None:
        lease = await harness.leases.renew(await held(harness.leases, ttl_s=SHORT_S))
        assert lease is not None
        await harness.pass_ttl(lease)
        assert await harness.leases.renew(lease) is None, "a holder whose key is gone has lost it"
        assert (await held(harness.other, b"b")).epoch > lease.epoch

    async def test_the_holder_gives_up_before_the_server_does(self, harness: Harness) -> None:
        lease = await held(harness.leases, ttl_s=SHORT_S)
        assert lease.deadline < harness.now() + SHORT_S

    # Lost answers.

    async def test_a_renewal_whose_answer_was_lost_is_found_out(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        await harness.silence()
        with pytest.raises(Disconnected):
            await harness.leases.renew(lease)
        await harness.heal()
        again = await known(lambda: harness.leases.renew(lease))
        assert again.epoch == lease.epoch
        assert (await seen(harness.other)).revision == again.revision

    async def test_an_acquisition_whose_answer_was_lost_is_ours_under_the_same_nonce(
        self, harness: Harness
    ) -> None:
        await harness.silence()
        with pytest.raises(Disconnected):
            await harness.leases.acquire(KEY, b"a", LONG_S, nonce="mine")
        written = await eventually(lambda: harness.other.read(KEY))
        await harness.heal()
        lease = await known(lambda: harness.leases.acquire(KEY, b"a", LONG_S, nonce="mine"))
        assert lease.epoch == written.epoch
        assert await harness.other.acquire(KEY, b"b", LONG_S, nonce="theirs") is None

    async def test_an_acquisition_unheard_of_can_be_given_back(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        await harness.leases.release(structs.replace(lease, epoch=0, revision=0))
        assert await harness.other.read(KEY) is None
        assert await harness.leases.renew(lease) is None

    async def test_a_release_after_a_renewal_unheard_of_frees_it(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        assert await harness.leases.renew(lease)
        await harness.leases.release(lease)  # by what it knew before the renewal
        assert await harness.other.read(KEY) is None

    async def test_a_bucket_that_stalls_leaves_the_old_deadline(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        await harness.stall()
        renewed, acquired = await asyncio.gather(
            harness.leases.renew(lease),
            harness.other.acquire("another", b"b", LONG_S),
            return_exceptions=True,
        )
        assert isinstance(renewed, Disconnected)
        assert isinstance(acquired, Disconnected)
        await harness.heal()
        assert (await known(lambda: harness.leases.renew(lease))).epoch == lease.epoch

    # Evicting.

    async def test_a_delayed_acquisition_of_ones_own_is_not_taken_for_the_lease_that_was_lost(
        self, harness: Harness
    ) -> None:
        """It was still under way when the lease was lost, and arrives after somebody else has held it."""
        first = await harness.leases.acquire(KEY, b"a", SHORT_S, nonce="aaaa")
        assert first is not None
        await harness.pass_ttl(first)
        second = await harness.other.acquire(KEY, b"b", LONG_S)
        assert second is not None
        await harness.other.release(second)
        late = await harness.leases.acquire(KEY, b"a", LONG_S, nonce="aaaa")
        assert late is not None
        assert late.epoch > second.epoch > first.epoch
        assert await harness.leases.renew(first) is None
        renewed = await harness.leases.renew(late)
        assert renewed is not None
        assert renewed.epoch == late.epoch

    async def test_an_evicted_holder_cannot_renew(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        assert await harness.other.evict(await seen(harness.other))
        assert await harness.leases.renew(lease) is None
        assert await harness.other.read(KEY) is None
        assert (await held(harness.other)).epoch > lease.epoch

    async def test_a_holder_who_wrote_is_not_evicted(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        entry = await seen(harness.other)
        lease = await known(lambda: harness.leases.renew(lease))
        assert not await harness.other.evict(entry)
        assert await harness.leases.renew(lease)

    async def test_evicting_what_has_expired_is_a_write_too(self, harness: Harness) -> None:
        lease = await held(harness.leases, ttl_s=SHORT_S)
        entry = await seen(harness.other)
        await harness.pass_ttl(lease)
        before = (await harness.other.entries(">")).revision
        assert await harness.other.evict(entry)
        assert (await harness.other.entries(">")).revision > before
        assert await harness.leases.renew(lease) is None

    async def test_of_eviction_and_renewal_one_wins(self, harness: Harness) -> None:
        for number in range(10):
            key = f"race.{number}"
            lease = await held(harness.leases, key=key)
            entry = await seen(harness.other, key)
            evicted, renewed = await asyncio.gather(harness.other.evict(entry), harness.leases.renew(lease))
            assert evicted == (renewed is None)
            assert (await harness.other.read(key) is None) == evicted

    async def test_two_who_evict_both_know_that_it_is_gone(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        entry = await seen(harness.other)
        assert await asyncio.gather(*(harness.other.evict(entry) for _ in range(3))) == [True] * 3
        assert await harness.leases.renew(lease) is None

    async def test_evicting_a_past_holder_leaves_the_present_one(self, harness: Harness) -> None:
        first = await held(harness.leases)
        entry = await seen(harness.other)
        await harness.leases.release(first)
        second = await held(harness.leases, b"b")
        assert await harness.other.evict(entry), "the past holder is gone for certain"
        assert await harness.leases.renew(second)

    # Reading.

    async def test_a_snapshot_has_all_in_the_order_of_acquisition(self, harness: Harness) -> None:
        leases = [await held(harness.leases, b"%d" % n, key=f"lock.{9 - n}") for n in range(5)]
        await held(harness.leases, key="other.1")
        await harness.leases.release(leases[3])
        assert await harness.leases.renew(leases[0])
        snapshot = await harness.other.entries("lock.*")
        assert [entry.value for entry in snapshot.entries] == [b"0", b"1", b"2", b"4"]
        assert [entry.epoch for entry in snapshot.entries] == [leases[n].epoch for n in (0, 1, 2, 4)]
        assert snapshot.revision >= max(entry.revision for entry in snapshot.entries)

    async def test_a_snapshot_of_nothing_is_empty_and_can_be_watched_from(self, harness: Harness) -> None:
        await held(harness.leases)
        snapshot = await harness.other.entries("lock.*")
        assert list(snapshot.entries) == []
        lease = await held(harness.leases, key="lock.1")
        watching = Watching(harness.other, "lock.*", snapshot.revision)
        (change,) = await watching.until(bool)
        assert isinstance(change, Entry)
        assert change.revision == lease.revision
        await watching.close()

    async def test_a_snapshot_holds_what_was_acknowledged_before(self, harness: Harness) -> None:
        for number in range(30):
            lease = await held(harness.leases, key=f"lock.{number}")
            snapshot = await harness.other.entries("lock.*")
            assert snapshot.entries[-1].epoch == lease.epoch
            assert len(snapshot.entries) == number + 1

    async def test_a_watch_tells_changes_in_order_and_removals(self, harness: Harness) -> None:
        first = await held(harness.leases, key="lock.1")
        snapshot = await harness.other.entries("lock.*")
        watching = Watching(harness.other, "lock.*", snapshot.revision)
        second = await held(harness.leases, key="lock.2")
        await held(harness.leases, key="elsewhere.1")
        await watching.until(lambda told: len(told) == 1)
        first = await known(lambda: harness.leases.renew(first))
        await watching.until(lambda told: len(told) == 2)
        await harness.leases.release(second)
        await watching.until(lambda told: len(told) == 3)
        await harness.other.evict(await seen(harness.other, "lock.1"))
        told = await watching.until(lambda told: len(told) == 4)
        assert [(each.key, type(each)) for each in told] == [
            ("lock.2", Entry),
            ("lock.1", Entry),
            ("lock.2", Removed),
            ("lock.1", Removed),
        ]
        assert isinstance(told[1], Entry)
        assert told[1].epoch == first.epoch
        await watching.close()

    async def test_a_watch_survives_a_stall(self, harness: Harness) -> None:
        watching = Watching(harness.leases, ">", 0)
        await held(harness.other, key="lock.1")
        await watching.until(lambda told: len(told) == 1)
        await harness.stall()
        await harness.heal()
        await known(lambda: harness.other.acquire("lock.2", b"", LONG_S, nonce="mine"))
        told = await watching.until(lambda told: len(told) >= 2)
        assert told[-1].key == "lock.2"
        await watching.close()

    # Buckets that go.

    async def test_a_bucket_created_again_ends_watches_and_leases(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        watching = Watching(harness.other, ">", 0)
        await watching.until(bool)
        await harness.recreate()
        with pytest.raises(LogGone):
            await watching.until(lambda _: False)
        assert await harness.leases.renew(lease) is None

    async def test_in_a_deleted_bucket_nothing_is_held(self, harness: Harness) -> None:
        lease = await held(harness.leases)
        entry = await seen(harness.other)
        await harness.delete()
        assert await harness.leases.renew(lease) is None
        await harness.leases.release(lease)
        with pytest.raises(LogGone):
            await harness.leases.acquire("another", b"", LONG_S)
        with pytest.raises(LogGone):
            await harness.other.entries(">")
        with pytest.raises(LogGone):
            await harness.other.evict(entry)
