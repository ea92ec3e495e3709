"""The projector: follows a namespace's log into a DuckDB file.

Opening the file comes to the state at its checkpoint by the frames in it. From there on the
projector folds what arrives, and a `FileWriter` writes what came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Final

from agentflow.domain.digest import Digests
from agentflow.domain.fold import fold
from agentflow.domain.state import Namespace
from agentflow.ending import together
from agentflow.errors import LogGone, OperatingError
from agentflow.frames import judge
from agentflow.log.port import Identity, Log
from agentflow.log.stream import trimmed_off
from agentflow.logs import get_logger
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, DatabaseDamaged
from agentflow_projections.file_writer import KEEP_EVENTS, PACE_S, FileWriter, Progress
from agentflow_projections.hydrate import StateFile
from agentflow_projections.pipeline import Spoken, spoken
from agentflow_projections.rows import Recorder

_SLICE_S: Final = 0.02
"""Folding pauses this often to let the event loop do something else."""

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
        self._writer: FileWriter | None = None
        self._since_kept = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="projector")
        self._closing = False

    @property
    def state(self) -> Namespace:
        """The fold, up to what was read last."""
        return self._recorder.state

    @property
    def seq(self) -> int:
        """Everything up to this sequence is in the file."""
        return self._writer.seq if self._writer is not None else 0

    # Opening -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Take up where the file left off; a file that contradicts itself is begun anew.

        Raises LogGone if the log was recreated, went backwards, or lacks what the file lacks too.
        """
        identity = await self._log.identity()
        loop = asyncio.get_running_loop()
        checkpoint = await loop.run_in_executor(self._thread, self._take_up, identity)
        if checkpoint is None:
            checkpoint = Checkpoint(identity.name, identity.created_ns, 1, 0, START)
        if identity.trimmed_seq > checkpoint.seq:
            raise trimmed_off(identity, checkpoint.seq + 1)
        if identity.first_seq > checkpoint.seq + 1:
            raise LogGone(
                f"the history reaches up to {checkpoint.seq}, but {identity.name} begins at {identity.first_seq}:"
                " what lies between is not there any more"
            )
        self._writer = FileWriter(
            self._database,
            self._recorder,
            checkpoint,
            self._thread,
            self._kept,
            since_kept=self._since_kept,
            pace_s=self._pace_s,
            keep_events=self._keep_events,
        )
        self.digests = Digests(self.state)

    def _take_up(self, identity: Identity) -> Checkpoint | None:
        try:
            checkpoint = self._database.checkpoint()
            if checkpoint is not None:
                check_belongs(checkpoint, identity)
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
        assert self._writer is not None, "it is open"
        if until is not None and self.seq >= until:
            return
        await together(self._writer.write(until=until, progress=progress), self._follow(self._writer, until))

    async def close(self) -> None:
        """Write what is folded, and keep the state. Raises what that meets with; harmless twice."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                await writer.close()
        finally:
            self._closing = True
            self._thread.shutdown(wait=True)

    async def _follow(self, writer: FileWriter, until: int | None) -> None:
        async with aclosing(spoken(self._log.follow(self.state.seq))) as following:
            async for messages in following:
                await self._fold(writer, [each for each in messages if until is None or each[0].seq <= until])
                if until is not None and self.state.seq >= until:
                    writer.hurry()
                    return

    async def _fold(self, writer: FileWriter, messages: Spoken) -> None:
        loop = asyncio.get_running_loop()
        await writer.still()
        pause_at = loop.time() + _SLICE_S
        for message, judged in messages:
            writer.apply(message, judged)
            self.digests.folded()
            if writer.is_crowded:
                await writer.room()
            elif loop.time() < pause_at:
                continue
            await asyncio.sleep(0)
            await writer.still()
            pause_at = loop.time() + _SLICE_S
        self.state.ended.clear()


def check_belongs(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise LogGone if a file that stands there is not one of this log."""
    fault = checkpoint.fault(identity)
    if fault:
        raise LogGone(f"{fault}; {_ANEW}")
