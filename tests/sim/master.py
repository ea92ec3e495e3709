"""A simulated master: the real seat and sessions, without a process around them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

from msgspec import Struct

from agentflow import wire
from agentflow.domain.plan import Silence
from agentflow.domain.state import Namespace
from agentflow.ending import end_tasks
from agentflow.leases.memory import MemoryLeaseServer
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.seat import Seat
from agentflow_nodes.master.sessions import Sessions
from agentflow_nodes.master.sharing import Session
from tests.sim.cluster import NAMESPACE, Cluster
from tests.sim.faults import LEASE_TTL_S
from tests.sim.leases import SimLeases
from tests.sim.network import Link, SimBus, SimLog

WORKER_TTL_S: Final = 5.0


class Observed(Struct, frozen=True):
    """What a leader had observed when it planned."""

    master: str
    basis: int
    now_ms: int
    silences: Sequence[Silence]


class _WatchedSeat(Seat):
    """A seat that notes what it tells the plan, so that the plan can be made again."""

    observed: list[Observed]

    def _silences(self) -> Sequence[Silence]:
        silences = super()._silences()
        if silences:
            follower = self.follower
            seen = Observed(self._config.name, follower.state.seq, follower.now_ms, silences)
            self.observed.append(seen)
        return silences


class SimMaster:
    """One process of a master. `run` ends when it has left, or with an error."""

    def __init__(
        self, cluster: Cluster, link: Link, name: str, server: MemoryLeaseServer, level: int
    ) -> None:
        self.name: Final = name
        self._cluster = cluster
        self._link = link
        self._server = server
        self._instance = cluster.nonce()
        self._level = level
        config = MasterConfig(
            namespace=NAMESPACE,
            name=name,
            lease_ttl_s=LEASE_TTL_S,
            worker_ttl_s=WORKER_TTL_S,
            level=self._level,
        )
        clock = cluster.loop.time
        self._seat: _WatchedSeat | None = None
        self._sessions = Sessions(self._open_leases, LEASE_TTL_S, self._describe, self._look, clock=clock)
        self._seat = _WatchedSeat(
            SimLog(link),
            config,
            self._instance,
            self._sessions,
            lambda _ended: None,
            clock=clock,
            new_nonce=cluster.nonce,
        )
        self._seat.observed = []
        self._leave = asyncio.Event()

    @property
    def leading(self) -> bool:
        """Whether it leads, as far as it knows."""
        return self._seat is not None and self._seat.leading

    @property
    def state(self) -> Namespace:
        """Its fold."""
        assert self._seat is not None
        return self._seat.follower.state

    @property
    def observed(self) -> Sequence[Observed]:
        """What it told its plans."""
        return self._seat.observed if self._seat is not None else ()

    def leave(self) -> None:
        """Step down and end in good order."""
        self._leave.set()

    async def run(self) -> None:
        """Follow, stand by, and lead when it is our turn, until told to leave."""
        seat = self._seat
        assert seat is not None
        await seat.liveness.listen(cast("Any", SimBus(self._link)))
        leave = asyncio.create_task(self._leave.wait())
        seated = asyncio.create_task(seat.run())
        keeping = asyncio.create_task(self._sessions.run())
        try:
            await asyncio.wait([leave, seated, keeping], return_when=asyncio.FIRST_COMPLETED)
            for task in (seated, keeping):
                if task.done():
                    task.result()
            self._cluster.counts["masters_left"] += 1
            await seat.leave()
            await self._sessions.leave()
        finally:
            await end_tasks(leave, seated, keeping)

    def _open_leases(self) -> SimLeases:
        return SimLeases(self._link, self._server, self._cluster.nonce, wire.LEASE_BUCKET)

    def _describe(self) -> Session:
        seats = {NAMESPACE: self._seat.report()} if self._seat is not None else {}
        return Session(name=self.name, instance=self._instance, level=self._level, seats=seats)

    def _look(self) -> None:
        if self._seat is not None:
            self._seat.look()
