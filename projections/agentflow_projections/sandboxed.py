"""The process that answers one question, and ends; `sandbox` starts it.

It reads a `Job` from stdin and writes frames to stdout, each a length (4 bytes, big-endian), a
letter and so many bytes: `J` a JSON document, `A` a piece of an Arrow IPC stream.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import duckdb
import msgspec
import pyarrow as pa

from agentflow.errors import InvalidRequest
from agentflow_projections.confinement import confine
from agentflow_projections.query import Answer, answer, position_of
from agentflow_projections.sandbox import CHUNK_BYTES, End, Job, Limits

_SETTINGS: Final[Mapping[str, str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "allow_unsigned_extensions": "false",
    "allow_persistent_secrets": "false",
    "python_enable_replacements": "false",
    "threads": "1",
    "async_threads": "1",
    "temp_directory": "",
    "max_temp_directory_size": "0B",
}
# After the others, and in this order: each forbids some of what came before it.
_LOCKS: Final = ("SET enable_external_access = false", "SET lock_configuration = true")


def main() -> None:
    """Answer one question."""
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    path, limits = Path(job.path), job.limits
    pa.set_cpu_count(1)
    confine(path.parent, address_space_mb=limits.address_space_mb, cpu_s=int(limits.deadline_s) + 1)
    out = _Out(sys.stdout.buffer)
    try:
        with locked_down(path.name, limits) as connection:
            _answer(connection, job, out)
    except InvalidRequest as error:
        out.error("invalid", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it was: who asked is told
        out.error("failed", _said(error, limits))


def _said(error: Exception, limits: Limits) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"a question may take {limits.memory_mb} MiB of memory: {text.splitlines()[0]}"
    return text


def locked_down(path: str, limits: Limits) -> Any:
    """A connection with DuckDB's own locks: no other file, no network, no setting, no writing."""
    config: dict[str, Any] = {**_SETTINGS, "memory_limit": f"{limits.memory_mb}MiB"}
    connection = duckdb.connect(path, read_only=True, config=config)
    for lock in _LOCKS:
        connection.execute(lock)
    return connection


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

    def error(self, kind: str, message: str) -> None:
        """Why there is no answer, or no more of it."""
        self.json({"error": {"kind": kind, "message": message}})

    def json(self, document: Any) -> None:
        self.frame(b"J", msgspec.json.encode(document))

    def frame(self, letter: bytes, data: bytes) -> None:
        self._pipe.write(len(data).to_bytes(4) + letter + data)
        self._pipe.flush()
        self.sent += len(data)
