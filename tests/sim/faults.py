"""What goes wrong, drawn from the seed: each fault begins at a time and ends at another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, Protocol

from agentflow import wire
from tests.sim.cluster import Cluster
from tests.sim.network import Link, Weather

PAUSE_S: Final = 1.2
LEASE_TTL_S: Final = 3
"""Mean time between the beginnings of two faults."""
_CLOCK_STEPS_S: Final = (-600.0, -5.0, -0.5, 0.5, 4.0, 30.0, 200.0, 900.0)

_DUPLICATES_KNOWN_S: Final = 130.0
"""The server knows a message id again for two minutes."""

# Weather, by what is wrong with it.
_STORMS: Final[dict[str, Weather]] = {
    "slow": Weather(delay_s=0.05, jitter_s=0.4),
    "answers_lost": Weather(answer_lost=0.4),
    "requests_lost": Weather(request_lost=0.4),
    "busy": Weather(busy=0.5),
    "stored_unknown": Weather(stored_unknown=0.2),
    "lost_unknown": Weather(lost_unknown=0.2),
    "redelivery": Weather(redelivered=0.5),
    "beats_lost": Weather(beats_lost=1.0),
}


class Targets(Protocol):
    """The cluster, as something to harm."""

    @property
    def leader(self) -> str:
        """Name of a master that leads; "" if none does."""
        ...

    def names(self) -> list[str]:
        """All nodes."""
        ...

    def pause(self, name: str, for_s: float) -> None:
        """Stop a process, and let it go on later."""
        ...

    def crash(self, name: str) -> None:
        """Kill a process; it is started anew."""
        ...

    def bury_worker(self, name: str) -> bool:
        """Kill a worker for good, if the others can do without it."""
        ...

    def drain(self, name: str) -> None:
        """Ask a worker or master to leave in good order, as SIGTERM does; it is started anew."""
        ...

    def lose_bucket(self, name: str) -> bool:
        """Delete a bucket of leases, if there is one; whoever needs it makes it again."""
        ...

    def upgrade(self) -> str:
        """Have a master start anew that knows the next contract level; "" if all know it."""
        ...


class Faults:
    """Injects faults until a time, each for a while."""

    def __init__(self, cluster: Cluster, targets: Targets) -> None:
        self._cluster = cluster
        self._targets = targets
        self._chance: random.Random = cluster.chance("faults")

    async def run(self, until_s: float) -> None:
        """Do harm."""
        kinds: dict[Callable[[], None], int] = {
            self._storm: 8,
            self._cut: 5,
            self._pause: 4,
            self._crash: 3,
            self._strike_leader: 5,
            self._strike_worker: 3,
            self._strike_client: 2,
            self._kill_for_good: 2,
            self._stop_server: 1,
            self._step_clock: 2,
            self._drain: 1,
            self._lose_leases: 1,
            self._lose_locks: 1,
            self._upgrade: 4,
        }
        while True:
            await asyncio.sleep(self._chance.expovariate(1 / PAUSE_S))
            if self._cluster.loop.time() >= until_s:
                return
            (fault,) = self._chance.choices(list(kinds), list(kinds.values()))
            fault()

    def _began(self, kind: str, *about: object) -> None:
        self._cluster.faults[kind] += 1
        self._cluster.trace("fault", kind, *about)

    def _some(self) -> str:
        return self._chance.choice(self._targets.names())

    def _link(self, name: str) -> Link:
        return self._cluster.network.links[name]

    def _later(self, after_s: float, callback: Callable[[], None]) -> None:
        loop = self._cluster.loop
        loop.outside(loop.time() + after_s, callback)

    def _storm(self) -> None:
        self._storm_over(self._some(), self._chance.choice(list(_STORMS)))

    def _storm_over(self, name: str, kind: str) -> None:
        for_s = self._chance.uniform(1, 12)
        self._began(kind, name, f"{for_s:.3f}")
        self._link(name).weather = _STORMS[kind]
        self._later(for_s, lambda: self._calm(name))

    def _calm(self, name: str) -> None:
        self._link(name).weather = Weather()

    def _cut(self) -> None:
        self._cut_off(self._some())

    def _cut_off(self, name: str) -> None:
        self._cut_off_for(
            name, self._chance.choice((0.3, 2.0, 5.0, 9.0, 15.0)) * self._chance.uniform(0.5, 1.2)
        )

    def _cut_off_for(self, name: str, for_s: float) -> None:
        there, back = self._chance.choice(((True, True), (False, True), (True, False)))
        self._cut_between(name, for_s, there=there, back=back)

    def _cut_between(self, name: str, for_s: float, *, there: bool = True, back: bool = True) -> None:
        """Both ways; or only answers are lost, and writes arrive; or only requests."""
        kind = "partition" if there and back else "partition_requests" if there else "partition_answers"
        self._began(kind, name, f"{for_s:.3f}")
        self._link(name).cut(there=there, back=back)
        self._later(for_s, lambda: self._link(name).heal())

    def _pause(self) -> None:
        self._pause_for(self._some())

    def _pause_for(self, name: str) -> None:
        for_s = self._chance.choice((0.2, 1.0, 4.0, 8.0, 14.0)) * self._chance.uniform(0.5, 1.2)
        self._pause_over(name, for_s)

    def _pause_over(self, name: str, for_s: float) -> None:
        self._began("pause_beyond_lease" if for_s > LEASE_TTL_S else "pause", name, f"{for_s:.3f}")
        self._targets.pause(name, for_s)

    def _crash(self) -> None:
        name = self._some()
        self._began("crash", name)
        self._targets.crash(name)

    def _strike_leader(self) -> None:
        """Whoever leads: nothing else shows so much."""
        name = self._targets.leader
        if name:
            blows = (self._pause_for, self._cut_off, self._slow_down, self._hold_up, self._hand_over)
            self._chance.choice((*blows, self._forget_writes))(name)

    def _hand_over(self, name: str) -> None:
        self._began("handover", name)
        self._targets.drain(name)

    def _forget_writes(self, name: str) -> None:
        """What it repeats for want of an answer is too old for the server to know it again."""
        for_s = self._chance.uniform(1.2, 2.5)
        self._began("writes_forgotten", name, f"{for_s:.3f}")
        self._link(name).weather = Weather(answer_lost=1.0)
        self._later(0.9 * for_s, lambda: self._cluster.network.server.advance(_DUPLICATES_KNOWN_S))
        self._later(for_s, lambda: self._calm(name))

    def _hold_up(self, name: str) -> None:
        """What it decides arrives when somebody else leads."""
        self._cut_between(name, self._chance.uniform(5, 9), back=False)

    def _strike_client(self) -> None:
        """Long enough that it gives up a write that was stored."""
        names = [name for name in self._targets.names() if name.startswith("c")]
        if names:
            self._cut_between(self._chance.choice(names), self._chance.uniform(6, 9), there=False)

    def _slow_down(self, name: str) -> None:
        self._storm_over(name, "slow")

    def _strike_worker(self) -> None:
        """Long enough that it is given up, while it goes on or goes on later."""
        name = self._worker()
        for_s = self._chance.uniform(6, 10)
        if not name:
            return
        if self._chance.random() < 0.5:
            self._pause_over(name, for_s)
        else:
            self._cut_off_for(name, for_s)

    def _kill_for_good(self) -> None:
        name = self._worker()
        if name and self._targets.bury_worker(name):
            self._began("killed_for_good", name)

    def _worker(self) -> str:
        """Any that runs; "" if none does."""
        return self._chance.choice([name for name in self._targets.names() if name.startswith("w")] or [""])

    def _stop_server(self) -> None:
        for_s = self._chance.choice((0.1, 1.0, 6.0)) * self._chance.uniform(0.5, 1.2)
        self._began("server_down", f"{for_s:.3f}")
        network = self._cluster.network
        network.stop_server()
        self._later(for_s, network.start_server)

    def _step_clock(self) -> None:
        step_s = self._chance.choice(_CLOCK_STEPS_S)
        self._began("clock_step", step_s)
        self._cluster.network.server.advance(step_s)

    def _drain(self) -> None:
        name = self._chance.choice(
            [name for name in self._targets.names() if not name.startswith("c")] or [""]
        )
        if name:
            self._began("drain", name)
            self._targets.drain(name)

    def _lose_leases(self) -> None:
        self._lose(wire.LEASE_BUCKET, "leases_lost")

    def _lose_locks(self) -> None:
        self._lose(wire.lock_bucket(self._cluster.network.log.namespace), "locks_lost")

    def _lose(self, bucket: str, kind: str) -> None:
        if self._targets.lose_bucket(bucket):
            self._began(kind)

    def _upgrade(self) -> None:
        name = self._targets.upgrade()
        if name:
            self._began("upgrade", name)
