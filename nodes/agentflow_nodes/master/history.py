"""The history that a master keeps itself: what it folds anyway is written into a DuckDB file.

A projector beside a master judges and folds every message a second time. A master that keeps
the history only has the rows written of what it folds. For that the file must stand where the
fold stands: the fold begins at or before the file's checkpoint and comes past it. So it is in a
new cluster, and whenever a master starts whose file is in order.

In every other case (the file is damaged, of another release, locked, or was deleted; the disk
was full) the history is left to a projector, a process of its own, until the master starts
again. Whatever happens to the file, the master goes on. Only a file of another log halts it,
at its start, before it does anything: which of the two is right is for people to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from agentflow.bus import Bus
from agentflow.domain.fold import fold
from agentflow.domain.state import Namespace
from agentflow.ending import together
from agentflow.errors import LogGone, OperatingError
from agentflow.frames import Judged
from agentflow.limits import LEVEL
from agentflow.log.port import Identity, Message
from agentflow.logs import get_logger
from agentflow_nodes.master.beside import Beside
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.projector.projection import check_file
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, DatabaseLocked
from agentflow_projections.file_writer import FileWriter
from agentflow_projections.hydrate import StateFile, history_path
from agentflow_projections.projector import check_belongs
from agentflow_projections.rows import Recorder
from agentflow_projections.service import QueryService

_OPEN_S_MAX: Final = 3.0
"""The master waits no longer for its file: after a crash DuckDB has up to half a gigabyte to replay."""
_LOCKED_S_MAX: Final = 1.5
_LOCKED_PAUSE_S: Final = 0.1
_LOAD_MAX: Final = 10.0
"""A leader does not wait for a slow disk: with ten times as much waiting as should, it gives the file up."""

_log = get_logger(__name__)

_T = TypeVar("_T")


class History:
    """One namespace's history, kept by who folds it. `open` it, `follow` a fold, `run` it, `close` it.

    `apply` is what folds a message then. `leads` says whether the fold must not wait for the file.
    """

    def __init__(self, bus: Bus, config: MasterConfig, namespace: str, leads: Callable[[], bool]) -> None:
        assert config.history is not None, "the folder of the file"
        self.apply: Callable[[Message, Judged], object] = self._fold
        self.writer: FileWriter | None = None
        """While the file stands where the fold stands, but for the rows that wait to be written."""
        self._bus = bus
        self._path = history_path(config.history, namespace)
        self._database = Database(self._path, namespace)
        self._beside = _beside(config, namespace)
        self._leads = leads
        self._state = Namespace(namespace)
        self._chain: bytes | None = None
        """Over what was folded, if it is known, until the fold is where the file is."""
        self._checkpoint: Checkpoint | None = None
        """Where the file stands; None: it is not open."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="history")
        self._overloaded = asyncio.Event()
        self._settled = asyncio.Event()
        """It is known who keeps the history: the writer, or if there is none, a projector beside."""

    # Opening -----------------------------------------------------------------------------

    async def open(self, identity: Identity) -> None:
        """Open the file, if that does not take long. Raises LogGone if it is one of another log."""
        try:
            self._checkpoint = await asyncio.wait_for(self._open_patiently(identity), _OPEN_S_MAX)
        except TimeoutError:
            _log.warning("opening the history takes long: it is left to a projector", path=str(self._path))
        except LogGone:
            raise
        except OperatingError as error:
            self._say(error)

    async def _open_patiently(self, identity: Identity) -> Checkpoint:
        """Whoever kept it before may be about to end."""
        patient_until = asyncio.get_running_loop().time() + _LOCKED_S_MAX
        while True:
            try:
                return await self._in_thread(lambda: self._open(identity))
            except DatabaseLocked:
                if asyncio.get_running_loop().time() > patient_until:
                    raise
                await asyncio.sleep(_LOCKED_PAUSE_S)

    def _open(self, identity: Identity) -> Checkpoint:
        self._database.__enter__()
        found = self._database.checkpoint()
        if found is not None:
            check_belongs(found, identity)
        return found or Checkpoint(identity.name, identity.created_ns, 1, 0, START)

    def follow(self, state: Namespace, chain: bytes | None) -> None:
        """Keep the history of this fold. `chain` is that of all it was made of, if that is known."""
        self._state, self._chain = state, chain if state.seq else START
        if self._checkpoint is None:
            self._settled.set()
        elif state.knows < LEVEL:
            self._leave("a master of a lower level does not understand all there may be")
        elif state.seq > self._checkpoint.seq:
            self._leave(f"it reaches up to {self._checkpoint.seq}, and what is folded begins at {state.seq}")
        else:
            self.apply = self._fold_up_to_the_file
            self._reach(self._checkpoint)

    # Folding -----------------------------------------------------------------------------

    def _fold(self, message: Message, judged: Judged) -> None:
        fold(self._state, message.seq, message.time_ns, judged)

    def _fold_up_to_the_file(self, message: Message, judged: Judged) -> None:
        assert self._checkpoint is not None
        self._fold(message, judged)
        if self._chain is not None:
            self._chain = chained(self._chain, message)
        self._reach(self._checkpoint)

    def _reach(self, checkpoint: Checkpoint) -> None:
        """If the fold is where the file is: from here on its rows are written."""
        if self._state.seq < checkpoint.seq:
            return
        if self._chain is not None and self._chain != checkpoint.chain:
            self._leave("it does not hold what the log holds")
            return
        kept = StateFile(self._path, self._state.name)
        self.writer = FileWriter(self._database, Recorder(self._state), checkpoint, self._thread, kept)
        self.apply = self.writer.apply
        self._settled.set()

    def _leave(self, why: str) -> None:
        _log.warning("the history is left to a projector", path=str(self._path), reason=why)
        self.apply = self._fold
        self._settled.set()

    async def ready(self) -> None:
        """Wait while the state must not change, and, unless it leads, until not too many rows wait."""
        writer = self.writer
        if writer is None:
            return
        await writer.still()
        if not writer.is_crowded:
            return
        if not self._leads():
            await writer.room()
        elif writer.load >= _LOAD_MAX:
            self._let_go()
            self._overloaded.set()

    # Keeping -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep it for ever, or see to it that a projector does."""
        await self._settled.wait()
        if self.writer is not None:
            try:
                await self._keep(self.writer)
            except OperatingError as error:
                self._say(error)
            self._let_go()
        await self._in_thread(self._shut)
        await self._beside.run()

    async def _keep(self, writer: FileWriter) -> None:
        """Until something happens to the file, which is raised."""
        _log.info("keeping the history", path=str(self._path), seq=writer.seq)
        async with QueryService(self._bus, self._state.name, lambda: self._database):
            await together(writer.write(), check_file(self._database), self._wait_overloaded())

    async def _wait_overloaded(self) -> None:
        await self._overloaded.wait()
        raise OperatingError("the file takes rows more slowly than they come")

    def _say(self, error: OperatingError) -> None:
        _log.warning(
            "the history is left to a projector",
            path=str(self._path),
            kind=type(error).__name__,
            reason=str(error),
        )

    def _let_go(self) -> None:
        """Fold as if there was no file."""
        self.apply = self._fold
        self._state.steps = None
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.abandon()

    async def close(self) -> None:
        """Write what is folded, keep the state, and let go of the file."""
        try:
            if self.writer is not None:
                await self.writer.close()
        except OperatingError as error:
            self._say(error)
        finally:
            self._let_go()
            await self._in_thread(self._shut)
            self._thread.shutdown()

    def _shut(self) -> None:
        self._database.__exit__(None, None, None)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _beside(config: MasterConfig, namespace: str) -> Beside:
    words = ["--namespace", namespace, "--data", str(config.history), "--name", f"{config.name}-projector"]
    words += ["--replicas", str(config.replicas)]
    if config.archive is not None:
        words += ["--archive", config.archive]
    return Beside(config.url, words)
