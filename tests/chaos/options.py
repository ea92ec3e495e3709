"""What a campaign is told."""

from __future__ import annotations

from msgspec import Struct

FAMILIES = ("kill", "pause", "cut", "oneway", "latency", "acks", "clock", "disk", "partition")
"""Kinds of faults."""
NAMESPACE = "chaos"


class Options(Struct, frozen=True, kw_only=True):
    """One run of a campaign. Everything that happens follows from it, as far as clocks allow."""

    seed: int
    seconds: float
    """How long there are faults."""
    tasks: int
    """Tasks handed over in that time, workflows' tasks included."""
    replicas: int = 1
    families: tuple[str, ...] = FAMILIES
    pace_s: tuple[float, float] = (0.5, 1.5)
    """Shortest and longest time between the beginnings of two faults."""
    masters: int = 3
    workers: int = 3
    clients: int = 2
    slots: int = 8
    lease_ttl_s: int = 1
    worker_ttl_s: float = 2.0
    liveness_s: float = 60.0
    """After the last fault is healed, all work must have ended within this time."""
    store_mb: int = 4096
    """Room for the log where the run can fill a disk of its own."""

    def command(self) -> str:
        """The command that repeats the run."""
        given = [
            f"--seed {self.seed}",
            f"--minutes {self.seconds / 60:g}",
            f"--tasks {self.tasks}",
            f"--replicas {self.replicas}",
            f"--faults {','.join(self.families)}",
            f"--pace {self.pace_s[0]:g},{self.pace_s[1]:g}",
            f"--masters {self.masters} --workers {self.workers} --clients {self.clients}",
        ]
        return "just chaos " + " ".join(given)
