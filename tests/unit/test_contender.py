"""A contender at the front of the line, why he may not have the lock all the same, and how he leaves."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from agentflow.errors import AppendUnknown, LockTimeout
from agentflow.events import Event
from agentflow.leases.memory import MemoryLeases, MemoryLeaseServer
from agentflow.leases.port import Snapshot
from agentflow.locks.bucket import Opened
from agentflow.locks.contender import Contender, TicketLost
from agentflow.locks.lines import Lines
from agentflow.locks.ticket import Ticket

TTL_S = 10


class Scene:
    """One contender, the clock, and a log that takes as long as it is told to."""

    def __init__(self) -> None:
        self.server = MemoryLeaseServer()
        self.ahead_s = 0.0
        self.log_takes_s = 0.0
        self.log_answers = True
        self.said: list[str] = []

    def clock(self) -> float:
        return self.server.now + self.ahead_s

    async def write(self, events: list[Event]) -> int:
        self.said += [event.kind for event in events]
        self.ahead_s += self.log_takes_s
        if not self.log_answers:
            raise AppendUnknown("no answer")
        return len(self.said)

    @asynccontextmanager
    async def contender(
        self, leases: MemoryLeases, *, granting_in_s: float = 0.0
    ) -> AsyncGenerator[Contender]:
        async with leases:
            opened = Opened(leases, 0, self.clock() + granting_in_s)
            contender = Contender(
                opened,
                Ticket(name="door", holder="a"),
                TTL_S,
                self.write,
                lines=Lines(leases),
                clock=self.clock,
                deadline=self.clock(),
            )
            yield contender
            await contender.give_up()

    def leases(self) -> MemoryLeases:
        return MemoryLeases(self.server, "locks", clock=self.clock)


class Blind(MemoryLeases):
    """Reads a line in which nobody stands."""

    async def entries(self, pattern: str) -> Snapshot:
        return Snapshot((await super().entries(pattern)).revision, ())


async def test_who_stands_alone_holds_it() -> None:
    scene = Scene()
    async with scene.contender(scene.leases()) as contender:
        assert (await contender.acquire()).is_held()
    assert scene.said[0] == "lock.acquired"


async def test_who_is_late_when_the_log_has_it_holds_nothing() -> None:
    scene = Scene()
    scene.log_takes_s = TTL_S
    async with scene.contender(scene.leases()) as contender:
        with pytest.raises(TicketLost):
            await contender.acquire()


async def test_in_a_bucket_made_again_nobody_holds_before_the_others_gave_up() -> None:
    scene = Scene()
    async with scene.contender(scene.leases(), granting_in_s=60.0) as contender:
        with pytest.raises(LockTimeout, match="not surely given up"):
            await contender.acquire()
    assert not scene.said


async def test_whose_ticket_is_gone_holds_nothing() -> None:
    scene = Scene()
    async with scene.contender(Blind(scene.server, "locks", clock=scene.clock)) as contender:
        with pytest.raises(TicketLost, match="no longer there"):
            await contender.acquire()
    assert not scene.said


async def tickets(leases: MemoryLeases) -> int:
    """How many stand in line."""
    return len((await leases.entries(">")).entries)


async def test_a_ticket_goes_when_its_end_is_in_the_log() -> None:
    scene = Scene()
    leases = scene.leases()
    async with scene.contender(leases) as contender:
        held = await contender.acquire()
        await held.release()
        assert scene.said == ["lock.acquired", "lock.released"]
        assert await tickets(leases) == 0


async def test_a_ticket_whose_end_may_be_stored_later_is_left_to_expire() -> None:
    scene = Scene()
    leases = scene.leases()
    async with scene.contender(leases) as contender:
        held = await contender.acquire()
        scene.log_answers = False
        await held.release()
        assert not held.is_held()
        assert not held.lost.is_set()
        assert await tickets(leases) == 1
        scene.log_answers = True


async def test_who_gives_up_what_the_log_may_call_his_leaves_the_ticket_too() -> None:
    scene = Scene()
    leases = scene.leases()
    async with scene.contender(leases) as contender:
        scene.log_answers = False
        with pytest.raises(AppendUnknown):
            await contender.acquire()
        with pytest.raises(AppendUnknown):
            await contender.give_up()
        assert await tickets(leases) == 1
        scene.log_answers = True
