"""SQL of people one need not trust: in a process of its own that can be killed.

DuckDB knows no untrusted user: any statement may read what its process may, take all memory
and run for ever, and does not always heed an interrupt. So each question gets a process that
has nothing but a copy of one namespace's history, no network where the system lets it, limits
of the kernel on memory, CPU, files written and open, and a deadline after which it is killed.
DuckDB's own locks come on top.

`python -m agentflow_projections.sandbox` is that process: it reads a `Job` from stdin and writes
frames to stdout, each a length (4 bytes, big-endian), a letter and so many bytes: `J` a JSON
document, `A` a piece of an Arrow IPC stream.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import os
import resource
import sys
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import msgspec
from msgspec import Struct

from agentflow.errors import AgentFlowError, InvalidRequest, OperatingError
from agentflow_projections.query import Answer, Question, answer, position_of

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
NOBODY: Final = 65_534
"""The user the process becomes, where it may."""
_CLONE_NEWUSER: Final = 0x1000_0000
_CLONE_NEWNET: Final = 0x4000_0000
_NO_NEW_PRIVILEGES: Final = 38
_FILES_MAX: Final = 64
_MIB: Final = 1024 * 1024

LOCKED_DOWN: Final[Mapping[str, str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "python_enable_replacements": "false",
    "threads": "1",
    "temp_directory": "",
    "max_temp_directory_size": "0B",
    "lock_configuration": "true",
}

T = TypeVar("T")


class Limits(Struct, frozen=True):
    """What one question may take."""

    rows_max: int = 100_000
    bytes_max: int = 64 * _MIB
    """Bytes of an answer, as it is sent."""
    address_space_mb: int = 1_536
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

    async def ask(self, job: Job, deadline: float) -> AsyncGenerator[tuple[bytes, bytes], None]:
        """The frames of the answer: letter and content; by `deadline` of the loop's clock, waiting included.

        Raises Overloaded, DeadlineExceeded, and OperatingError if the process died.
        """
        if self._turns.locked() and self._waiting >= self.limits.waiting_max:
            raise Overloaded(f"{self.limits.at_once} questions are being answered and {self._waiting} wait")
        self._waiting += 1
        try:
            await _within(self._turns.acquire(), deadline)
        finally:
            self._waiting -= 1
        try:
            async with aclosing(_run(job, deadline)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._turns.release()


async def _run(job: Job, deadline: float) -> AsyncGenerator[tuple[bytes, bytes], None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", "agentflow_projections.sandbox"),
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
            frame = await _within(_frame(process.stdout), deadline)
            if frame is None:
                break
            yield frame
        status = await _within(process.wait(), deadline)
        if status:
            raise OperatingError(
                f"the process that answered died with {status}: it took more memory or CPU than it may"
            )
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _within(waiting: Coroutine[Any, Any, T], deadline: float) -> T:
    try:
        async with asyncio.timeout_at(deadline):
            return await waiting
    except TimeoutError as error:
        raise DeadlineExceeded("no whole answer in the time allowed") from error


async def _frame(pipe: asyncio.StreamReader) -> tuple[bytes, bytes] | None:
    try:
        head = await pipe.readexactly(_HEAD_BYTES)
        size = int.from_bytes(head[:4])
        if size > _FRAME_BYTES_MAX:
            raise OperatingError(f"a row takes more than {_FRAME_BYTES_MAX} bytes")
        return head[4:], await pipe.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


# In the process ------------------------------------------------------------------------------


def main() -> None:
    """Answer one question, and end."""
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    leave_network()  # what has threads already may not
    import duckdb  # noqa: PLC0415 - files are opened before there may be no more
    import pyarrow as pa  # noqa: PLC0415

    pa.set_cpu_count(1)
    confine(job.limits)
    out = _Out(sys.stdout.buffer)
    try:
        with duckdb.connect(job.path, read_only=True, config=locked_down(job.limits)) as connection:
            _answer(connection, job, out)
    except InvalidRequest as error:
        out.json({"error": {"kind": "invalid", "message": str(error)}})
    except (AgentFlowError, duckdb.Error, MemoryError) as error:
        out.json({"error": {"kind": "failed", "message": str(error) or type(error).__name__}})


def locked_down(limits: Limits) -> dict[str, Any]:
    """DuckDB's own locks: no file, no network, no setting."""
    return {**LOCKED_DOWN, "memory_limit": f"{limits.memory_mb}MiB"}


def leave_network() -> None:
    """Be in a network of one's own, with nothing in it; where the system forbids it the other locks have to do."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNET) and os.geteuid():
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def confine(limits: Limits) -> None:
    """Give up for good what a question needs not: rights, memory, CPU, files."""
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    cpu_s = int(limits.deadline_s) + 1
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space_mb * _MIB),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _FILES_MAX),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _answer(connection: Any, job: Job, out: _Out) -> None:
    position = position_of(connection.cursor())
    found = answer(connection.cursor(), job.question)
    out.json({"columns": msgspec.to_builtins(found.columns), "position": position})
    chunks = _arrow_chunks(found, job) if job.arrow else _json_chunks(found, job)
    rows, truncated = 0, False
    for count, letter, chunk in chunks:
        if out.sent + len(chunk) > job.limits.bytes_max:
            truncated = True
            break
        out.frame(letter, chunk)
        rows += count
    truncated = truncated or rows > job.rows_max
    out.json({"end": End(min(rows, job.rows_max), out.sent, truncated, position)})


Chunk = tuple[int, bytes, bytes]
"""Rows in it, its letter, its bytes."""


def _json_chunks(found: Answer, job: Job) -> Iterator[Chunk]:
    """Rows as JSON, up to one more than may be sent: that there is more is told by the count."""
    left = job.rows_max
    encode = msgspec.json.Encoder().encode
    for batch in found.rows():
        pieces, size = [], 0
        for row in batch[:left]:
            pieces.append(encode(row))
            size += len(pieces[-1])
            if size >= CHUNK_BYTES:
                yield len(pieces), b"J", _rows(pieces)
                pieces, size = [], 0
        if pieces:
            yield len(pieces), b"J", _rows(pieces)
        left -= len(batch)
        if left < 0:
            yield 1, b"J", _rows([])
            return


def _rows(pieces: list[bytes]) -> bytes:
    return b'{"rows":[' + b",".join(pieces) + b"]}"


def _arrow_chunks(found: Answer, job: Job) -> Iterator[Chunk]:
    import pyarrow as pa  # noqa: PLC0415 - JSON needs none

    left = job.rows_max
    batches = found.arrow()
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches.schema) as writer:
        for batch in found.batches(batches):
            writer.write_batch(batch.slice(0, left))
            yield min(batch.num_rows, left), b"A", _taken(sink)
            left -= batch.num_rows
            if left < 0:
                yield 1, b"A", b""
                break
    yield 0, b"A", _taken(sink)


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


class _Out:
    """Writes frames."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.sent = 0
        self._pipe = pipe

    def json(self, document: Any) -> None:
        self.frame(b"J", msgspec.json.encode(document))

    def frame(self, letter: bytes, data: bytes) -> None:
        self._pipe.write(len(data).to_bytes(4) + letter + data)
        self._pipe.flush()
        self.sent += len(data)


if __name__ == "__main__":
    main()
