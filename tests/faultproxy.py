"""A TCP proxy that breaks connections in the ways networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 * 1024
_CUT_AGAIN_S = 0.05


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
        self._dropping_acks = False
        self._delay_s = 0.0
        self.connections = 0
        """How many connections were ever accepted."""
        self.dropped_bytes = 0
        """How much `drop_answers` has swallowed."""
        self.dropped_acks = 0
        """How many acknowledgements `drop_acks` has swallowed."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.refuse()
        self._to_server.set()
        self._to_client.set()
        while self._tasks:  # one that is just being connected is cut in the next round
            self.cut()
            await asyncio.wait(self._tasks, timeout=_CUT_AGAIN_S)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The port of `url`."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

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

    def drop_acks(self) -> None:
        """Swallow the acknowledgements of writes; all else passes, so the connection looks sound.

        Connections are reset first: what the server says is read from its beginning.
        """
        self._dropping_acks = True
        self.cut()

    def delay(self, seconds: float) -> None:
        """Let everything take so much longer, each way."""
        self._delay_s = seconds

    def heal(self) -> None:
        """End all faults. What was swallowed stays lost, so connections are reset."""
        was_lossy = self._dropping_answers
        self._refusing = self._dropping_answers = self._dropping_acks = False
        self._delay_s = 0.0
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
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # nobody listens there
            writer.transport.abort()
            return
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
        line = _Line(writer)
        acks = _AckFilter() if self._dropping_acks and not to_server else None
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await passing.wait()
                if self._dropping_answers and not to_server:
                    self.dropped_bytes += len(data)
                    continue
                if acks is not None:
                    data, dropped = acks.strain(data, dropping=self._dropping_acks)
                    self.dropped_acks += dropped
                line.send(data, self._delay_s)
                await writer.drain()
        writer.transport.abort()


class _Line:
    """Sends in order, also while the delay changes: a loop's timers do not keep the order of moments that are close."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._under_way: deque[tuple[float, bytes]] = deque()
        """When what arrives."""
        self._last = 0.0

    def send(self, data: bytes, delay_s: float) -> None:
        if not delay_s and not self._under_way:
            self._arrive(data)
            return
        self._last = max(self._loop.time() + delay_s, self._last)
        self._under_way.append((self._last, data))
        if len(self._under_way) == 1:
            self._loop.call_at(self._last, self._let_in)

    def _let_in(self) -> None:
        now = self._loop.time()
        while self._under_way and self._under_way[0][0] <= now:
            self._arrive(self._under_way.popleft()[1])
        if self._under_way:
            self._loop.call_at(self._under_way[0][0], self._let_in)

    def _arrive(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)


class _AckFilter:
    """Reads what a NATS server says to one client, and leaves out the acknowledgements of writes."""

    _MESSAGES = (b"MSG ", b"HMSG ")
    _ACK = b'{"stream":'

    def __init__(self) -> None:
        self._held = bytearray()

    def strain(self, data: bytes, *, dropping: bool) -> tuple[bytes, int]:
        """What passes of all that has come whole, and how many acknowledgements do not."""
        self._held += data
        passed = bytearray()
        dropped = at = 0
        while (found := self._next(at)) is not None:
            body, end = found
            if dropping and self._held.startswith(self._ACK, body):
                dropped += 1
            else:
                passed += self._held[at:end]
            at = end
        del self._held[:at]
        return bytes(passed), dropped

    def _next(self, at: int) -> tuple[int, int] | None:
        """Where the body of the next thing said begins and where it ends; None if it has not come whole."""
        line_end = self._held.find(b"\r\n", at)
        if line_end < 0:
            return None
        body = line_end + 2
        if not self._held.startswith(self._MESSAGES, at):
            return body, body
        end = body + int(self._held[at:line_end].rsplit(b" ", 1)[1]) + 2
        return (body, end) if end <= len(self._held) else None
