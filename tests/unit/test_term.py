"""One term of a leader: how it is won, and that nothing is planned on less than what was written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from agentflow import wire
from agentflow.domain.state import Ended
from agentflow.ending import end_tasks
from agentflow.events import Event, TaskAssigned, TaskSubmitted, WorkerJoined
from agentflow.frames import encode
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Frame, Message
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.follower import Follower
from agentflow_nodes.master.leader import End, Leader

NAMESPACE = "default"
TURNS = 200
"""More turns of the event loop than anything here takes."""


class Master:
    """A leader and the fold it plans on."""

    def __init__(self, log: MemoryLog, name: str) -> None:
        self.follower = Follower(log, self._on_folded)
        self.leader = Leader(log, self.follower, MasterConfig(name=name), list)

    def _on_folded(self, _ended: Sequence[Ended]) -> None:
        self.leader.wake()


async def _turns(until: Callable[[], bool] = lambda: False) -> None:
    for _ in range(TURNS):
        if until():
            return
        await asyncio.sleep(0)


async def _say(log: MemoryLog, actor: str, event: Event) -> None:
    await log.append(
        Frame(wire.event(NAMESPACE, event.kind, actor), encode([event]), f"{actor}.{event.kind}")
    )


async def test_of_two_at_once_one_is_elected_and_the_log_holds_one_election() -> None:
    server = MemoryServer()
    async with MemoryLog(server, NAMESPACE) as log:
        masters = [Master(log, name) for name in ("m1", "m2")]
        following = [asyncio.create_task(master.follower.run()) for master in masters]
        elected = await asyncio.gather(*(master.leader.elect() for master in masters))
        await end_tasks(*following)
        assert sorted(elected) == [False, True]
        assert (await log.identity()).last_seq == 1, "the loser left its election in the log"


async def test_nothing_is_planned_before_what_was_written_is_read_back() -> None:
    server = MemoryServer()
    async with MemoryLog(server, NAMESPACE) as log:
        await _say(log, "w1", WorkerJoined(instance="i", slots=8, functions=["f"]))
        await _say(log, "cli", TaskSubmitted(id="a", function="f"))
        master = Master(log, "m1")
        following = asyncio.create_task(master.follower.run())
        assert await master.leader.elect()
        await _turns(lambda: master.follower.state.queue.size == 1)
        await end_tasks(following)  # from here on it writes, and hears nothing of it
        term = asyncio.create_task(master.leader.lead())
        await _turns()
        await end_tasks(term)
        assert await _assigned(server) == ["a"], "assigned again and again, for want of having read it"


async def test_a_leader_at_rest_notices_that_another_was_elected() -> None:
    server = MemoryServer()
    async with MemoryLog(server, NAMESPACE) as log:
        first, second = Master(log, "m1"), Master(log, "m2")
        following = [asyncio.create_task(master.follower.run()) for master in (first, second)]
        assert await first.leader.elect()
        term = asyncio.create_task(first.leader.lead())
        await _turns()
        assert await second.leader.elect()
        await _turns(term.done)
        deposed = term.done() and term.result()
        await end_tasks(term, *following)
        assert deposed is End.DEPOSED


async def test_of_two_with_one_name_the_later_is_a_successor_and_is_not_contested() -> None:
    server = MemoryServer()
    async with MemoryLog(server, NAMESPACE) as log:
        first, namesake, again = (Master(log, "m") for _ in range(3))
        following = [asyncio.create_task(master.follower.run()) for master in (first, namesake, again)]
        assert await first.leader.elect()
        assert await namesake.leader.elect()
        unheard = {first.leader.signature}
        assert not await again.leader.elect(after=first.leader.elected_seq, unheard=unheard)
        await end_tasks(*following)
        assert again.leader.deposed
        assert (await log.identity()).last_seq == 2


async def test_an_election_of_ones_own_of_which_nothing_was_heard_is_no_successor() -> None:
    server = MemoryServer()
    async with MemoryLog(server, NAMESPACE) as log:
        first, unheard, again = (Master(log, "m") for _ in range(3))
        following = [asyncio.create_task(master.follower.run()) for master in (first, unheard, again)]
        assert await first.leader.elect()
        assert await unheard.leader.elect()
        after = first.leader.elected_seq
        assert await again.leader.elect(after=after, unheard={unheard.leader.signature})
        await end_tasks(*following)
        assert again.follower.state.epoch == 3


async def _assigned(server: MemoryServer) -> list[str]:
    messages: Sequence[Message] = server.streams[NAMESPACE].messages
    subject = wire.event(NAMESPACE, TaskAssigned.kind, "w1")
    return ["a" for message in messages if message.subject == subject]
