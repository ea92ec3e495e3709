"""Several masters against a real server: who leads what, and who goes on leading whatever happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import agentflow
from agentflow import frames, wire
from agentflow.bus import Bus
from agentflow.errors import AgentFlowError
from agentflow.events import LeaderElected, MasterJoined
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Fence, Frame, Reason, Refused
from agentflow_nodes.master.node import Master
from agentflow_nodes.master.sharing import Standing
from tests.app import add
from tests.cluster import Cluster, audit
from tests.eventually import eventually
from tests.servers import NatsServer

SOON_S = 15.0
BUCKET = wire.bucket_stream(wire.LEASE_BUCKET)
LONG_TTL_S = 600
"""A time to live that no test waits for."""


def loads(masters: Sequence[Master]) -> list[int]:
    """How many namespaces each leads, in order."""
    return sorted(sum(seat.leading for seat in master.seats.values()) for master in masters)


def leaders(masters: Sequence[Master]) -> Counter[str]:
    """How many masters lead each namespace."""
    return Counter(name for master in masters for name, seat in master.seats.items() if seat.leading)


def epochs(masters: Sequence[Master]) -> dict[str, int]:
    """The epoch of each namespace, as the first knows it."""
    return {name: seat.follower.state.epoch for name, seat in masters[0].seats.items()}


def settled(masters: Sequence[Master]) -> bool:
    """Whether all know each other."""
    names = {master.config.name for master in masters}
    return all(
        master._sessions.held and {session.name for session in master._sessions.alive()} == names
        for master in masters
    )


async def elections(client: agentflow.Client) -> list[tuple[str, int]]:
    """Whose elections counted, and with which level."""
    found = await audit(client)
    events: list[Any] = [
        logged.event
        for logged in found.of_kind("leader.elected")
        if str(found.verdicts[logged.seq, logged.index].kind) == "applied"
    ]
    return [(event.master, event.level) for event in events]


class TestSharingOut:
    NAMESPACES = tuple(f"n{number:02}" for number in range(12))

    async def test_three_masters_share_twelve_namespaces_evenly(self, cluster: Cluster) -> None:
        masters = [await cluster.master(name=name, namespaces=self.NAMESPACES) for name in "abc"]
        await eventually(lambda: loads(masters) == [4, 4, 4], within_s=60)
        assert leaders(masters) == Counter(self.NAMESPACES)
        before = epochs(masters)
        client = await cluster.client(namespace="n07")
        await cluster.worker(namespace="n07")
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert epochs(masters) == before, "once they are even nothing moves"

    async def test_one_that_leaves_hands_all_over_at_once(self, cluster: Cluster) -> None:
        masters = [await cluster.master(name=name, namespaces=self.NAMESPACES) for name in "abc"]
        await eventually(lambda: loads(masters) == [4, 4, 4], within_s=60)
        before = {name: seat.leading for name, seat in masters[1].seats.items()}
        await masters[0].__aexit__(None, None, None)
        left = masters[1:]
        await eventually(lambda: loads(left) == [6, 6])
        assert all(masters[1].seats[name].leading for name, led in before.items() if led), "others stay"

    async def test_who_waits_for_no_time_to_live(self, cluster: Cluster) -> None:
        """Leaving is told, not waited for."""
        first = await cluster.leader(name="first", lease_ttl_s=LONG_TTL_S)
        second = await cluster.master(name="second", lease_ttl_s=LONG_TTL_S)
        await eventually(lambda: settled([first, second]))
        await first.__aexit__(None, None, None)
        await eventually(lambda: second.leading, within_s=SOON_S)

    async def test_namespaces_are_found_as_they_come(self, cluster: Cluster) -> None:
        await cluster.client(namespace="early")
        stranger = await cluster.client(namespace="other")
        config = {"name": "AF_strange", "subjects": ["strange.>"], "storage": "file"}
        await stranger.bus.js_api("STREAM.CREATE.AF_strange", frames.encode(config), 5.0)
        masters = [await cluster.master(name=name, discover=True) for name in "ab"]
        await eventually(lambda: leaders(masters) == Counter(["early", "other"]))
        client = await cluster.client(namespace="late")
        await cluster.worker(namespace="late")
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert leaders(masters)["late"] == 1
        assert "strange" not in masters[0].seats

    async def test_a_namespace_whose_log_is_gone_stops_nothing_else(self, cluster: Cluster) -> None:
        master = await cluster.master(namespaces=("gone", "stays"))
        await eventually(lambda: loads([master]) == [2])
        client = await cluster.client(namespace="stays")
        await client.bus.js_api("STREAM.DELETE.AF_gone", b"", 5.0)
        await cluster.worker(namespace="stays")
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert master.seats["stays"].leading


class TestWhatTheLeasesDo:
    async def test_a_session_taken_away_by_hand_costs_a_leader_without_rivals_nothing(
        self, cluster: Cluster
    ) -> None:
        master = await cluster.leader(name="a")
        client = await cluster.client()
        await cluster.worker()
        lease = master._sessions._lease
        assert lease is not None
        purge = {"filter": wire.bucket_subject(wire.LEASE_BUCKET, wire.master_session("a"))}
        await client.bus.js_api(f"STREAM.PURGE.{BUCKET}", frames.encode(purge), 5.0)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3

        def anew() -> bool:
            own = master._sessions._lease
            return own is not None and own.epoch > lease.epoch

        await eventually(anew)
        assert await elections(client) == [("a", 2)]

    async def test_the_bucket_deleted_is_made_again_and_leadership_does_not_change_hands(
        self, cluster: Cluster
    ) -> None:
        masters = [await cluster.master(name=name, namespaces=("x", "y", "z")) for name in "abc"]
        await eventually(lambda: loads(masters) == [1, 1, 1] and settled(masters), within_s=30)
        before = epochs(masters)
        client = await cluster.client(namespace="x")
        await cluster.worker(namespace="x")
        for _ in range(2):
            leases = [master._sessions._lease for master in masters]
            await client.bus.js_api(f"STREAM.DELETE.{BUCKET}", b"", 5.0)
            assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
            await eventually(lambda: all(each._sessions._lease not in leases for each in masters))  # noqa: B023
            await eventually(lambda: settled(masters))
        assert epochs(masters) == before
        assert loads(masters) == [1, 1, 1]


@pytest.fixture
async def users() -> AsyncIterator[Users]:
    """A server where the rights of a user called master can be changed."""
    async with NatsServer(extra=Users.rights(())) as server:
        yield Users(server)


class Users:
    """Changes the rights of one user of a running server."""

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.limited = f"nats://limited:p@127.0.0.1:{server.port}"
        self.free = f"nats://free:p@127.0.0.1:{server.port}"

    @staticmethod
    def rights(denied: Sequence[str]) -> str:
        deny = ", ".join(f'"{subject}"' for subject in denied)
        return f"""authorization {{ users: [
            {{ user: limited, password: p, permissions: {{ publish: {{ deny: [{deny}] }} }} }}
            {{ user: free, password: p }}
        ] }}"""

    async def deny(self, *subjects: str) -> None:
        """Let the limited user publish there no more, from now on."""
        self.server._extra = self.rights(subjects)
        await self.server.reload()


class TestWhoCannotWrite:
    LEASES = f"$KV.{wire.LEASE_BUCKET}.>"

    async def test_a_leader_that_cannot_renew_but_write_goes_on(self, users: Users) -> None:
        async with Cluster(users.server) as cluster:
            master = await cluster.leader(url=users.limited)
            client = await cluster.client(url=users.free)
            await cluster.worker(url=users.free)
            await users.deny(self.LEASES)
            await eventually(lambda: not master._sessions.held)
            assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
            assert master.leading
            assert len(await elections(client)) == 1

    async def test_until_somebody_else_is_elected(self, users: Users) -> None:
        async with Cluster(users.server) as cluster:
            first = await cluster.leader(name="first", url=users.limited)
            second = await cluster.master(name="second", url=users.free)
            await eventually(lambda: settled([first, second]))
            client = await cluster.client(url=users.free)
            await cluster.worker(url=users.free)
            await users.deny(self.LEASES)
            await eventually(lambda: second.leading and not first.leading)
            assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
            assert [name for name, _ in await elections(client)] == ["first", "second"]
            assert first.seats["default"].standing is Standing.FOLLOWER

    @pytest.mark.parametrize("denied", ["af.default.>", "af.default.task.>"])
    async def test_a_leader_that_may_not_write_its_decisions_steps_down(
        self, users: Users, denied: str
    ) -> None:
        """Also one that can still be elected."""
        async with Cluster(users.server) as cluster:
            first = await cluster.leader(name="first", url=users.limited)
            second = await cluster.master(name="second", url=users.free)
            await eventually(lambda: settled([first, second]))
            client = await cluster.client(url=users.free)
            await cluster.worker(url=users.free)
            await users.deny(denied)
            assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
            await eventually(lambda: second.leading and not first.leading)

    async def test_one_cut_off_loses_to_a_standby_and_is_refused(self, cluster: Cluster) -> None:
        proxy = await cluster.proxy()
        first = await cluster.leader(name="first", url=proxy.url)
        second = await cluster.master(name="second")
        await eventually(lambda: settled([first, second]))
        leader = first.seats["default"]._leader
        assert leader is not None
        fence = Fence(wire.elected("default"), leader.elected_seq)
        client = await cluster.client()
        await cluster.worker()
        proxy.blackhole(to_server=True, to_client=True)
        await eventually(lambda: second.leading)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        late = Frame(
            wire.event("default", "worker.lost", "first"), b'[{"worker":"w","incarnation":1}]', "late.1"
        )
        refused = await client.log.append(late, fence=fence)
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.code) == (Reason.FENCED, 10071)
        proxy.heal()
        proxy.cut()
        await eventually(lambda: not first.leading and settled([first, second]))
        await second.__aexit__(None, None, None)
        await eventually(lambda: first.leading)
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7


class TestLevels:
    async def test_it_rises_once_the_last_master_of_the_lower_one_has_gone(self, cluster: Cluster) -> None:
        old = await cluster.leader(name="old", level=1)
        new = await cluster.master(name="new")
        newer = await cluster.master(name="newer")
        await eventually(lambda: settled([old, new, newer]))
        client = await cluster.client()
        await cluster.worker()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert await elections(client) == [("old", 1)]
        await old.__aexit__(None, None, None)
        await eventually(lambda: new.seats["default"].follower.state.level == 2)
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
        levels = [level for _, level in await elections(client)]
        assert levels == sorted(levels)

    async def test_whoever_leads_is_elected_anew_for_it_without_a_restart(self, cluster: Cluster) -> None:
        leader = await cluster.leader(name="leader")
        client = await cluster.client()
        assert await elections(client) == [("leader", 2)]
        # Another namespace, where a master of the lower level follows.
        old = await cluster.master(name="old", level=1, namespaces=("two",))
        await eventually(lambda: old.leading)
        new = await cluster.master(name="new", namespaces=("two",))
        await eventually(lambda: settled([leader, old, new]))
        second = await cluster.client(namespace="two")
        old.seats["two"].hand_over("new")
        await eventually(lambda: new.leading)
        assert await elections(second) == [("old", 1), ("new", 1)]
        await old.__aexit__(None, None, None)
        await eventually(lambda: new.seats["two"].follower.state.level == 2)
        assert await elections(second) == [("old", 1), ("new", 1), ("new", 2)]
        await eventually(lambda: new.leading)

    async def test_all_that_live_are_registered_from_then_on(self, cluster: Cluster) -> None:
        masters = [await cluster.master(name=name) for name in "abc"]

        def registered() -> bool:
            return all(
                set(master.seats["default"].follower.state.masters) == {"a", "b", "c"} for master in masters
            )

        await eventually(registered)
        await masters[2].__aexit__(None, None, None)
        await eventually(lambda: set(masters[0].seats["default"].follower.state.masters) == {"a", "b"})

    async def test_one_of_a_lower_level_that_comes_later_follows_and_never_leads(
        self, cluster: Cluster
    ) -> None:
        new = await cluster.leader(name="new")
        late = await cluster.master(name="late", level=1)
        await eventually(lambda: settled([new, late]))
        assert late.seats["default"].standing is Standing.OUTDATED
        await new.__aexit__(None, None, None)
        client = await cluster.client()
        await eventually(lambda: [each.name for each in late._sessions.alive()] == ["late"])
        handle = await client.submit(add, 1, 2)
        await eventually(lambda: late.seats["default"].follower.state.seq >= handle.seq)
        assert not late.leading
        newest = await cluster.leader(name="newest")
        await cluster.worker()
        assert await handle.result(SOON_S) == 3
        assert await elections(client) == [("new", 2), ("newest", 2)]
        assert newest.leading

    async def test_what_level_2_brings_is_put_aside_before(self, cluster: Cluster) -> None:
        old = await cluster.leader(name="old", level=1)
        client = await cluster.client()
        joined = MasterJoined(instance="i", level=2)
        subject = wire.event("default", joined.kind, "new")
        headers = {wire.VERSION: "2"}
        new_kind = await client.log.append(Frame(subject, frames.encode([joined]), "n.1", headers))
        submitted = wire.event("default", "task.submitted", "cli")
        new_version = await client.log.append(
            Frame(submitted, b'[{"id":"x","shell":"true"}]', "n.2", headers)
        )
        assert isinstance(new_kind, Done)
        assert isinstance(new_version, Done)

        async def answered() -> bool:
            return bool((await audit(client)).of_kind("event.rejected"))

        await eventually(answered)
        found = await audit(client)
        kind, version = found.verdicts[new_kind.seq, 0], found.verdicts[new_version.seq, 0]
        assert [(str(each.kind), str(each.reason)) for each in (kind, version)] == [
            ("quarantined", "unknown_kind"),
            ("rejected", "unknown_version"),
        ]
        assert not found.state.masters
        assert not old.seats["default"].follower.state.tasks

    @pytest.mark.parametrize("level", [1, 2])
    async def test_an_election_of_nobody_known_is_noise(self, cluster: Cluster, level: int) -> None:
        master = await cluster.leader(name="known")
        client = await cluster.client()
        await cluster.worker()
        epoch = master.seats["default"].follower.state.epoch
        data = frames.encode([LeaderElected(epoch=epoch + 1, master="nobody", level=level)])
        assert isinstance(await client.log.append(Frame(wire.elected("default"), data, "nobody.1")), Done)
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        assert {name for name, _ in await elections(client)} == {"known"}
        assert master.leading


async def test_a_log_asked_without_rights_is_an_operating_error(users: Users) -> None:
    """What these tests rest on: rights taken away hold for connections there are."""
    async with Bus(users.limited, name="test") as bus, JetStreamLog(bus, "default") as log:
        frame = Frame(wire.event("default", "task.submitted", "t"), b'[{"shell":"true"}]')
        assert isinstance(await log.append(frame), Done)
        await users.deny("af.>")

        async def denied() -> bool:
            try:
                appended = await log.append(frame)
            except AgentFlowError:
                return False
            return isinstance(appended, Refused) and appended.reason is Reason.DENIED

        await eventually(denied)
