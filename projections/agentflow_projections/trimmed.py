"""What stands for the part of a log that was trimmed: a state of the fold, in the object store."""

from __future__ import annotations

from typing import Final

from agentflow.domain.life import FINAL
from agentflow.domain.snapshot import SnapshotUnreadable, hash_of, restore
from agentflow.domain.state import Namespace
from agentflow.errors import LogTrimmed, ObjectMissing
from agentflow.limits import LEVEL
from agentflow.log.port import Log
from agentflow.objects.port import Objects

_ATTEMPTS_MAX: Final = 5


def needed(state: Namespace) -> set[int]:
    """The positions of messages that open work will be read from: arguments and results the fold does not hold."""
    found: set[int] = set()
    for task in state.tasks.values():
        if task.payload is not None and task.payload.fetch and task.state not in FINAL:
            found.add(task.seq)
        result = None if task.node is None else task.node.result
        if result is not None and not result.value:
            found.add(result.seq)
    return found


async def fetch_snapshot(log: Log, objects: Objects, *, level: int = LEVEL) -> tuple[Namespace, bytes]:
    """The state that stands for what was trimmed, and the hash chain there.

    For a log that was trimmed. Raises LogTrimmed if the snapshot cannot be used, ObjectMissing if
    it is not in the object store.
    """
    for attempt in range(_ATTEMPTS_MAX):
        trim = (await log.identity()).trim
        assert trim is not None, "the log was never trimmed"
        try:
            data = await objects.get(trim.snapshot)
        except ObjectMissing:
            if attempt + 1 == _ATTEMPTS_MAX:
                raise
            continue  # another has taken its place since
        try:
            state = restore(data, knows=level)
        except SnapshotUnreadable as error:
            raise LogTrimmed(
                f"the log was trimmed up to {trim.seq}, and its snapshot cannot be read: {error}"
            ) from error
        if hash_of(data) != trim.digest or state.seq != trim.snapshot_seq:
            raise LogTrimmed(
                f"the log was trimmed up to {trim.seq}, and its snapshot is not what was written down"
            )
        return state, bytes.fromhex(trim.chain)
    raise AssertionError("unreachable")
