"""What a log's messages say, judged in a second process while many of them wait.

Judging costs as much as folding. Who is far behind lets another process find out which
messages are canonical, which nearly all are; those need only be decoded here. The verdict is
the same: the other process says nothing but "need not be looked at again", and if it does not
answer, they are looked at here.

    frames of the log -> judge (second process) -> decode, fold, rows (this thread) -> DuckDB (its thread)
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Final, cast

import msgspec
from msgspec import Struct

from agentflow.frames import Judged, judge
from agentflow.log.port import Message
from agentflow.logs import get_logger

CHUNK_BYTES: Final = 256 * 1024
"""About so much data is handed over at once."""
AHEAD_MAX: Final = 16
"""Chunks read ahead of who takes them."""
BEHIND_NS: Final = 10 * 10**9
"""Who has as many chunks waiting as may wait, and of messages this old, has a log to catch up with.

Who is only a little behind a busy cluster is better off alone: the second process would take
its time from those who make it busy.
"""
ANSWER_S_MAX: Final = 10.0
"""A second process that takes longer is given up."""
LINGER_S: Final = 5.0
"""The second process ends when nobody was behind for so long."""

READS: Final = 4
"""Turns of the event loop after a large chunk."""
UP: Final = b"judging\n"
"""What the second process says first."""
LENGTH: Final = struct.Struct("<I")
"""What a chunk, and the answer to it, begins with: how many bytes follow."""

Spoken = list[tuple[Message, Judged]]

_encode: Final = msgspec.msgpack.Encoder().encode
_log = get_logger(__name__)


async def spoken(
    following: AsyncIterator[list[Message]], *, ahead_max: int = AHEAD_MAX
) -> AsyncGenerator[Spoken, None]:
    """What the messages of a log say, in order, in lists as they are ready; never an empty one.

    Ends with `following`, or raises what that raises once all that came before was yielded.
    """
    queue: asyncio.Queue[_Chunk | None] = asyncio.Queue(ahead_max)
    second = _Second()
    reading = asyncio.create_task(_read(following, queue, second), name="read ahead")
    try:
        while (chunk := await queue.get()) is not None:
            yield _judged(chunk.messages, await second.heard(chunk.answer))
            await _let_others_read(queue, chunk.size)
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(reading, return_exceptions=True)
        await second.end()


class _Chunk(Struct):
    """Messages that are handed over together."""

    messages: Sequence[Message]
    answer: asyncio.Future[bytes] | None
    """For each message 1 if it is canonical; None: nobody was asked."""
    size: int
    """Bytes of data."""


async def _let_others_read(queue: asyncio.Queue[_Chunk | None], size: int) -> None:
    """After a large chunk, which took long, let what has arrived meanwhile be read before the next one.

    In one turn the event loop reads a few hundred KiB at most, however much there is: without
    this, who takes chunks would wait for the log with the log at the door.
    """
    for _ in range(READS if size > CHUNK_BYTES // 8 else 0):
        if queue.full():
            return
        await asyncio.sleep(0)


def _judged(messages: Sequence[Message], canonical: bytes) -> Spoken:
    """`canonical` is empty if nobody else looked at them."""
    if len(canonical) != len(messages):
        canonical = bytes(len(messages))
    return [
        (each, judge(each.subject, each.data, each.headers, canonical=bool(known)))
        for each, known in zip(messages, canonical, strict=True)
    ]


async def _read(
    following: AsyncIterator[list[Message]], queue: asyncio.Queue[_Chunk | None], second: _Second
) -> None:
    try:
        await _read_ahead(following, queue, second)
    except Exception:
        await queue.put(None)
        raise
    await queue.put(None)


async def _read_ahead(
    following: AsyncIterator[list[Message]], queue: asyncio.Queue[_Chunk | None], second: _Second
) -> None:
    now, behind_at = asyncio.get_running_loop().time, 0.0
    async with aclosing(cast("AsyncGenerator[list[Message], None]", following)) as lists:
        async for messages in lists:
            for each, size in _chunks(messages):
                if queue.full() and time.time_ns() - each[-1].time_ns > BEHIND_NS:
                    behind_at = now()
                    await second.begin()
                elif second.begun and now() > behind_at + LINGER_S:
                    await second.end()
                await queue.put(_Chunk(each, await second.ask(each), size))


def _chunks(messages: Sequence[Message]) -> Iterator[tuple[Sequence[Message], int]]:
    """Parts of a list, with how many bytes each holds."""
    start = size = 0
    for end, message in enumerate(messages, 1):
        size += len(message.data)
        if size >= CHUNK_BYTES:
            yield messages[start:end], size
            start, size = end, 0
    if start < len(messages):
        yield messages[start:], size


class _Second:
    """The second process, while there is one. What goes wrong with it costs time only."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._asked: deque[asyncio.Future[bytes]] = deque()
        self._is_up = False
        """It has said so; until then nobody waits for it."""

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return self._process is not None

    async def begin(self) -> None:
        """Start it, if it is not there."""
        if self._process is not None:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agentflow_projections.judging",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=2 * CHUNK_BYTES,
            )
        except OSError as error:
            _log.warning("no second process to judge with", error=str(error))
            return
        assert self._process.stdout is not None
        self._listening = asyncio.create_task(self._listen(self._process.stdout), name="judged elsewhere")

    async def ask(self, messages: Sequence[Message]) -> asyncio.Future[bytes] | None:
        """Hand messages over; its answer will say of each whether it is canonical, or be empty."""
        if self._process is None or not self._is_up:
            return None
        assert self._process.stdin is not None
        data = _encode([(each.subject, each.data) for each in messages])
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        try:
            self._process.stdin.writelines((LENGTH.pack(len(data)), data))
            await self._process.stdin.drain()
        except OSError:
            self._give_up()
        return answer

    async def _listen(self, stdout: asyncio.StreamReader) -> None:
        try:
            await stdout.readexactly(len(UP))
            self._is_up = True
            while True:
                (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
                found = await stdout.readexactly(length)
                self._settle(self._asked.popleft(), found)
        except asyncio.IncompleteReadError:
            self._give_up()

    async def heard(self, answer: asyncio.Future[bytes] | None) -> bytes:
        """What it answered; nothing if it was not asked, is gone, or takes too long."""
        if answer is None:
            return b""
        try:
            return await asyncio.wait_for(answer, ANSWER_S_MAX)
        except TimeoutError:
            _log.warning("the second process does not answer", seconds=ANSWER_S_MAX)
            self._kill()
            return b""

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._give_up()

    def _give_up(self) -> None:
        """Whoever waits for an answer gets none, and nobody asks any more."""
        self._is_up = False
        while self._asked:
            self._settle(self._asked.popleft(), b"")

    def _settle(self, answer: asyncio.Future[bytes], found: bytes) -> None:
        if not answer.done():
            answer.set_result(found)

    async def end(self) -> None:
        """Let it end, after it has answered; one that does not is killed. Harmless twice."""
        process, self._process, self._is_up = self._process, None, False
        if process is None or self._listening is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._listening), ANSWER_S_MAX)
        except TimeoutError:
            process.kill()
            await self._listening
        await process.wait()
