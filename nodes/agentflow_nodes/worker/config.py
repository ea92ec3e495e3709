"""What a worker is told."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from agentflow import wire
from agentflow.errors import InvalidRequest
from agentflow.limits import LEVEL


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """Everything a worker is told."""

    url: str = "nats://127.0.0.1:4222"
    namespace: str = "default"
    name: str = "worker"
    slots: int = 8
    """Tasks it runs at the same time."""
    ahead: int = 1024
    """Short tasks it is willing to hold beyond its slots."""
    group: str = ""
    labels: dict[str, str] = {}
    cpu: float = 0.0
    """Cores it offers to tasks that ask for some."""
    memory_mb: int = 0
    gpus: int = 0
    drain_s: float = 30.0
    """How long running tasks may go on when it leaves."""
    heartbeat_s: float = 1.0
    stall_s_max: float = 60.0
    """How long a worker whose event loop stands still is spoken for; 0: not at all, and no keeper is started."""
    data: Path | None = None
    """The folder of the file in which it keeps what it was assigned and what it reported; None: it keeps nothing."""
    replicas: int = 1
    level: int = LEVEL
    """The highest contract level it lets be used; lowered while a cluster is changed over."""

    def __post_init__(self) -> None:
        if not (wire.is_name(self.namespace) and wire.is_name(self.name)):
            raise InvalidRequest("namespace and name must be 1 to 64 of A-Z a-z 0-9 _ -")
        if not 1 <= self.level <= LEVEL:
            raise InvalidRequest(f"level: expected 1 to {LEVEL}, found {self.level}")
        if self.slots < 1 or self.ahead < 0:
            raise InvalidRequest(f"slots must be at least 1 and ahead at least 0: {self.slots}, {self.ahead}")
