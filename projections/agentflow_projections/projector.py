"""The projector: follows a namespace's log into a DuckDB file.

What arrives together is folded together and written in one transaction with the checkpoint:
natural batches. Whatever happens to the process, the file holds exactly what the log says up
to its checkpoint.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, cast

from msgspec.structs import replace

from agentflow.domain.fold import fold
from agentflow.domain.snapshot import SnapshotUnreadable, hash_of, restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.errors import LogGone
from agentflow.frames import judge
from agentflow.limits import LEVEL
from agentflow.log.port import Log, Message
from agentflow.logs import get_logger
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, Snapshot
from agentflow_projections.rows import Recorder

BATCH_ROWS_MAX: Final = 50_000
"""Once there are so many rows they are committed, whatever has arrived beside them."""
SNAPSHOT_ROWS: Final = 5_000_000
"""After so many rows the state of the fold is kept anew."""

Progress = Callable[[int], None]
"""Told after each commit how far the file is."""

_log = get_logger(__name__)


class Projector:
    """One namespace's log, on its way into one database."""

    def __init__(self, log: Log, database: Database) -> None:
        self._log = log
        self._database = database
        self._recorder = Recorder(Namespace(log.namespace))
        self._checkpoint: Checkpoint | None = None
        self._chain = START
        self._since_snapshot = 0

    @property
    def state(self) -> Namespace:
        """The fold, up to what was read last."""
        return self._recorder.state

    @property
    def seq(self) -> int:
        """Everything up to this sequence is in the file."""
        return self._checkpoint.seq if self._checkpoint is not None else 0

    async def open(self) -> None:
        """Take up where the file left off; a file without a state of the fold is begun anew.

        Raises LogGone if the log was recreated or went backwards, or was cut off where the
        file does not reach.
        """
        identity = await self._log.identity()
        checkpoint = self._database.checkpoint()
        if checkpoint is not None:
            fault = checkpoint.fault(identity)
            if fault:
                raise LogGone(f"{fault}; `agentflow replay --rebuild` makes another from the log as it is")
            if not self._take_up(checkpoint):
                self._database.begin_anew("its state of the fold cannot be read")
                checkpoint = None
        if checkpoint is None:
            checkpoint = Checkpoint(
                identity.name, identity.created_ns, identity.first_seq, identity.first_seq - 1, START
            )
        self._checkpoint = checkpoint

    def _take_up(self, checkpoint: Checkpoint) -> bool:
        """Fold what the file holds after its snapshot: the frames are in it."""
        found = self._database.snapshot()
        state = Namespace(self._log.namespace)
        if found is not None:
            try:
                state = restore(found.state, knows=LEVEL)
            except SnapshotUnreadable as error:
                _log.warning("a snapshot cannot be read", reason=str(error))
        for message in self._database.messages(after=state.seq):
            fold(state, message.seq, message.time_ns, judge(message.subject, message.data, message.headers))
            state.ended.clear()
        if state.seq != checkpoint.seq:
            return False
        self._recorder = Recorder(state)
        return True

    async def run(self, *, until: int | None = None, progress: Progress | None = None) -> None:
        """Follow the log for ever, or until a sequence is in the file. For who has called `open`.

        Raises LogGone, DatabaseDamaged, and other errors of the file.
        """
        if until is not None and self.seq >= until:
            return
        following = cast("AsyncGenerator[list[Message], None]", self._log.follow(self.seq))
        async with aclosing(following):
            async for messages in following:
                for message in messages:
                    if until is not None and message.seq > until:
                        break
                    self._fold(message)
                self._commit()
                if progress is not None:
                    progress(self.seq)
                if until is not None and self.seq >= until:
                    return

    def _fold(self, message: Message) -> None:
        self._recorder.apply(message)
        self._chain = chained(self._chain, message)
        if self._recorder.size >= BATCH_ROWS_MAX:
            self._commit()

    def _commit(self) -> None:
        state = self._recorder.state
        assert self._checkpoint is not None
        rows = self._recorder.take()
        if not rows:
            return
        self._checkpoint = replace(self._checkpoint, seq=state.seq, chain=self._chain)
        self._database.commit(rows, self._checkpoint, at_ms=state.clock_ms)
        self._since_snapshot += sum(map(len, rows.values()))
        if self._since_snapshot >= SNAPSHOT_ROWS:
            self.keep_snapshot()

    def keep_snapshot(self) -> None:
        """Keep the state of the fold in the file: who opens it next begins there."""
        data = snapshot(self.state)
        self._database.keep_snapshot(Snapshot(self.state.seq, data), hash_of(data))
        self._since_snapshot = 0
