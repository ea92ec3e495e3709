"""What a master is told."""

from __future__ import annotations

from msgspec import Struct

from agentflow import wire
from agentflow.errors import InvalidRequest
from agentflow.events import Policy


class MasterConfig(Struct, frozen=True, kw_only=True):
    """Everything a master is told."""

    url: str = "nats://127.0.0.1:4222"
    namespace: str = "default"
    name: str = "master"
    lease_ttl_s: int = 3
    worker_ttl_s: float = 5.0
    policy: Policy = Policy()
    replicas: int = 1
    log_bytes_max: int = 0
    """Bytes the log may take; submissions are turned away near it. 0: as the stream's own limit says."""

    def __post_init__(self) -> None:
        if not (wire.is_name(self.namespace) and wire.is_name(self.name)):
            raise InvalidRequest("namespace and name must be 1 to 64 of A-Z a-z 0-9 _ -")
        if self.lease_ttl_s < 1 or self.worker_ttl_s <= 0:
            raise InvalidRequest("the lease lives at least 1 s, workers longer than 0 s")
