"""The line of a lock: who has to go before whom; and the way through it, on a bucket in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow import wire
from agentflow.errors import InvalidRequest, LockTimeout
from agentflow.events import Event, LockAcquired, LockLost, LockReleased
from agentflow.leases.memory import Fault, MemoryLeases, MemoryLeaseServer
from agentflow.leases.port import Change, Entry, Lease, Removed, Snapshot
from agentflow.locks.bucket import Opened
from agentflow.locks.lines import Lines, Waiting
from agentflow.locks.service import Locks
from agentflow.locks.ticket import Line, Mode, Ticket, in_lines
from tests.eventually import eventually

NAME = "a lock"


def entry(token: int, mode: Mode = Mode.EXCLUSIVE, permits: int = 1, *, revision: int = 0) -> Entry:
    """A ticket in the bucket, under the key of its token."""
    ticket = Ticket(name=NAME, holder=f"h{token}", mode=mode, permits=permits)
    key = wire.lock_key(NAME, str(token))
    return Entry(key, ticket.encoded(), ttl_s=10, epoch=token, revision=revision or token, seen=0.0)


def line(*entries: Entry) -> Line:
    """A line as read."""
    made = Line()
    made.learn(Snapshot(99, entries))
    return made


def before(made: Line, token: int) -> list[int]:
    """The tokens that have to go before one."""
    return [place.token for place in made.before(wire.lock_key(NAME, str(token)))]


def test_an_exclusive_ticket_waits_for_all_earlier_ones() -> None:
    made = line(entry(3), entry(1, Mode.SHARED), entry(2))
    assert [before(made, token) for token in (1, 2, 3)] == [[], [1], [1, 2]]


def test_a_shared_ticket_waits_for_earlier_exclusive_ones() -> None:
    made = line(*(entry(n, Mode.SHARED) for n in (1, 2, 4)), entry(3))
    assert [before(made, token) for token in (1, 2, 3, 4)] == [[], [], [1, 2], [3]]


def test_a_semaphore_lets_in_as_many_as_it_has_permits() -> None:
    made = line(*(entry(n, Mode.SEMAPHORE, 2) for n in (1, 2, 3, 4)))
    assert [bool(before(made, token)) for token in (1, 2, 3, 4)] == [False, False, True, True]


def test_a_semaphore_waits_for_those_who_use_it_differently() -> None:
    made = line(entry(1, Mode.SEMAPHORE, 3), entry(2), entry(3, Mode.SEMAPHORE, 3))
    assert before(made, 3) == [1, 2], "the second holds it alone as soon as the first is gone"
    assert before(line(entry(1, Mode.SEMAPHORE, 4), entry(2, Mode.SEMAPHORE, 3)), 2) == [1]


def test_a_removal_told_again_does_not_remove_what_came_later() -> None:
    made = line(entry(1), entry(2))
    made.apply(Entry(wire.lock_key(NAME, "1"), entry(1).value, 10, epoch=9, revision=9, seen=0.0))
    made.apply(Removed(wire.lock_key(NAME, "1"), 8))
    assert [place.token for place in made.places()] == [2, 9]


def test_an_expiry_is_no_removal() -> None:
    made = line(entry(1), entry(2))
    made.apply(Removed(wire.lock_key(NAME, "1"), 7, expired=True))
    assert before(made, 2) == [1]
    made.apply(Removed(wire.lock_key(NAME, "1"), 8))
    assert before(made, 2) == []


def test_what_was_seen_before_stays_seen_then() -> None:
    made = line(entry(1))
    late = Entry(wire.lock_key(NAME, "1"), entry(1).value, 10, epoch=1, revision=1, seen=9.0)
    made.apply(late)
    assert made.places()[0].entry.seen == 0.0
    made.apply(Entry(late.key, late.value, 10, epoch=1, revision=5, seen=9.0))
    assert made.places()[0].entry.seen == 9.0


def test_a_ticket_missing_in_a_later_reading_is_kept() -> None:
    made = line(entry(1), entry(2))
    made.learn(Snapshot(100, [entry(2)]))
    assert before(made, 2) == [1], "it may have expired, which is no removal"


def test_the_first_in_line_says_what_kind_of_lock_it_is() -> None:
    made = line(
        entry(1, Mode.SEMAPHORE, 3), entry(2), entry(3, Mode.SEMAPHORE, 3), entry(4, Mode.SEMAPHORE, 2)
    )
    made.require_agreement(wire.lock_key(NAME, "3"))
    with pytest.raises(InvalidRequest, match="exclusive access was asked for, but h1 uses it as a semaphore"):
        made.require_agreement(wire.lock_key(NAME, "2"))
    with pytest.raises(InvalidRequest, match=r"2 permits was asked for, but h1 .* 3 permits"):
        made.require_agreement(wire.lock_key(NAME, "4"))


@pytest.mark.parametrize("value", [b"by hand", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"], ids=len)
def test_what_is_no_ticket_blocks_until_it_is_silent_and_is_not_listed(value: bytes) -> None:
    foreign = Entry(wire.lock_key(NAME, "x"), value, 60, epoch=1, revision=1, seen=0.0)
    assert before(line(foreign, entry(2)), 2) == [1]
    assert in_lines([foreign]) == {}


@given(
    st.text(min_size=1, max_size=200).filter(lambda name: name.isprintable()),
    st.text(min_size=1, max_size=200),
)
def test_any_name_makes_one_token_of_its_own(one: str, two: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        tokens = [wire.lock_key(name, "t").split(".") for name in (one, two)]
        assert all(len(token) == 2 and token[1] == "t" for token in tokens)
        assert (tokens[0] == tokens[1]) == (one == two)
        assert wire.lock_keys(one) == f"{tokens[0][0]}.*"


class Said:
    """A log of what holders say."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.takes = asyncio.Event()
        self.takes.set()

    async def write(self, events: list[Event]) -> int:
        """Keep it, when the log takes anything."""
        await asyncio.sleep(0)
        await self.takes.wait()
        self.events += events
        return len(self.events)


class Watched(MemoryLeases):
    """Leases that count who reads and watches them, and whose watch does not tell of one holder's coming."""

    watches = 0
    readings = 0
    hidden = ""

    async def entries(self, pattern: str) -> Snapshot:
        """What is there, counted."""
        self.readings += 1
        return await super().entries(pattern)

    async def watch(self, pattern: str, after: int) -> AsyncGenerator[list[Change], None]:
        """What changes, counted."""
        self.watches += 1
        async for batch in super().watch(pattern, after):
            yield [change for change in batch if isinstance(change, Removed) or not self._hides(change)]

    def _hides(self, entry: Entry) -> bool:
        return bool(self.hidden) and self.hidden.encode() in entry.value


def locks_on(server: MemoryLeaseServer, said: Said, name: str, leases: MemoryLeases | None = None) -> Locks:
    """The locks of one process."""
    leases = leases or MemoryLeases(server, "locks", name=name)

    async def opened() -> Opened:
        await leases.__aenter__()
        return Opened(leases, 0, 0.0)

    return Locks(opened, said.write, find_bucket=opened)


@pytest.mark.parametrize("seed", range(5))
async def test_lost_answers_and_writes_neither_let_two_in_nor_anybody_starve(seed: int) -> None:
    dice = random.Random(seed)
    server, said = MemoryLeaseServer(time.monotonic), Said()
    inside: list[str] = []

    async def contend(name: str) -> None:
        locks = locks_on(server, said, name)
        for _ in range(3):
            server.inject(*dice.choices([Fault.ANSWER_LOST, Fault.WRITE_LOST], k=dice.randrange(3)))
            held = await locks.acquire(Ticket(name=NAME, holder=name), 1, None)
            assert inside == []
            inside.append(name)
            await asyncio.sleep(0)
            inside.remove(name)
            await held.release()
        await locks.close()

    await asyncio.gather(*(contend(f"p{number}") for number in range(4)))
    acquired = [event.token for event in said.events if isinstance(event, LockAcquired)]
    assert acquired == sorted(acquired)
    assert len(acquired) >= 12


async def test_in_a_bucket_made_again_nobody_is_granted_anything_at_first() -> None:
    server, said, now = MemoryLeaseServer(time.monotonic), Said(), time.monotonic()

    async def opened() -> Opened:
        leases = MemoryLeases(server, "locks", first_seq=2 << 32)
        await leases.__aenter__()
        return Opened(leases, 2, now + 0.3)

    locks = Locks(opened, said.write, find_bucket=opened)
    with pytest.raises(LockTimeout, match="its bucket was lost"):
        await locks.acquire(Ticket(name=NAME, holder="a"), 10, 0)
    held = await locks.acquire(Ticket(name=NAME, holder="a"), 10, None)
    assert time.monotonic() >= now + 0.3
    assert held.token >> 32 == 2
    await held.release()
    await locks.close()
    assert [type(event) for event in said.events] == [LockAcquired, LockReleased]


async def revision(leases: MemoryLeases) -> int:
    """When anybody in the line wrote last; 0 if nobody stands there."""
    entries = (await leases.entries(">")).entries
    return max((entry.revision for entry in entries), default=0)


async def test_a_ticket_is_kept_until_the_log_has_the_release() -> None:
    server, said = MemoryLeaseServer(time.monotonic), Said()
    one, two = locks_on(server, said, "one"), locks_on(server, said, "two")
    held = await one.acquire(Ticket(name=NAME, holder="one"), 1, None)
    said.takes.clear()
    releasing = asyncio.create_task(held.release())
    async with MemoryLeases(server, "locks") as looking:
        first = await revision(looking)
        await eventually(lambda: written_since(looking, first))
    assert not releasing.done()
    with pytest.raises(LockTimeout):
        await two.acquire(Ticket(name=NAME, holder="two"), 1, 0)
    said.takes.set()
    await releasing
    second = await two.acquire(Ticket(name=NAME, holder="two"), 1, None)
    assert [type(event) for event in said.events] == [LockAcquired, LockReleased, LockAcquired]
    await second.release()


async def written_since(leases: MemoryLeases, first: int) -> bool:
    """Whether anybody in the line has written since."""
    return await revision(leases) > first


async def test_a_release_is_waited_for_no_longer_than_the_ticket_is_kept() -> None:
    server, said = MemoryLeaseServer(time.monotonic), Said()
    locks = locks_on(server, said, "one")
    held = await locks.acquire(Ticket(name=NAME, holder="one"), 1, None)
    said.takes.clear()
    server.cut_off("one")
    await held.release()
    assert not held.lost.is_set(), "it was given back before"
    assert [type(event) for event in said.events] == [LockAcquired]


async def test_all_who_wait_in_one_process_share_a_watch_and_a_reading() -> None:
    server, said = MemoryLeaseServer(time.monotonic), Said()
    leases, looking = Watched(server, "locks"), MemoryLeases(server, "locks")
    locks = locks_on(server, said, "one", leases)
    await looking.__aenter__()
    served: list[int] = []

    async def wait(number: int) -> None:
        held = await locks.acquire(Ticket(name=NAME, holder=f"h{number}"), 10, None)
        served.append(number)
        await held.release()

    first = await locks.acquire(Ticket(name=NAME, holder="first"), 10, None)
    async with asyncio.TaskGroup() as waiters:
        for number in range(10):
            waiters.create_task(wait(number))
            await eventually(lambda standing=number + 2: stand_in_line(looking, standing))  # type: ignore[misc]
        await first.release()
    assert served == list(range(10))
    assert leases.watches == 1
    assert leases.readings < 6, "by the first, by who waits first, and then for all others at once"
    await locks.close()


async def test_nobody_is_granted_anything_by_what_the_watch_tells_alone() -> None:
    server, said = MemoryLeaseServer(time.monotonic), Said()
    leases, looking = Watched(server, "locks"), MemoryLeases(server, "locks")
    leases.hidden = "stranger"
    here, there = locks_on(server, said, "here", leases), locks_on(server, said, "there")
    await looking.__aenter__()
    first = await here.acquire(Ticket(name=NAME, holder="first"), 10, None)
    second = asyncio.create_task(here.acquire(Ticket(name=NAME, holder="second"), 10, None))
    await eventually(lambda: leases.watches == 1)
    stranger = asyncio.create_task(there.acquire(Ticket(name=NAME, holder="stranger"), 10, None))
    await eventually(lambda: stand_in_line(looking, 3))
    last = asyncio.create_task(here.acquire(Ticket(name=NAME, holder="last"), 10, None))
    await eventually(lambda: stand_in_line(looking, 4))
    before = leases.readings
    await first.release()
    await (await second).release()
    held = await stranger
    await eventually(lambda: leases.readings > before)
    assert not last.done()
    await held.release()
    await (await last).release()
    tokens = [event.token for event in said.events if isinstance(event, LockAcquired)]
    assert tokens == sorted(tokens)


async def stand_in_line(leases: MemoryLeases, count: int) -> bool:
    """Whether so many do."""
    return len((await leases.entries(">")).entries) == count


class Waiter:
    """Somebody who waits in the line of a bucket in memory, behind others."""

    def __init__(self, snapshot: Snapshot, key: str) -> None:
        self.line = Line()
        self.line.learn(snapshot)
        self.woken = asyncio.Event()
        self.waiting = Waiting(key, self.line, self.woken.set)
        self.since = snapshot.revision


async def test_who_joins_a_watch_is_told_what_changed_since_his_reading() -> None:
    async with MemoryLeases(MemoryLeaseServer(), "locks") as leases:
        one, two, three = [await stand(leases, number) for number in range(3)]
        snapshot = await leases.entries(">")
        early, late = Waiter(snapshot, two.key), Waiter(snapshot, three.key)
        lines = Lines(leases)
        watch = lines.join(">", early.waiting, early.since)
        assert watch is not None
        await leases.release(one)
        await early.woken.wait()
        assert [place.entry.key for place in late.line.before(three.key)] == [one.key, two.key]
        assert lines.join(">", late.waiting, late.since) is watch
        assert [place.entry.key for place in late.line.before(three.key)] == [two.key]
        assert not late.woken.is_set()
        await leases.release(two)
        await late.woken.wait()
        await lines.leave(">", watch, two.key)
        assert not watch.is_over
        await lines.leave(">", watch, three.key)
        assert watch.is_over


async def test_whose_reading_is_too_old_reads_again() -> None:
    async with MemoryLeases(MemoryLeaseServer(), "locks") as leases:
        one, two = [await stand(leases, number) for number in range(2)]
        old = Waiter(await leases.entries(">"), two.key)
        await leases.release(one)
        lines = Lines(leases)
        new = Waiter(await leases.entries(">"), two.key)
        watch = lines.join(">", new.waiting, new.since)
        assert watch is not None
        assert lines.join(">", old.waiting, old.since) is None
        await lines.leave(">", watch, two.key)


async def stand(leases: MemoryLeases, number: int, ttl_s: int = 10) -> Lease:
    """Take a place in line."""
    ticket = Ticket(name=NAME, holder=f"h{number}").encoded()
    lease = await leases.acquire(wire.lock_key(NAME, str(number)), ticket, ttl_s)
    assert lease is not None
    return lease


class Hasty(MemoryLeases):
    """Leases where all silent tickets go, and the watch tells so, before the first is taken away."""

    async def evict(self, entry: Entry) -> bool:
        """Take it away, after all others."""
        for each in (await self.entries(">")).entries:
            if each.ttl_s == entry.ttl_s and each.key != entry.key:
                await super().evict(each)
        for _ in range(20):
            await asyncio.sleep(0)
        return await super().evict(entry)


async def test_a_silent_ticket_that_goes_while_another_is_taken_away_is_left_alone() -> None:
    server, said = MemoryLeaseServer(lambda: 0.0), Said()
    async with MemoryLeases(server, "locks") as leases:
        for number in range(3):
            await stand(leases, number, ttl_s=1)
        locks = locks_on(server, said, "one", Hasty(server, "locks", clock=time.monotonic))
        held = await locks.acquire(Ticket(name=NAME, holder="one"), 10, None)
        await held.release()
    assert [type(event) for event in said.events] == [LockLost, LockAcquired, LockReleased]
