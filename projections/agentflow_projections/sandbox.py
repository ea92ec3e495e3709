"""SQL of people one need not trust: in a process of its own that can be killed.

DuckDB knows no untrusted user: any statement may read what its process may, take all memory
and run for ever, and does not always heed an interrupt. So each question gets a process that
has nothing but a copy of one namespace's history (`confinement`), limits on memory and CPU,
and a deadline after which it is killed. DuckDB's own locks come on top (`sandboxed`).
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec import Struct

from agentflow.errors import OperatingError
from agentflow_projections.query import Question

CHUNK_BYTES: Final = 256 * 1024
"""Answers come in pieces of about this size."""
_FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
_HEAD_BYTES: Final = 5
# Other allocators reserve address space by the gigabyte, which is limited here.
_ENVIRONMENT: Final = {
    "HOME": "/nonexistent",
    "PATH": "",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
}
# Cut off before DuckDB and Arrow are loaded, since they start threads.
PROGRAM: Final = (
    "from agentflow_projections.confinement import cut_off; cut_off(); "
    "from agentflow_projections.sandboxed import main; main()"
)
_MIB: Final = 1024 * 1024

T = TypeVar("T")


class Limits(Struct, frozen=True):
    """What one question may take."""

    rows_max: int = 100_000
    bytes_max: int = 64 * _MIB
    """Bytes of an answer, as it is sent."""
    address_space_mb: int = 1_024
    memory_mb: int = 512
    """What DuckDB allows itself."""
    deadline_s: float = 10.0
    at_once: int = 2
    waiting_max: int = 8
    """So many may wait for their turn; further ones are turned away."""


class Overloaded(OperatingError):
    """Too many questions are asked at once."""


class DeadlineExceeded(OperatingError):
    """A question took longer than it may."""


class Deadline(Struct, frozen=True):
    """Until when an answer must be whole, by the loop's clock."""

    at: float
    allowed_s: float

    @classmethod
    def after(cls, allowed_s: float) -> Self:
        """So many seconds from now."""
        return cls(asyncio.get_running_loop().time() + allowed_s, allowed_s)

    async def wait_for(self, waiting: Coroutine[Any, Any, T], missed: str = "there was no whole answer") -> T:
        """Raises DeadlineExceeded, which says what was missed."""
        try:
            async with asyncio.timeout_at(self.at):
                return await waiting
        except TimeoutError as error:
            raise DeadlineExceeded(f"{missed} within {self.allowed_s:g} s") from error


class Job(Struct, frozen=True):
    """What the process is asked to do."""

    path: str
    question: Question
    arrow: bool
    rows_max: int
    limits: Limits


class End(Struct, frozen=True):
    """How an answer ended: it is whole, unless `truncated` says that a limit cut it off."""

    rows: int
    bytes: int
    truncated: bool
    position: int
    """How far the history reached that was asked."""


class Sandbox:
    """Runs questions, few at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits: Final = limits
        self._turns = asyncio.Semaphore(limits.at_once)
        self._waiting = 0

    async def ask(self, job: Job, deadline: Deadline) -> AsyncGenerator[tuple[bytes, bytes], None]:
        """The frames of the answer: letter and content; waiting for a turn is part of the time.

        Raises Overloaded, DeadlineExceeded, and OperatingError if the process died.
        """
        if self._turns.locked() and self._waiting >= self.limits.waiting_max:
            raise Overloaded(
                f"{self.limits.at_once} questions are being answered and {self._waiting} wait, which is as many"
                f" as may; the last of them ends within {self.limits.deadline_s:g} s"
            )
        self._waiting += 1
        try:
            await deadline.wait_for(self._turns.acquire())
        finally:
            self._waiting -= 1
        try:
            async with aclosing(_run(job, deadline)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._turns.release()


async def _run(job: Job, deadline: Deadline) -> AsyncGenerator[tuple[bytes, bytes], None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", PROGRAM),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(job.path).parent,
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.msgpack.encode(job))
        process.stdin.close()
        while True:
            frame = await deadline.wait_for(_frame(process.stdout))
            if frame is None:
                break
            yield frame
        status = await deadline.wait_for(process.wait())
        if status:
            raise OperatingError(_death(status, job.limits))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _death(status: int, limits: Limits) -> str:
    if status == -signal.SIGXCPU:
        return f"a question may take {limits.deadline_s:g} s of CPU"
    return (
        f"a question may take {limits.address_space_mb} MiB of memory and be nested only so deep:"
        f" the process that answered died with {status}"
    )


async def _frame(pipe: asyncio.StreamReader) -> tuple[bytes, bytes] | None:
    try:
        head = await pipe.readexactly(_HEAD_BYTES)
        size = int.from_bytes(head[:4])
        if size > _FRAME_BYTES_MAX:
            raise OperatingError(f"a row takes more than {_FRAME_BYTES_MAX} bytes")
        return head[4:], await pipe.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
