"""The buckets of locks on the simulated server, and the journal of what was done under them.

How clients agree on the next generation of a lost bucket is `agentflow.locks.bucket`'s: it
speaks JetStream, and is proved elsewhere. Here the server makes a new one at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agentflow import wire
from agentflow.events import LockOpened
from agentflow.frames import encode, level_headers
from agentflow.log.port import Frame
from agentflow_nodes.worker.locking import TTL_S

if TYPE_CHECKING:
    from agentflow.leases.memory import MemoryLeaseServer
    from agentflow.locks.held import Held
    from tests.sim.network import Network

_GENERATION_BITS: Final = 32


class Hold:
    """An attempt that ran under a lock."""

    def __init__(self, lock: str, held: Held, since_s: float) -> None:
        self.lock: Final = lock
        self.held: Final = held
        self.since_s: Final = since_s
        self.ended_s: float | None = None

    @property
    def token(self) -> int:
        """Its fencing token."""
        return self.held.token

    @property
    def until_s(self) -> float:
        """Its end; at the latest when its holder knew that it could be somebody else's."""
        deadline_s = self.held.deadline
        return deadline_s if self.ended_s is None else min(deadline_s, self.ended_s)

    def __str__(self) -> str:
        return f"{self.lock} {self.held.holder} {self.token} {self.since_s:.6f} to {self.until_s:.6f}"


class LockBuckets:
    """One bucket after the other: each has tokens above those of the one before."""

    def __init__(self, server: MemoryLeaseServer, network: Network) -> None:
        self.name: Final = wire.lock_bucket(network.log.namespace)
        self._server = server
        self._network = network
        self._generation = 0
        self._granting_from_s = 0.0

    def open(self) -> tuple[int, float]:
        """The generation there is, made if need be, and from when on it grants anything."""
        if self.name not in self._server.buckets:
            self._generation += 1
            if self._generation > 1:
                self._granting_from_s = self._network.loop.time() + TTL_S
            self._say()
            self._server.create(self.name, self._generation << _GENERATION_BITS)
        return self._generation, self._granting_from_s

    def _say(self) -> None:
        opened = LockOpened(generation=self._generation)
        subject = wire.locks_opened(self._network.log.namespace)
        self._network.log.arrive([Frame(subject, encode([opened]), None, level_headers([opened]))], None)
