"""The archiver: follows a log, seals it stretch by stretch, and trims what is sealed.

It folds what it archives, so that each stretch has the fold's verdicts beside its messages,
and so that it has a state to put in the place of what it trims. The order is always the same:
sealed, read back, state kept and read back, place written down, removed. Killed at any point it
goes on from the last stretch that has its name; what it had not sealed is still in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self, cast

from msgspec import Struct

from agentflow.domain.fold import fold
from agentflow.domain.snapshot import hash_of, restore, snapshot
from agentflow.domain.state import Namespace
from agentflow.events import ObjectRef
from agentflow.frames import judge
from agentflow.limits import LEVEL
from agentflow.log.port import Identity, Message, Trim, TrimmableLog
from agentflow.logs import get_logger
from agentflow.objects.kept import keep_messages, read_many
from agentflow.objects.port import RemovableObjects
from agentflow_projections.archive import (
    Archive,
    ArchiveDamaged,
    Stretch,
    chain_at_end,
    read_messages,
    verify,
)
from agentflow_projections.archive_compact import groups, merge
from agentflow_projections.archive_writer import Pile, Point, keep_state, remove_unfinished, seal
from agentflow_projections.archived_log import check_seam, in_thread
from agentflow_projections.chain import START
from agentflow_projections.rows import Recorder
from agentflow_projections.trimmed import fetch_snapshot, needed

_ROWS_MAX: Final = 20_000
"""So many rows are kept as tuples before they become columns."""
_SLICE_S: Final = 0.05

Progress = Callable[[int], None]
"""Told how far the log is read."""

_log = get_logger(__name__)


class Keep(Struct, frozen=True):
    """What stays in the live log."""

    age_s: float | None = None
    """What is younger; None: age alone removes nothing."""
    bytes: int | None = None
    """So much, about; None: size alone removes nothing."""
    young_s: float = 300.0
    """What is younger is never removed: writers may still look for what became of their writes."""


class Sealing(Struct, frozen=True):
    """When a stretch is sealed: what comes first. At the end of a day in any case."""

    events: int = 1_000_000
    bytes: int = 128 * 1024 * 1024
    after_s: float = 3_600.0
    """Its first message is so old."""
    state_every_s: float = 60.0
    """The state is kept with a stretch at most so often."""


class Archiver:
    """One namespace's archiver. An async context manager; entered means it goes on from its archive.

    Entering raises ArchiveLocked, ArchiveDamaged; LogGone if the log is not the archive's;
    LogTrimmed if somebody else's archive has what is missing in this one.
    """

    def __init__(
        self,
        log: TrimmableLog,
        archive: Archive,
        objects: RemovableObjects,
        *,
        keep: Keep | None = None,
        sealing: Sealing | None = None,
        clock: Callable[[], float] = time.time,
        point: Point = lambda _: None,
    ) -> None:
        self._log = log
        self._archive = archive
        self._objects = objects
        self._keep = keep or Keep()
        self._sealing = sealing or Sealing()
        self._clock = clock
        self._point = point
        self._stretches: list[Stretch] = []
        self._identity = ("", 0)
        self._recorder = Recorder(Namespace(log.namespace))
        self._pile = Pile(START)
        self._piled_at = 0.0
        self._stated_at = 0.0
        self._looked_at = 0.0
        self._held = ExitStack()
        self._left: set[str] = set()
        """Stretches that stay small: they cannot be read."""

    async def __aenter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self._archive.store.locked())
            await self._open()
            self._held = held.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def seq(self) -> int:
        """Up to where the log was read."""
        return self._recorder.state.seq

    @property
    def sealed_seq(self) -> int:
        """Up to where the log is in the archive."""
        return self._stretches[-1].last_seq if self._stretches else 0

    @property
    def stretches(self) -> Sequence[Stretch]:
        """What is in the archive."""
        return self._stretches

    @property
    def state(self) -> Namespace:
        """The fold, up to `seq`."""
        return self._recorder.state

    # Opening -----------------------------------------------------------------------------

    async def _open(self) -> None:
        await asyncio.to_thread(remove_unfinished, self._archive)
        self._stretches = await asyncio.to_thread(self._archive.stretches)
        await check_seam(self._stretches, self._log)
        identity = await self._log.identity()
        self._identity = (identity.name, identity.created_ns)
        if self._stretches:
            await self._take_up()
        else:
            await self._begin(identity)
        if identity.trim is not None:
            await self._log.trim(identity.trim)  # as far as somebody got who was interrupted

    async def _take_up(self) -> None:
        """Go on from what is archived."""
        kept = await asyncio.to_thread(self._archive.state, self._stretches)
        state = kept or Namespace(self._log.namespace)
        async for messages in in_thread(self._archive.messages(state.seq)):
            for message in messages:
                fold(
                    state,
                    message.seq,
                    message.time_ns,
                    judge(message.subject, message.data, message.headers),
                )
                state.ended.clear()
        if state.seq != self.sealed_seq:
            raise ArchiveDamaged(f"{self._archive.where} folds up to {state.seq}, expected {self.sealed_seq}")
        self._recorder = Recorder(state)
        self._pile = Pile(chain_at_end(self._stretches))

    async def _begin(self, identity: Identity) -> None:
        """Begin an archive where the log begins."""
        if identity.trim is None:
            # Somebody's purge before there was an archive took what lies before.
            self._recorder.state.seq = identity.first_seq - 1
            return
        state, chain = await fetch_snapshot(self._log, self._objects)
        _log.warning(
            "the archive begins with a snapshot: the log was trimmed", namespace=state.name, after=state.seq
        )
        self._recorder = Recorder(state)
        self._pile = Pile(chain)

    # Following ---------------------------------------------------------------------------

    async def run(self, *, until: int | None = None, progress: Progress | None = None) -> None:
        """Follow the log for ever, or until all up to a sequence is sealed, sealing and trimming as it is due.

        Raises LogGone, ArchiveDamaged, OSError.
        """
        if until is None or self.seq < until:
            await self._follow(until, progress)
        await self.seal()
        await self.trim()
        await self.compact()

    async def _follow(self, until: int | None, progress: Progress | None) -> None:
        following = cast("AsyncGenerator[list[Message], None]", self._log.follow(self.seq))
        async with aclosing(following):
            waiting = asyncio.ensure_future(anext(following))
            try:
                while until is None or self.seq < until:
                    done, _ = await asyncio.wait([waiting], timeout=self._due_in_s())
                    if done:
                        await self._take(waiting.result(), until)
                        waiting = asyncio.ensure_future(anext(following))
                        if progress is not None:
                            progress(self.seq)
                    await self._keep_house()
            finally:
                waiting.cancel()
                await asyncio.wait([waiting])

    async def _take(self, messages: Sequence[Message], until: int | None) -> None:
        pause_at = time.monotonic() + _SLICE_S
        for message in messages:
            if until is not None and message.seq > until:
                return
            if self._is_full(message):
                await self.seal()
            self._add(message)
            if time.monotonic() >= pause_at:
                await asyncio.sleep(0)
                pause_at = time.monotonic() + _SLICE_S

    def _is_full(self, message: Message) -> bool:
        """Whether a message belongs to another stretch than what is piled."""
        first = self._pile.first
        if first is None:
            return False
        full = self._pile.events >= self._sealing.events or self._pile.bytes >= self._sealing.bytes
        return full or _day(message) > _day(first)

    def _add(self, message: Message) -> None:
        if self._pile.first is None:
            self._piled_at = self._clock()
        verdicts = self._recorder.apply(message)
        self._recorder.state.ended.clear()
        self._pile.add(message, len(verdicts))
        if self._recorder.size >= _ROWS_MAX:
            self._pile.take_rows(self._recorder.take())

    def _due_in_s(self) -> float:
        """When to look again though nothing comes."""
        if self._pile.first is None:
            return self._sealing.state_every_s
        return max(
            min(self._piled_at + self._sealing.after_s - self._clock(), self._sealing.state_every_s), 0.01
        )

    async def compact(self) -> None:
        """Make the small stretches of days that are over large ones.

        Those that cannot be read stay as they are, and that is said once. Raises ArchiveUnreachable, OSError.
        """
        today = self._stretches[-1].day if self._stretches else ""
        past = [each for each in self._stretches if each.day < today and each.place not in self._left]
        sealing = self._sealing
        for group in groups(past, events=sealing.events, size=sealing.bytes):
            try:
                merged = await asyncio.to_thread(merge, self._archive, group, self._point)
                _log.info("made one", where=merged.where, stretches=len(group))
            except ArchiveDamaged as error:
                self._left |= {each.place for each in group}
                _log.warning("stretches cannot be made one", where=group[0].where, error=str(error))
            self._stretches = await asyncio.to_thread(self._archive.stretches)

    async def _keep_house(self) -> None:
        if self._pile.first is not None and self._clock() - self._piled_at >= self._sealing.after_s:
            await self.seal()
        if self._clock() - self._looked_at >= self._sealing.state_every_s:
            self._looked_at = self._clock()
            await self.trim()
            await self.compact()

    # Sealing -----------------------------------------------------------------------------

    async def seal(self) -> None:
        """Seal what was read and is not sealed yet."""
        if self._pile.first is None:
            return
        self._pile.take_rows(self._recorder.take())
        sealed = await asyncio.to_thread(
            seal, self._archive, self._pile, self._identity, self.state.level, self._point
        )
        self._stretches.append(sealed)
        self._pile = Pile(sealed.chain)
        manifest = sealed.manifest
        _log.info("sealed", where=sealed.where, messages=manifest.messages, events=manifest.events)
        if self._clock() - self._stated_at >= self._sealing.state_every_s:
            self._point("state")
            await asyncio.to_thread(keep_state, self._archive, sealed, snapshot(self.state))
            self._stated_at = self._clock()

    # Trimming ----------------------------------------------------------------------------

    async def trim(self) -> int:
        """Trim the live log as the policy says; how many messages were removed.

        Nothing is removed that is not in the archive, read from the disk again, and without a
        snapshot of the fold in the object store, restored again.
        """
        if self._keep.age_s is None and self._keep.bytes is None:
            return 0
        found = (await self._log.identity()).trim
        target = max(self._due(), await self._too_much())
        if target <= (0 if found is None else found.seq):
            return 0
        await self.seal()
        for stretch in self._stretches:
            if (0 if found is None else found.seq) < stretch.last_seq <= target:
                await asyncio.to_thread(verify, stretch)
        self._point("snapshot")
        to = await self._stand_in(target)
        self._point("trim")
        removed = await self._log.trim(to)
        _log.info("trimmed", stream=self._identity[0], up_to=target, removed=removed)
        await self._forget(found, to)
        return removed

    async def _forget(self, before: Trim | None, now: Trim) -> None:
        """Remove from the object store what stood for the last trim and not for this one."""
        if before is not None:
            stays = {each.name for each in _objects_of(now)}
            for ref in _objects_of(before):
                if ref.name not in stays:
                    await self._objects.remove(ref)

    async def _stand_in(self, target: int) -> Trim:
        """Put the state of the fold where everybody finds it, and get it back."""
        data = snapshot(self.state)
        digest = hash_of(data)
        ref = await self._objects.put(data)
        stored = await self._objects.get(ref)
        if hash_of(snapshot(restore(stored, knows=LEVEL))) != digest:
            raise ArchiveDamaged(f"the state at {self.seq} is not restored as it was: nothing is trimmed")
        chain = self._pile.chain.hex()
        kept = await keep_messages(self._objects, await self._messages_for_work(target))
        return Trim(target, self.seq, ref, digest=digest, chain=chain, level=self.state.level, kept=kept)

    async def _messages_for_work(self, target: int) -> list[Message]:
        """What open work will be read from, of what is trimmed."""
        positions = needed(self.state)
        begin = self._stretches[0].manifest.first_seq
        before = [seq for seq in positions if seq < begin]
        found = await read_many(self._log, self._objects, before)
        kept = [found[seq] for seq in sorted(found)]
        return kept + await asyncio.to_thread(lambda: list(self._archived(positions, target)))

    def _archived(self, positions: AbstractSet[int], target: int) -> Iterator[Message]:
        """The messages at these positions, in order, as far as they are trimmed."""
        for stretch in self._stretches:
            manifest = stretch.manifest
            wanted = {seq for seq in positions if manifest.first_seq <= seq <= min(manifest.last_seq, target)}
            if wanted:
                for messages in read_messages(stretch):
                    yield from (message for message in messages if message.seq in wanted)

    def _due(self) -> int:
        """The end of the last stretch that is older than the policy's age."""
        if self._keep.age_s is None:
            return 0
        return self._older_than(max(self._keep.age_s, self._keep.young_s))

    def _older_than(self, age_s: float) -> int:
        before_ns = (self._clock() - age_s) * 1e9
        ends = [each.last_seq for each in self._stretches if each.manifest.last_ns <= before_ns]
        return max(ends, default=0)

    async def _too_much(self) -> int:
        """The end of the last stretch that has to go for the size the policy allows."""
        if self._keep.bytes is None:
            return 0
        identity = await self._log.identity()
        excess, target = identity.bytes - self._keep.bytes, 0
        young = self._older_than(self._keep.young_s)
        for stretch in self._stretches:
            if excess <= 0 or stretch.last_seq > young:
                break
            if stretch.last_seq > identity.trimmed_seq:
                excess -= stretch.manifest.bytes
                target = stretch.last_seq
        return target


def _objects_of(trim: Trim) -> list[ObjectRef]:
    return [trim.snapshot, *(each.messages for each in trim.kept)]


def _day(message: Message) -> str:
    return datetime.fromtimestamp(message.time_ns / 1e9, UTC).strftime("%Y-%m-%d")
