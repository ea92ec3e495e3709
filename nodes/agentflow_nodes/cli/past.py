"""What commands about the past have in common: moments, and where history is read from."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from agentflow.bus import Bus
from agentflow.domain.snapshot import snapshot
from agentflow.errors import InvalidRequest
from agentflow.log.port import Log
from agentflow.objects import ObjectStore
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.output import say
from agentflow_nodes.cli.session import CLIENT_NAME, REACH_TIMEOUT_S, Target, open_log
from agentflow_projections.past import LoggedPast, Past, Until
from agentflow_projections.trimmed import fetch_snapshot

# A fold is long-lived objects only: collecting them often would take a third of a replay.
_GC_THRESHOLD: Final = (100_000, 20, 100)

MOMENT: Final = "POSITION|TIME"
MOMENT_HELP: Final = "a position, a time like 2026-11-21T17:00 (UTC), or -10m"

NoFile = Annotated[
    str,
    typer.Option(
        "--file",
        metavar="FILE|DIR",
        help="Read an exported incident instead of the log (needs no server), or an archive before the log.",
    ),
]


def parse_until(option: str, text: str | None) -> Until:
    """A position or a time as people write it; None: to the end. Raises CliError."""
    if text is None:
        return Until()
    if text.isdecimal():
        return Until(seq=int(text))
    from agentflow_projections.query import parse_when  # noqa: PLC0415 - it loads DuckDB

    try:
        found = parse_when(text, datetime.now(UTC))
    except InvalidRequest as error:
        raise usage(f"{option}: {error}") from error
    return Until(seq=found) if isinstance(found, int) else Until(ms=int(found.timestamp() * 1000))


@asynccontextmanager
async def open_past(where: Target, file: str) -> AsyncGenerator[Past]:
    """The namespace's history: out of a file if one is named, else as the log has it now.

    A folder is an archive: what the log lost by trimming is read from there.
    """
    gc.set_threshold(*_GC_THRESHOLD)
    if _is_folder(file):
        from agentflow_projections.archived_log import ArchivedLog  # noqa: PLC0415 - it loads pyarrow

        async with open_log(where) as log, ArchivedLog(log, Path(file)) as whole:
            yield await LoggedPast.of(whole)
        return
    if file:
        from agentflow_projections.export import ExportedPast  # noqa: PLC0415 - it loads pyarrow

        yield ExportedPast.read(Path(file))
        return
    async with open_log(where) as log:
        yield await LoggedPast.of(log, await _begun(where, log))


async def _begun(where: Target, log: Log) -> bytes | None:
    """What stands for the part of the log that was trimmed; None: none was."""
    if (await log.identity()).trim is None:
        return None
    async with Bus(where.urls, name=f"agentflow {CLIENT_NAME}", connect_timeout_s=REACH_TIMEOUT_S) as bus:
        state, _ = await fetch_snapshot(log, ObjectStore(bus, where.namespace))
    say(f"the log was trimmed: history begins at position {state.seq}; --file ARCHIVE has what came before")
    return snapshot(state)


def _is_folder(file: str) -> bool:
    return bool(file) and Path(file).is_dir()
