"""From the fold into the DuckDB file: whoever folds a namespace's log has its rows written.

Two take turns. Who folds hands over each message (`FileWriter.apply`), and rows pile up.
`FileWriter.write` takes the pile and writes it, with the checkpoint, in one transaction, in a
thread; meanwhile the next pile grows. So the batches are natural: as much as came while the
last one was written. Whatever happens to the process, the file holds exactly what the log
says up to its checkpoint.

Now and then the state of the fold is kept beside the file (see `hydrate`), so that opening it
folds a tail and not all there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from agentflow.domain.state import Namespace
from agentflow.frames import Judged
from agentflow.log.port import Message
from agentflow.logs import get_logger
from agentflow_projections.chain import chained
from agentflow_projections.database import Checkpoint, Database
from agentflow_projections.hydrate import Prepared, StateFile
from agentflow_projections.rows import Recorder

BATCH_ROWS_MAX: Final = 200_000
"""Who can wait folds no more once so many rows wait to be written: some 60 MB."""
BATCH_BYTES_MAX: Final = 64 << 20
"""The same, of messages with large arguments or results."""
PACE_S: Final = 0.2
"""A transaction costs ten milliseconds whatever is in it: no more than one in so long, unless rows pile up."""
KEEP_EVENTS: Final = 200_000
"""After so many events the state is kept anew: about a second of folding for who begins there."""
KEEP_OPEN: Final = 5_000
"""So many open tasks make it twice as long, twice as many three times: folding waits 5 µs for each of them."""
KEEP_IDLE_S: Final = 2.0
KEEP_IDLE_EVENTS: Final = 1_000
"""When nothing happens for so long, a tail longer than this is made short."""
_KEEP_SHARE: Final = 20
"""Keeping the state of very many open tasks takes long: at most one part of so many of all time."""

Progress = Callable[[int], None]
"""Told after each commit how far the file is."""

T = TypeVar("T")

_log = get_logger(__name__)


class FileWriter:
    """Has a recorder's rows written into the file that is open and stands at `checkpoint`, as the recorder does.

    `kept` is where the state of the fold is kept. All work on the file is done in `thread`, which is
    one thread. To be closed, before the file is.
    """

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        database: Database,
        recorder: Recorder,
        checkpoint: Checkpoint,
        thread: Executor,
        kept: StateFile | None = None,
        *,
        since_kept: int = 0,
        pace_s: float = PACE_S,
        keep_events: int = KEEP_EVENTS,
    ) -> None:
        self._database = database
        self._recorder = recorder
        self._checkpoint = checkpoint
        self._chain = checkpoint.chain
        self._thread = thread
        self._kept = kept
        self._pace_s = pace_s
        self._keep_events = keep_events
        self._bytes = 0
        """Of the messages whose rows wait to be written."""
        self._committing: asyncio.Task[None] | None = None
        self._broken = False
        """A commit began and did not end well: what the file lacks is known to nobody here."""
        self._piled, self._urgent, self._room, self._free = (asyncio.Event() for _ in range(4))
        self._free.set()
        self._since_kept = since_kept
        """Events since the state was kept."""
        self._keep_not_before = 0.0

    @property
    def state(self) -> Namespace:
        """The fold, up to what was handed over last."""
        return self._recorder.state

    @property
    def seq(self) -> int:
        """Everything up to this sequence is in the file."""
        return self._checkpoint.seq

    # Folding -----------------------------------------------------------------------------

    def apply(self, message: Message, judged: Judged) -> None:
        """Fold the next message, and pile up its rows."""
        self._since_kept += len(self._recorder.apply(message, judged))
        self._chain = chained(self._chain, message)
        self._bytes += len(message.data)
        self._piled.set()

    @property
    def load(self) -> float:
        """How much waits to be written; 1: as much as should."""
        return max(self._recorder.size / BATCH_ROWS_MAX, self._bytes / BATCH_BYTES_MAX)

    @property
    def is_crowded(self) -> bool:
        """Whether as much waits to be written as should."""
        return self.load >= 1

    async def still(self) -> None:
        """Wait while the state must not change."""
        await self._free.wait()

    async def room(self) -> None:
        """Have the rows written that wait, and wait until they are no more in the way."""
        self._room.clear()
        self.hurry()
        await self._room.wait()

    def hurry(self) -> None:
        """Have what there is written now."""
        self._urgent.set()

    def abandon(self) -> None:
        """Nothing more is written: nobody need wait for room."""
        self._room.set()

    # Writing -----------------------------------------------------------------------------

    async def write(self, *, until: int | None = None, progress: Progress | None = None) -> None:
        """Write for ever, or until a sequence is in the file. Raises the file's errors; then it can only be closed."""
        loop = asyncio.get_running_loop()
        while until is None or self.seq < until:
            if not await _within(self._piled, KEEP_IDLE_S) and self._since_kept < KEEP_IDLE_EVENTS:
                await self._piled.wait()
            begun = loop.time()
            await self._commit(keep=self._is_to_keep())
            if progress is not None:
                progress(self.seq)
            await _within(self._urgent, self._pace_s - (loop.time() - begun))

    async def close(self) -> None:
        """Write what is folded, and keep the state. Raises what that meets with; harmless twice."""
        self._keep_not_before = 0.0
        if self._committing is not None:  # who waited for it may have been cancelled
            await asyncio.wait((self._committing,))
        if not self._broken:
            await self._commit(keep=True)
        self._broken = True

    def _is_to_keep(self) -> bool:
        if not self._piled.is_set():
            return self._since_kept > 0
        return self._since_kept >= self._keep_events * (1 + len(self.state.tasks) // KEEP_OPEN)

    async def _commit(self, *, keep: bool) -> None:
        """Write the rows there are, and then the state as it is now.

        It is done whole also if who waits for it is cancelled: rows that were taken and not written
        would be missing once the next ones are.
        """
        self._committing = asyncio.create_task(self._commit_whole(keep=keep), name="history commit")
        await asyncio.shield(self._committing)

    async def _commit_whole(self, *, keep: bool) -> None:
        state = self.state
        rows, self._bytes = self._recorder.take(), 0
        self._piled.clear()
        self._urgent.clear()
        self._room.set()
        checkpoint, at_ms = replace(self._checkpoint, seq=state.seq, chain=self._chain), state.clock_ms
        prepared = await self._prepare(checkpoint) if keep else None
        if rows:
            await self._in_thread(lambda: self._commit_rows(rows, checkpoint, at_ms))
        if prepared is not None:
            await self._in_thread(lambda: self._keep(prepared))

    def _commit_rows(self, rows: dict[str, Any], checkpoint: Checkpoint, at_ms: int) -> None:
        assert not self._broken, "rows are missing"
        self._broken = True
        self._database.commit(rows, checkpoint, at_ms=at_ms)
        self._checkpoint = checkpoint
        self._broken = False

    async def _prepare(self, checkpoint: Checkpoint) -> Prepared | None:
        """Take the state down while it stands still."""
        loop = asyncio.get_running_loop()
        if self._kept is None or not self._since_kept or loop.time() < self._keep_not_before:
            return None
        kept, identity = self._kept, (checkpoint.stream, checkpoint.created_ns)
        begun = loop.time()
        self._free.clear()
        try:
            prepared = await self._in_thread(lambda: kept.prepare(self.state, identity, checkpoint.chain))
        finally:
            self._free.set()
        self._since_kept = 0
        self._keep_not_before = loop.time() + _KEEP_SHARE * (loop.time() - begun)
        return prepared

    def _keep(self, prepared: Prepared) -> None:
        assert self._kept is not None
        try:
            self._kept.write(prepared)
        except OSError as error:  # the one kept before is there still
            _log.warning("the state of the fold could not be kept", error=str(error))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Whoever stops waiting does not stop the work: what follows waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was set within so many seconds."""
    if event.is_set() or seconds <= 0:
        return event.is_set()
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
