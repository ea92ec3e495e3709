"""A master's seat: whose turn it is, and how long a leader stays. In simulated time, log and leases in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from agentflow import wire
from agentflow.domain.state import Namespace
from agentflow.ending import end_tasks
from agentflow.events import LeaderElected
from agentflow.frames import encode
from agentflow.leases.memory import MemoryLeases, MemoryLeaseServer
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Done, Frame, Reason, Refused
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.seat import Seat
from agentflow_nodes.master.sessions import Sessions
from agentflow_nodes.master.sharing import Session
from tests.unit.simulated import in_simulated_time

TTL_S = 3
NAMESPACE = "default"


class World:
    """A log, a bucket of leases, and masters."""

    def __init__(self) -> None:
        self.clock = asyncio.get_running_loop().time
        self.log_server = MemoryServer(self.clock)
        self.lease_server = MemoryLeaseServer(self.clock)
        self.log_server.create(NAMESPACE)
        self.log = MemoryLog(self.log_server, NAMESPACE)
        self.masters: list[Master] = []
        self._written = 0

    def start(self, name: str, level: int = 2, instance: str = "") -> Master:
        """A master, running."""
        self.masters.append(Master(self, name, level, instance or f"{name}-1"))
        return self.masters[-1]

    async def leader(self, name: str, level: int = 2) -> Master:
        """A master that leads already."""
        master = self.start(name, level)
        await self.until(lambda: master.leading)
        return master

    async def write(self, subject: str, data: bytes) -> None:
        """What somebody else puts into the log."""
        self._written += 1
        assert isinstance(await self.log.append(Frame(subject, data, f"x.{self._written}")), Done)

    async def ask_for_a_decision(self) -> None:
        """A submission that the leader has to refuse, by an event of his."""
        await self.write(wire.event(NAMESPACE, "task.submitted", "cli"), b'[{"nonsense":1}]')

    async def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> float:
        """Until it is so; how long that took."""
        begun = self.clock()
        while not condition():
            assert self.clock() - begun < within_s, {each.name: each.seat.standing for each in self.masters}
            await asyncio.sleep(0.01)
        return self.clock() - begun

    async def settled(self) -> None:
        """Until all know each other."""
        count = len(self.masters)
        await self.until(
            lambda: all(each.sessions.held and len(each.sessions.alive()) == count for each in self.masters)
        )


class Master:
    """One master with one seat."""

    def __init__(self, world: World, name: str, level: int, instance: str) -> None:
        self.name = name
        self._instance = instance
        config = MasterConfig(namespace=NAMESPACE, name=name, lease_ttl_s=TTL_S, level=level)
        self._seat: Seat | None = None
        self.sessions = Sessions(
            lambda: MemoryLeases(world.lease_server, wire.LEASE_BUCKET, name=name),
            TTL_S,
            self._describe,
            self._look,
            clock=world.clock,
        )
        log = MemoryLog(world.log_server, NAMESPACE)
        self._seat = Seat(log, config, instance, self.sessions, lambda _: None, clock=world.clock)
        self.tasks = [asyncio.ensure_future(self._sit(log)), asyncio.ensure_future(self.sessions.run())]

    async def _sit(self, log: MemoryLog) -> None:
        async with log:
            await self.seat.run()

    def _describe(self) -> Session:
        seats = {NAMESPACE: self._seat.report()} if self._seat is not None else {}
        return Session(self.name, self._instance, seats=seats, level=self.seat._config.level if seats else 1)

    def _look(self) -> None:
        self.seat.look()

    @property
    def seat(self) -> Seat:
        assert self._seat is not None
        return self._seat

    @property
    def state(self) -> Namespace:
        return self.seat.follower.state

    @property
    def leading(self) -> bool:
        return self.seat.leading

    async def kill(self) -> None:
        """End without a word."""
        await end_tasks(*self.tasks)

    async def leave(self) -> None:
        """End in good order."""
        await self.seat.leave()
        await self.sessions.leave()
        await end_tasks(*self.tasks)


@asynccontextmanager
async def opened() -> AsyncGenerator[World]:
    world = World()
    try:
        await world.log.__aenter__()
        yield world
    finally:
        await end_tasks(*(task for master in world.masters for task in master.tasks))


simulated = in_simulated_time(opened)


@simulated
async def test_another_leads_within_a_time_to_live_and_a_second_of_a_death(world: World) -> None:
    a = await world.leader("a")
    others = [world.start(name) for name in "bcd"]
    await world.settled()
    await a.kill()
    assert await world.until(lambda: any(each.leading for each in others)) <= TTL_S + 1
    assert others[0].state.epoch == 2, "one was elected, and only once"


@simulated
async def test_another_leads_at_once_when_one_leaves(world: World) -> None:
    a = await world.leader("a")
    b = world.start("b")
    await world.settled()
    await a.leave()
    assert await world.until(lambda: b.leading) < 0.2


@simulated
async def test_what_is_handed_over_goes_to_the_one_named(world: World) -> None:
    for name in "abcdef":
        await world.leader(name) if name == "a" else world.start(name)
    await world.settled()
    for giver, taker in (("a", "e"), ("e", "c"), ("c", "a")):
        by_name = {master.name: master for master in world.masters}
        by_name[giver].seat.hand_over(taker)
        assert await world.until(lambda: by_name[taker].leading) < 0.2  # noqa: B023 - awaited
    assert world.masters[0].state.epoch == 4


@simulated
async def test_a_leader_that_is_told_busy_for_long_makes_way(world: World) -> None:
    a = await world.leader("a")
    b = world.start("b")
    await world.settled()
    world.log_server.inject(*[Refused(Reason.BUSY, 10164, "another write is in flight")] * 20)
    world.log_server._faults.appendleft(None)  # type: ignore[arg-type] # the submission passes
    await world.ask_for_a_decision()
    took = await world.until(lambda: b.leading)
    assert 2 * TTL_S <= took <= 4 * TTL_S
    await world.until(lambda: not b.state.answers)
    assert not a.leading


@simulated
async def test_one_that_cannot_write_makes_way_at_once_when_asked(world: World) -> None:
    a = await world.leader("a")
    b = world.start("b")
    await world.settled()
    world.log_server.inject(*[Refused(Reason.FULL, 10077, "maximum bytes exceeded")] * 1_000)
    world.log_server._faults.appendleft(None)  # type: ignore[arg-type] # the submission passes
    await world.ask_for_a_decision()
    await asyncio.sleep(10 * TTL_S)
    assert a.leading, "nobody could do better"
    a.seat.hand_over("b")
    await world.until(lambda: not a.leading, within_s=1.0)
    world.log_server._faults.clear()
    await world.until(lambda: b.leading and not b.state.answers, within_s=1.0)


@simulated
async def test_one_elected_who_never_says_so_is_not_waited_for_for_ever(world: World) -> None:
    """Its session lives, but it does not read the log any more."""
    a = await world.leader("a", level=1)
    b = world.start("b", level=1)
    await world.settled()
    await end_tasks(b.tasks[0])
    election = encode([LeaderElected(epoch=2, master="b", level=1)])
    await world.write(wire.elected(NAMESPACE), election)
    await world.until(lambda: not a.leading, within_s=0.5)
    took = await world.until(lambda: a.leading)
    assert TTL_S < took <= 3 * TTL_S


@simulated
async def test_one_deposed_by_another_of_its_name_does_not_fight_for_its_place(world: World) -> None:
    first = await world.leader("a")
    second = world.start("a", instance="a-2")
    await end_tasks(first.tasks[1])  # its session is not renewed
    for _ in range(1_000 * 3 * TTL_S):
        await world.ask_for_a_decision()
        await asyncio.sleep(0.001)
    assert (first.state.epoch, first.leading, second.leading) == (2, False, True)


@simulated
async def test_one_deposed_does_not_contest_whom_the_log_names(world: World) -> None:
    """Although his session, which is on its way, does not say yet that he leads."""
    a = await world.leader("a")
    b = world.start("b")
    await world.settled()
    world.lease_server.hold_writes()
    campaign = asyncio.ensure_future(b.seat._campaign())
    await world.until(lambda: b.leading and not a.leading, within_s=0.5)
    until = world.clock() + 1.0
    while world.clock() < until:
        assert (a.state.leader, a.state.epoch) == ("b", 2)
        await asyncio.sleep(0.01)
    world.lease_server.let_go()
    await asyncio.sleep(2 * TTL_S)
    assert (a.state.leader, a.state.epoch) == ("b", 2)
    await end_tasks(campaign)


@simulated
async def test_noise_on_the_subject_of_elections_does_not_depose(world: World) -> None:
    a = await world.leader("a")
    b = world.start("b")
    await world.settled()
    for number in range(40):
        await world.write(wire.elected(NAMESPACE), b"noise %d" % number)
        await world.ask_for_a_decision()
        await world.until(lambda: a.state.rejected > number and not a.state.answers, within_s=1.0)  # noqa: B023
    assert a.state.leader == b.state.leader == "a"
    assert a.state.epoch == 41


@simulated
async def test_a_bucket_of_leases_that_is_away_deposes_nobody(world: World) -> None:
    a = await world.leader("a")
    world.start("b")
    await world.settled()
    world.lease_server.stop()
    await asyncio.sleep(5 * TTL_S)
    await world.ask_for_a_decision()
    await world.until(lambda: not a.state.answers, within_s=0.5)
    world.lease_server.start()
    await asyncio.sleep(3 * TTL_S)
    assert (a.leading, a.state.epoch) == (True, 1)


@simulated
async def test_the_level_does_not_rise_while_it_is_not_known_who_lives(world: World) -> None:
    old = await world.leader("old", level=1)
    new = world.start("new")
    await world.settled()
    old.seat.hand_over("new")
    await world.until(lambda: new.leading)
    world.lease_server.delete(wire.LEASE_BUCKET)
    for number in range(10):
        await world.write(wire.elected(NAMESPACE), b"noise %d" % number)
        await world.ask_for_a_decision()
        await asyncio.sleep(0.5)
        assert new.state.level == 1
    await old.leave()
    await world.until(lambda: new.state.level == 2 and new.leading)
