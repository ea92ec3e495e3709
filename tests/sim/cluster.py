"""What all parts of one simulated cluster share."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from agentflow.leases.memory import MemoryLeaseServer
from tests.sim.bodies import Began
from tests.sim.locks import Hold, LockBuckets
from tests.sim.loop import SimLoop, new_loop
from tests.sim.network import Network

NAMESPACE: Final = "sim"


class Trace:
    """What happened, as lines. Kept for people, and hashed for comparing runs."""

    def __init__(self, loop: SimLoop) -> None:
        self.lines: Final[list[str]] = []
        self._loop = loop
        self._hash = hashlib.sha256()

    def __call__(self, what: str, *about: object) -> None:
        """Note something."""
        line = f"{self._loop.time():11.6f} {what} {' '.join(map(str, about))}"
        self.lines.append(line)
        self._hash.update(line.encode() + b"\n")

    def digest(self) -> str:
        """Of all lines so far."""
        return self._hash.hexdigest()


class Cluster:
    """The loop, the network, the journals and the counters of one run."""

    def __init__(self, seed: int) -> None:
        self.seed: Final = seed
        self.loop: Final = new_loop(self.chance("loop"))
        self.network: Final = Network(self.loop, self.chance("network"), NAMESPACE)
        self.trace: Final = Trace(self.loop)
        self.counts: Final[Counter[str]] = Counter()
        """Situations that were reached."""
        self.faults: Final[Counter[str]] = Counter()
        """Faults that were injected, beside those that the network counts."""
        self.journal: Final[list[Began]] = []
        self.on_killer: Callable[[str], object] = print
        """What a task that kills its worker calls, with the worker's name."""
        self.leases: Final = MemoryLeaseServer(self.loop.time)
        """The buckets of leases: of the masters' sessions, and of locks."""
        self.locks: Final = LockBuckets(self.leases, self.network)
        self.holds: Final[list[Hold]] = []
        """What was done under a lock."""
        self._nonces = self.chance("nonces")

    def chance(self, what: str) -> random.Random:
        """Chance for one purpose, the same in every process."""
        return random.Random(f"{self.seed} {what}")

    def nonce(self) -> str:
        """Something nobody else has."""
        return f"{self._nonces.getrandbits(64):016x}"

    def new_id(self) -> str:
        """A UUIDv7 by the server's clock."""
        made = f"{self.network.server.now_ns // 1_000_000:012x}"
        rest = f"{self._nonces.getrandbits(72):018x}"
        return f"{made[:8]}-{made[8:]}-7{rest[:3]}-8{rest[3:6]}-{rest[6:]}"
