"""What a master is told."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from agentflow import wire
from agentflow.errors import InvalidRequest
from agentflow.events import Policy
from agentflow.limits import LEVEL


class MasterConfig(Struct, frozen=True, kw_only=True):
    """Everything a master is told."""

    url: str = "nats://127.0.0.1:4222"
    namespace: str = "default"
    """The namespace it serves, if `namespaces` names none."""
    namespaces: tuple[str, ...] = ()
    """Those it serves; masters that serve the same ones share them out."""
    discover: bool = False
    """Serve also every namespace that has a log, as they come."""
    name: str = "master"
    lease_ttl_s: int = 3
    worker_ttl_s: float = 5.0
    policy: Policy = Policy()
    replicas: int = 1
    log_bytes_max: int = 0
    """Bytes the log may take; submissions are turned away near it. 0: as the stream's own limit says."""
    data: Path | None = None
    """The folder where a projector keeps its files: following begins with the state kept there."""
    history: Path | None = None
    """The folder where it keeps the histories itself, in a DuckDB file for each namespace; in place of `data`."""
    archive: str | None = None
    """Where the archives are, a folder or s3://bucket/prefix: what a history lacks and the log, too, is read there."""
    level: int = LEVEL
    """The highest contract level it lets be used; lowered while a cluster is changed over."""

    def __post_init__(self) -> None:
        if not all(map(wire.is_name, (self.name, *self.served))):
            raise InvalidRequest("namespaces and name must be 1 to 64 of A-Z a-z 0-9 _ -")
        if self.lease_ttl_s < 1 or self.worker_ttl_s <= 0:
            raise InvalidRequest("the lease lives at least 1 s, workers longer than 0 s")
        if not 1 <= self.level <= LEVEL:
            raise InvalidRequest(f"level: expected 1 to {LEVEL}, found {self.level}")

    @property
    def served(self) -> tuple[str, ...]:
        """The namespaces named, each once."""
        named = self.namespaces or (() if self.discover else (self.namespace,))
        return tuple(dict.fromkeys(named))
