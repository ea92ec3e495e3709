"""Sessions: which masters live, as each of them sees it. In simulated time, over leases in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from agentflow import wire
from agentflow.ending import end_tasks
from agentflow.frames import encode
from agentflow.leases.memory import Fault, MemoryLeases, MemoryLeaseServer
from agentflow_nodes.master.sessions import Sessions
from agentflow_nodes.master.sharing import SeatReport, Session, Standing
from tests.unit.simulated import in_simulated_time

TTL_S = 3
BUCKET = wire.LEASE_BUCKET


class World:
    """A bucket of leases and the masters around it."""

    def __init__(self) -> None:
        self.clock = asyncio.get_running_loop().time
        self.server = MemoryLeaseServer(self.clock)
        self.masters: list[Master] = []

    def start(self, name: str, instance: str = "") -> Master:
        """A master's sessions, running."""
        master = Master(self, name, instance or f"{name}-{len(self.masters)}")
        self.masters.append(master)
        return master

    def leases(self, name: str = "stranger") -> MemoryLeases:
        """The bucket, as somebody reaches it."""
        first_seq = 1 + int(self.clock() * 1_000)
        return MemoryLeases(self.server, BUCKET, name=name, first_seq=first_seq)

    async def settled(self, *names: str) -> None:
        """Until all living masters know each other, and nobody else."""
        await self.until(lambda: all(each.held and each.known == set(names) for each in self.living))

    @property
    def living(self) -> list[Master]:
        return [master for master in self.masters if not master.task.done()]

    async def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> float:
        """Until it is so; how long that took."""
        begun = self.clock()
        while not condition():
            assert self.clock() - begun < within_s, {each.name: sorted(each.known) for each in self.living}
            await asyncio.sleep(0.01)
        return self.clock() - begun

    async def never(self, condition: Callable[[], bool], for_s: float) -> None:
        """It is not so, for a while."""
        until = self.clock() + for_s
        while self.clock() < until:
            assert not condition()
            await asyncio.sleep(0.01)


class Master:
    """One master's sessions, and what it says of itself."""

    def __init__(self, world: World, name: str, instance: str) -> None:
        self.name = name
        self.instance = instance
        self.standing = Standing.FOLLOWER
        self.told = 0
        self.sessions = Sessions(
            lambda: world.leases(name), TTL_S, self._describe, self._on_change, clock=world.clock
        )
        self.task = asyncio.ensure_future(self.sessions.run())

    def _describe(self) -> Session:
        return Session(self.name, self.instance, seats={"x": SeatReport(self.standing)})

    def _on_change(self) -> None:
        self.told += 1

    @property
    def held(self) -> bool:
        return self.sessions.held

    @property
    def known(self) -> set[str]:
        """Of whom it knows that they live."""
        return {session.name for session in self.sessions.alive()}

    def of(self, name: str) -> Session:
        return next(session for session in self.sessions.alive() if session.name == name)

    async def kill(self) -> None:
        """End without a word."""
        await end_tasks(self.task)

    async def leave(self) -> None:
        """End in good order."""
        await self.sessions.leave()
        await end_tasks(self.task)


@asynccontextmanager
async def opened() -> AsyncGenerator[World]:
    world = World()
    try:
        yield world
    finally:
        await end_tasks(*(master.task for master in world.masters))


simulated = in_simulated_time(opened)


@simulated
async def test_all_know_all(world: World) -> None:
    for name in "abc":
        world.start(name)
    await world.settled("a", "b", "c")
    await world.never(lambda: not all(each.held for each in world.masters), 5 * TTL_S)
    assert [each.known for each in world.masters] == [{"a", "b", "c"}] * 3


@simulated
async def test_what_one_says_is_told_at_once(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    told = b.told
    a.standing = Standing.LEADER
    a.sessions.touch()
    await world.until(lambda: b.of("a").stands("x", Standing.LEADER), within_s=0.1)
    assert b.told > told


@simulated
async def test_one_who_leaves_is_gone_at_once(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    a.sessions.touch()  # also while it is about to renew
    await a.leave()
    await world.until(lambda: b.known == {"b"}, within_s=0.1)
    await world.never(lambda: "a" in b.known, 2 * TTL_S)


@simulated
async def test_one_who_leaves_while_it_renews_does_not_come_back(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    world.server.hold_answers()
    a.sessions.touch()
    await asyncio.sleep(0.01)
    leaving = asyncio.ensure_future(a.sessions.leave())
    await asyncio.sleep(0.01)
    world.server.let_go()
    await leaving
    await world.until(lambda: b.known == {"b"}, within_s=0.1)
    await world.never(lambda: "a" in b.known, 2 * TTL_S)


@simulated
async def test_one_who_is_silent_is_evicted_after_a_time_to_live(world: World) -> None:
    a, b, c = (world.start(name) for name in "abc")
    await world.settled("a", "b", "c")
    await a.kill()
    took = await world.until(lambda: b.known == c.known == {"b", "c"})
    assert TTL_S * 0.6 <= took <= TTL_S + 0.1
    await world.never(lambda: not (b.held and c.held), 2 * TTL_S)


@simulated
async def test_of_several_who_evict_one_does(world: World) -> None:
    names = [f"m{number}" for number in range(8)]
    masters = [world.start(name) for name in names]
    await world.settled(*names)
    await masters[0].kill()
    await masters[1].kill()
    await world.settled(*names[2:])
    async with world.leases() as leases:
        assert {entry.key for entry in (await leases.entries("master.*")).entries} == {
            wire.master_session(name) for name in names[2:]
        }


@simulated
async def test_one_cut_off_is_evicted_and_comes_back(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    world.server.cut_off("a")
    await world.until(lambda: b.known == {"b"}, within_s=TTL_S + 0.1)
    assert not a.held, "its own deadline has passed before"
    world.server.heal("a")
    await world.settled("a", "b")


@simulated
async def test_nobody_is_evicted_on_account_of_ones_own_outage(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    world.server.cut_off("a")
    await asyncio.sleep(3 * TTL_S)
    assert "b" in a.known, "it is a who hears nothing"
    world.server.heal("a")
    await world.never(lambda: "b" not in a.known or not b.held, 3 * TTL_S)


@simulated
async def test_a_bucket_that_stalls_costs_nobody_his_place(world: World) -> None:
    """Whoever reaches it first, at whatever moment it is back."""
    masters = []
    for name in "abcd":
        masters.append(world.start(name))
        await asyncio.sleep(0.23)
    await world.settled(*"abcd")
    for tenths in range(2, 60, 3):
        world.server.stop()
        await asyncio.sleep(tenths / 10)
        world.server.start()
        await world.never(lambda: any(each.known != set("abcd") for each in masters), 1.5 * TTL_S)
        assert all(each.held for each in masters)


@simulated
async def test_a_bucket_that_stores_late_costs_nobody_his_place(world: World) -> None:
    masters = [world.start(name) for name in "abc"]
    await world.settled(*"abc")
    world.server.hold_writes()
    await asyncio.sleep(2 * TTL_S)
    world.server.let_go()
    await world.never(lambda: any(each.known != set("abc") for each in masters), 3 * TTL_S)
    assert all(each.held for each in masters)


@simulated
async def test_answers_that_are_lost_cost_nobody_his_place(world: World) -> None:
    masters = [world.start(name) for name in "ab"]
    await world.settled(*"ab")
    for _ in range(10):
        world.server.inject(Fault.ANSWER_LOST, Fault.WRITE_LOST, Fault.ANSWER_LOST)
        await world.never(lambda: any(each.known != set("ab") for each in masters), TTL_S)
    assert all(each.held for each in masters)


@simulated
async def test_an_acquisition_whose_answer_is_lost_is_ones_own(world: World) -> None:
    world.server.inject(Fault.ANSWER_LOST)
    a = world.start("a")
    assert await world.until(lambda: a.held) < 1.0


@simulated
async def test_a_bucket_deleted_is_made_again_and_all_are_still_there(world: World) -> None:
    masters = [world.start(name) for name in "abc"]
    await world.settled(*"abc")
    world.server.delete(BUCKET)
    await world.never(
        lambda: any(each.known - {each.name} != set("abc") - {each.name} for each in masters), 10
    )
    assert all(each.held for each in masters)


@simulated
async def test_one_who_died_with_the_bucket_is_gone_a_time_to_live_later(world: World) -> None:
    a, b, c = (world.start(name) for name in "abc")
    await world.settled("a", "b", "c")
    await c.kill()
    world.server.delete(BUCKET)
    took = await world.until(lambda: a.known == b.known == {"a", "b"})
    assert TTL_S <= took <= 2 * TTL_S


@simulated
async def test_ones_own_session_removed_by_hand_is_taken_anew(world: World) -> None:
    a, b = world.start("a"), world.start("b")
    await world.settled("a", "b")
    async with world.leases() as leases:
        entry = await leases.read(wire.master_session("a"))
        assert entry is not None
        assert await leases.evict(entry)
    await world.until(lambda: "a" not in b.known, within_s=0.1)
    assert await world.until(lambda: a.held and "a" in b.known) < TTL_S


@simulated
async def test_of_two_with_one_name_the_second_waits_until_the_first_is_gone(world: World) -> None:
    first = world.start("a", "first")
    await world.settled("a")
    second = world.start("a", "second")
    await world.never(lambda: second.held or not first.held, 4 * TTL_S)
    assert [session.instance for session in second.sessions.alive()] == ["first"]
    await first.kill()
    assert await world.until(lambda: second.held) <= TTL_S + 0.5
    assert [session.instance for session in second.sessions.alive()] == ["second"]


@simulated
async def test_a_name_that_is_given_back_is_free_at_once(world: World) -> None:
    first = world.start("a", "first")
    await world.settled("a")
    second = world.start("a", "second")
    await asyncio.sleep(1)
    await first.leave()
    assert await world.until(lambda: second.held) < 0.5


@simulated
async def test_junk_is_no_master_and_goes(world: World) -> None:
    a = world.start("a")
    await world.settled("a")
    async with world.leases() as leases:
        for name, value in {
            "junk": b"\xff{",
            "empty": b"",
            "number": b"7",
            "deep": b'{"name":"deep","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "false-seats": b'{"name":"false-seats","instance":"i","seats":{"x":{"standing":"king"}}}',
            "liar": encode(Session("a", "b", seats={"x": SeatReport(Standing.LEADER, 99)})),
        }.items():
            assert await leases.acquire(wire.master_session(name), value, TTL_S) is not None
    await world.until(lambda: {"junk", "deep", "liar"} <= a.known)
    assert all(not each.seats for each in a.sessions.alive() if each.instance != a.instance)
    await world.until(lambda: a.known == {"a"}, within_s=TTL_S + 1)
    assert a.held


@simulated
async def test_junk_under_ones_own_name_is_waited_out(world: World) -> None:
    async with world.leases() as leases:
        assert await leases.acquire(wire.master_session("a"), b"junk", 60) is not None
    a = world.start("a")
    await world.never(lambda: a.held, 50)
    await world.until(lambda: a.held, within_s=15)
