"""Archive and live log as one: a log that begins where the archive begins."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from msgspec.structs import replace

from agentflow.errors import LogGone, LogTrimmed
from agentflow.log.memory import matches_any
from agentflow.log.port import Appended, Fence, Frame, Identity, Log, Message
from agentflow.log.stored import msg_id_of
from agentflow_projections.archive import Archive, Stretch, read_messages
from agentflow_projections.chain import START, chained


class ArchivedLog:
    """See `agentflow.log.port.Log`. What the live log lost by trimming is read from the archive.

        async with ArchivedLog(log, "/var/lib/agentflow/archive") as whole:
            async for messages in whole.follow(0): ...

    Entering raises LogGone if archive and log do not belong together, ArchiveDamaged. The log
    is the caller's to close.
    """

    def __init__(self, log: Log, where: str | Path) -> None:
        self._log = log
        self._archive = Archive(where, log.namespace)
        self._stretches: list[Stretch] = []

    async def __aenter__(self) -> Self:
        await self._look()
        await check_seam(self._stretches, self._log)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    @property
    def namespace(self) -> str:
        """The namespace this log belongs to."""
        return self._log.namespace

    @property
    def archived_seq(self) -> int:
        """Up to where it is read from the archive."""
        return self._stretches[-1].last_seq if self._stretches else 0

    async def identity(self) -> Identity:
        """That of the live log, beginning where the archive begins."""
        found = await self._log.identity()
        if not self._stretches:
            return found
        return replace(
            found, first_seq=min(found.first_seq, self._stretches[0].manifest.first_seq), trim=None
        )

    async def append(
        self,
        frame: Frame,
        *,
        fence: Fence | None = None,
        timeout_s: float = 5.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store one frame in the live log; see the port."""
        return await self._log.append(frame, fence=fence, timeout_s=timeout_s, in_doubt_after=in_doubt_after)

    async def append_batch(
        self,
        frames: Sequence[Frame],
        *,
        fence: Fence | None = None,
        timeout_s: float = 10.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store all frames in the live log, or none; see the port."""
        return await self._log.append_batch(
            frames, fence=fence, timeout_s=timeout_s, in_doubt_after=in_doubt_after
        )

    async def find(self, msg_id: str, *, after: int) -> int | None:
        """Sequence of the message stored under `msg_id` after sequence `after`, or None."""
        async for messages in in_thread(self._archive.messages(after)):
            for message in messages:
                if msg_id_of(message) == msg_id:
                    return message.seq
        return await self._log.find(msg_id, after=max(after, self.archived_seq))

    async def read(self, seq: int) -> Message | None:
        """The message at `seq`, or None if it is not there."""
        if seq > self.archived_seq:
            return await self._log.read(seq)
        found = await asyncio.to_thread(next, self._archive.messages(seq - 1, seq), None)
        return found[0] if found else None

    async def last(self, subject: str) -> Message | None:
        """The last message on an exact subject: in the live log, or else in the archive."""
        found = await self._log.last(subject)
        if found is not None:
            return found
        for stretch in reversed(self._stretches):
            begin, end = stretch.manifest.first_seq - 1, stretch.last_seq
            async for messages in in_thread(self._archive.messages(begin, end)):
                found = next((each for each in reversed(messages) if each.subject == subject), found)
            if found is not None:
                return found
        return None

    async def follow(
        self, after: int, *, subjects: Sequence[str] = ()
    ) -> AsyncGenerator[list[Message], None]:
        """Everything after sequence `after`, from the archive and then from the live log; see the port."""
        patterns = tuple(subjects)
        while True:
            await self._look()
            async for messages in in_thread(self._archive.messages(after)):
                after = messages[-1].seq
                wanted = [each for each in messages if not patterns or matches_any(patterns, each.subject)]
                if wanted:
                    yield wanted
            try:
                following = cast(
                    "AsyncGenerator[list[Message], None]", self._log.follow(after, subjects=subjects)
                )
                async with aclosing(following):
                    async for messages in following:
                        after = messages[-1].seq
                        yield messages
            except LogTrimmed:
                # Trimmed while we read, so archived further.
                await self._look()
                if self.archived_seq <= after:
                    raise

    async def _look(self) -> None:
        self._stretches = await asyncio.to_thread(self._archive.stretches)


async def in_thread(reading: Iterator[list[Message]]) -> AsyncGenerator[list[Message], None]:
    """What is read from a disk or over a network, while others go on."""
    while (messages := await asyncio.to_thread(next, reading, None)) is not None:
        yield messages


async def check_seam(stretches: Sequence[Stretch], log: Log) -> None:
    """Raise LogGone unless the live log goes on where the archive ends.

    It does if the last message archived is still in it, byte by byte, or if it was trimmed up to
    there with the same hash chain. That another creation date does no harm: a log that was
    restored from a backup has one.
    """
    if not stretches:
        return
    end, found = stretches[-1], await log.identity()
    where = f"{end.where} ends at {end.last_seq}"
    if found.last_seq < end.last_seq:
        raise LogGone(
            f"{where}, but stream {found.name} ends at {found.last_seq}: it is another log, or went back"
        )
    if found.trimmed_seq > end.last_seq:
        raise LogTrimmed(
            f"{where}, but stream {found.name} was trimmed up to {found.trimmed_seq} by another archive"
        )
    if found.first_seq <= end.last_seq:
        live = await log.read(end.last_seq)
        if live is None or chained(START, live) != chained(
            START, await asyncio.to_thread(_last_message, end)
        ):
            raise LogGone(
                f"{where} with another message than stream {found.name} holds there: it is another log"
            )
    elif not _is_joined(end, found):
        raise LogGone(
            f"{where}, but stream {found.name} begins at {found.first_seq}: nothing tells that they belong together"
        )


def _last_message(stretch: Stretch) -> Message:
    (last,) = deque((messages[-1] for messages in read_messages(stretch)), maxlen=1)
    return last


def _is_joined(end: Stretch, found: Identity) -> bool:
    """Whether a log of which nothing overlaps goes on from there."""
    trim = found.trim
    if trim is None or found.first_seq != end.last_seq + 1:
        return False
    same_chain = trim.snapshot_seq == end.last_seq and trim.chain == end.manifest.chain_after
    return same_chain or (end.manifest.stream, end.manifest.created_ns) == (found.name, found.created_ns)
