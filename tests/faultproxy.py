"""A TCP proxy that breaks connections in the ways networks do."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024


class FaultProxy:
    """Stands between clients and a server on 127.0.0.1. An async context manager.

    All faults apply to every connection, present and future, until `heal`.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self._to_server = asyncio.Event()
        self._to_client = asyncio.Event()
        self._to_server.set()
        self._to_client.set()
        self._dropping_answers = False
        self.connections = 0
        """How many connections were ever accepted."""
        self.dropped_bytes = 0
        """How much `drop_answers` has swallowed."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where clients connect."""
        assert self._server is not None
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Reset all connections, and each new one at once."""
        self._refusing = True
        self.cut()

    def blackhole(self, *, to_server: bool = False, to_client: bool = False) -> None:
        """Let nothing pass in these directions; the connections look open."""
        if to_server:
            self._to_server.clear()
        if to_client:
            self._to_client.clear()

    def drop_answers(self) -> None:
        """Swallow what the server says; what the client says arrives."""
        self._dropping_answers = True

    def heal(self) -> None:
        """End all faults. What was swallowed stays lost, so connections are reset."""
        was_lossy = self._dropping_answers
        self._refusing = self._dropping_answers = False
        self._to_server.set()
        self._to_client.set()
        if was_lossy:
            self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        ends = {writer, upstream_writer}
        self._writers |= ends
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, upstream_writer, to_server=True))
                pumps.create_task(self._pump(upstream_reader, writer, to_server=False))
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        passing = self._to_server if to_server else self._to_client
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await passing.wait()
                if self._dropping_answers and not to_server:
                    self.dropped_bytes += len(data)
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
