"""What a projector is told."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from agentflow import wire
from agentflow.errors import InvalidRequest
from agentflow_projections.file_writer import KEEP_EVENTS


class ProjectorConfig(Struct, frozen=True, kw_only=True):
    """Everything a projector is told."""

    data: Path
    """The folder of the DuckDB files, one for each namespace."""
    url: str = "nats://127.0.0.1:4222"
    namespaces: tuple[str, ...] = ("default",)
    discover: bool = False
    """Follow also every namespace that has a log, as they come."""
    name: str = "projector"
    replicas: int = 1
    keep_events: int = KEEP_EVENTS
    """After so many events the state of the fold is kept anew."""
    archive: str | Path | None = None
    """The folder or s3://bucket/prefix of the archives: what a log lost by trimming is read from there."""
    memory_mb: int = 1_024
    """What DuckDB may take for one file."""

    def __post_init__(self) -> None:
        if not all(map(wire.is_name, (self.name, *self.namespaces))):
            raise InvalidRequest("namespaces and name must be 1 to 64 of A-Z a-z 0-9 _ -")
