"""What `agentflow up` keeps beside the servers' data: which log was there, and how far it reached.

Servers whose data vanished start with nothing and say nothing. So that an empty folder is never
taken for a new beginning, the log's time of creation and its end are written down when the
cluster is up and when it stops, and compared at the next start.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agentflow.bus import Bus
from agentflow.errors import LogGone, OperatingError
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Identity
from agentflow.log.stream import check_same
from agentflow_nodes.cli.errors import CliError, Exit, operating

_FILE: Final = "logs.json"
_NAME: Final = "agentflow up"


class KeptLog(Struct, frozen=True):
    """One namespace's log, as it was seen last."""

    created_ns: int
    last_seq: int


Kept = dict[str, KeptLog]


async def check_log(data_dir: Path, urls: Sequence[str], namespace: str) -> None:
    """Raise CliError unless the log is the one that was here last time, or there was none."""
    kept = _read(data_dir / _FILE).get(namespace)
    if kept is None:
        return
    try:
        found = await _identity(urls, namespace)
        expected = Identity(found.name, kept.created_ns, 1, kept.last_seq, found.replicas, 0, -1)
        check_same(expected, found, kept.last_seq)
    except LogGone as gone:
        raise CliError(
            f"the log of namespace {namespace!r} in {data_dir} is not what it was, expected one that reaches"
            f" {kept.last_seq}: {gone}. Bring the folder back from a backup; to begin with what is there now,"
            f" remove {data_dir / _FILE}, and move {data_dir / 'history'} away: it tells of the log that was there",
            Exit.LOG_GONE,
        ) from gone


async def keep_log(data_dir: Path, urls: Sequence[str], namespace: str) -> None:
    """Write down which log is there and how far it reaches. Raises LogGone, Disconnected, CliError."""
    found = await _identity(urls, namespace)
    path = data_dir / _FILE
    kept = _read(path) | {namespace: KeptLog(found.created_ns, found.last_seq)}
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(kept)))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise operating(f"cannot write {path}: {error}") from error


async def _identity(urls: Sequence[str], namespace: str) -> Identity:
    async with Bus(urls, name=_NAME) as bus, JetStreamLog(bus, namespace, create=False) as log:
        return await log.identity()


def _read(path: Path) -> Kept:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise OperatingError(f"cannot read {path}: {error}") from error
