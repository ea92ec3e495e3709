"""The projector: follows a namespace's log into a DuckDB file.

Two tasks take turns. One folds what arrives and piles up rows. The other takes the pile and
writes it, with the checkpoint, in one transaction, in a thread of its own; meanwhile the next
pile grows. So the batches are natural: as much as came while the last one was written.
Whatever happens to the process, the file holds exactly what the log says up to its checkpoint.

Now and then the state of the fold is kept beside the file (see `hydrate`), so that opening it
folds a tail and not all there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from agentflow.domain.digest import Digests
from agentflow.domain.fold import fold
from agentflow.domain.state import Namespace
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError
from agentflow.frames import judge
from agentflow.log.port import Identity, Log
from agentflow.log.stream import trimmed_off
from agentflow.logs import get_logger
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, DatabaseDamaged
from agentflow_projections.hydrate import Prepared, StateFile
from agentflow_projections.pipeline import Spoken, spoken
from agentflow_projections.rows import Recorder

BATCH_ROWS_MAX: Final = 200_000
"""Folding waits once so many rows wait to be written: some 60 MB."""
PACE_S: Final = 0.2
"""A transaction costs ten milliseconds whatever is in it: no more than one in so long, unless rows pile up."""
KEEP_EVENTS: Final = 200_000
"""After so many events the state is kept anew: about a second of folding for who begins there."""
KEEP_IDLE_S: Final = 2.0
KEEP_IDLE_EVENTS: Final = 1_000
"""When nothing happens for so long, a tail longer than this is made short."""
_KEEP_SHARE: Final = 20
"""Keeping the state of very many open tasks takes long: at most one part of so many of all time."""
_SLICE_S: Final = 0.02
"""Folding pauses this often to let the event loop do something else."""

Progress = Callable[[int], None]
"""Told after each commit how far the file is."""

_T = TypeVar("_T")

_log = get_logger(__name__)

_ANEW: Final = (
    "if the log is meant to be another one, move the DuckDB file away and start again:"
    " a new one is built from the log as it is"
)


class Projector:
    """One namespace's log, on its way into one database. Open it, run it, close it.

    `kept` is where the state of the fold is kept; without, the file's frames are folded at each start.
    """

    def __init__(
        self,
        log: Log,
        database: Database,
        kept: StateFile | None = None,
        *,
        pace_s: float = PACE_S,
        keep_events: int = KEEP_EVENTS,
    ) -> None:
        self._log = log
        self._database = database
        self._kept = kept
        self._pace_s = pace_s
        self._keep_events = keep_events
        self._recorder = Recorder(Namespace(log.namespace))
        self.digests = Digests(self._recorder.state)
        """Of the fold, anew once the file is open."""
        self._checkpoint: Checkpoint | None = None
        self._chain = START
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="projector")
        self._committing: asyncio.Task[None] | None = None
        self._closing = False
        self._broken = False
        """A commit began and did not end well: what the file lacks is known to nobody here."""
        self._piled, self._urgent, self._room, self._free = (asyncio.Event() for _ in range(4))
        self._free.set()
        self._since_kept = 0
        self._keep_not_before = 0.0

    @property
    def state(self) -> Namespace:
        """The fold, up to what was read last."""
        return self._recorder.state

    @property
    def seq(self) -> int:
        """Everything up to this sequence is in the file."""
        return self._checkpoint.seq if self._checkpoint is not None else 0

    # Opening -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Take up where the file left off; a file that contradicts itself is begun anew.

        Raises LogGone if the log was recreated, went backwards, or lacks what the file lacks too.
        """
        identity = await self._log.identity()
        checkpoint = await self._in_thread(lambda: self._take_up(identity))
        if checkpoint is None:
            checkpoint = Checkpoint(identity.name, identity.created_ns, 1, 0, START)
        if identity.trimmed_seq > checkpoint.seq:
            raise trimmed_off(identity, checkpoint.seq + 1)
        if identity.first_seq > checkpoint.seq + 1:
            raise LogGone(
                f"the history reaches up to {checkpoint.seq}, but {identity.name} begins at {identity.first_seq}:"
                " what lies between is not there any more"
            )
        self._checkpoint = checkpoint
        self.digests = Digests(self.state)

    def _take_up(self, identity: Identity) -> Checkpoint | None:
        try:
            checkpoint = self._database.checkpoint()
            if checkpoint is not None:
                fault = checkpoint.fault(identity)
                if fault:
                    raise LogGone(f"{fault}; {_ANEW}")
                self._fold_file(checkpoint)
                return checkpoint
        except DatabaseDamaged as error:
            self._database.begin_anew(str(error))
        if self._kept is not None:
            self._kept.forget()
        return None

    def _fold_file(self, checkpoint: Checkpoint) -> None:
        """Come to the state at the checkpoint, by the frames in the file. Raises DatabaseDamaged."""
        for state, chain in self._beginnings(checkpoint):
            begun, after, events = state.seq, chain, 0
            for message in self._database.messages(after=state.seq):
                if self._closing:
                    raise OperatingError("the projector was closed while it took up its file")
                judged = judge(message.subject, message.data, message.headers)
                events += len(fold(state, message.seq, message.time_ns, judged))
                state.ended.clear()
                after = chained(after, message)
            if (state.seq, after) == (checkpoint.seq, checkpoint.chain):
                self._chain = after
                self._recorder = Recorder(state)
                self._since_kept = events
                return
            _log.warning("the frames in the file are not those it was made of", after=begun)
        raise DatabaseDamaged("its frames do not lead to its checkpoint")

    def _beginnings(self, checkpoint: Checkpoint) -> Iterator[tuple[Namespace, bytes]]:
        kept = self._kept.read() if self._kept is not None else None
        if kept is not None and (kept.stream, kept.created_ns) == (checkpoint.stream, checkpoint.created_ns):
            if kept.seq <= checkpoint.seq:
                yield kept.state, kept.chain
            else:
                _log.warning("the file lost what it held already", seq=checkpoint.seq, held=kept.seq)
        yield Namespace(self._log.namespace), START

    # Following ---------------------------------------------------------------------------

    async def run(self, *, until: int | None = None, progress: Progress | None = None) -> None:
        """Follow the log for ever, or until a sequence is in the file. For who has called `open`.

        Raises LogGone, and the errors of the file; after those it can only be closed.
        """
        if until is not None and self.seq >= until:
            return
        folding = asyncio.create_task(self._follow(until), name="projector fold")
        writing = asyncio.create_task(self._write(until, progress), name="projector write")
        try:
            await asyncio.wait((folding, writing), return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await end_tasks(folding, writing)
        for task in (writing, folding):
            if not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Write what is folded, and keep the state. Raises what that meets with; harmless twice."""
        self._keep_not_before = 0.0
        try:
            if self._committing is not None:  # who waited for it may have been cancelled
                await asyncio.wait((self._committing,))
            if self._checkpoint is not None and not self._broken:
                await self._commit(keep=True)
        finally:
            self._checkpoint = None
            self._closing = True
            self._thread.shutdown(wait=True)

    async def _follow(self, until: int | None) -> None:
        async with aclosing(spoken(self._log.follow(self.state.seq))) as following:
            async for messages in following:
                await self._fold([each for each in messages if until is None or each[0].seq <= until])
                if until is not None and self.state.seq >= until:
                    self._urgent.set()
                    return

    async def _fold(self, messages: Spoken) -> None:
        loop = asyncio.get_running_loop()
        await self._free.wait()
        pause_at = loop.time() + _SLICE_S
        for message, judged in messages:
            self._since_kept += len(self._recorder.apply(message, judged))
            self._chain = chained(self._chain, message)
            self.digests.folded()
            self._piled.set()
            if self._recorder.size >= BATCH_ROWS_MAX:
                self._room.clear()
                self._urgent.set()
                await self._room.wait()
            elif loop.time() < pause_at:
                continue
            await asyncio.sleep(0)
            await self._free.wait()
            pause_at = loop.time() + _SLICE_S
        self.state.ended.clear()

    # Writing -----------------------------------------------------------------------------

    async def _write(self, until: int | None, progress: Progress | None) -> None:
        loop = asyncio.get_running_loop()
        while until is None or self.seq < until:
            if not await _within(self._piled, KEEP_IDLE_S) and self._since_kept < KEEP_IDLE_EVENTS:
                await self._piled.wait()
            begun = loop.time()
            await self._commit(keep=self._since_kept >= (self._keep_events if self._piled.is_set() else 1))
            if progress is not None:
                progress(self.seq)
            await _within(self._urgent, self._pace_s - (loop.time() - begun))

    async def _commit(self, *, keep: bool) -> None:
        """Write the rows there are, and then the state as it is now.

        It is done whole also if who waits for it is cancelled: rows that were taken and not written
        would be missing once the next ones are.
        """
        self._committing = asyncio.create_task(self._commit_whole(keep=keep), name="projector commit")
        await asyncio.shield(self._committing)

    async def _commit_whole(self, *, keep: bool) -> None:
        state = self.state
        assert self._checkpoint is not None
        rows = self._recorder.take()
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

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
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
