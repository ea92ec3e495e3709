"""One connection to one NATS server, from the handshake until it dies.

nats-py does the handshake (TLS, credentials), the parsing and the keep-alive pings. It does
not reconnect: every end of a connection, wanted or not, is final here, and `bus.Bus` opens
the next one. That leaves one path of recovery instead of three (its reconnect, its close,
ours), nothing buffered is sent after its caller was told that the connection is lost, and
the client's ways of staying "connected" with a dead read loop have nobody to fool.

What is written (PUB, HPUB, SUB, UNSUB) we compose ourselves, synchronously, into one list
that is handed to the socket in the next turn of the event loop: 3 us a message instead of
20, in the order said. What is read comes to `_process_msg`, which hands it to a plain
function instead of a queue and a task per subscription.

This is the only file that knows nats-py, and `_Client` the only class that leans on its
inside. `nats.errors.*` stop here.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from agentflow.errors import Disconnected, InvalidRequest
from agentflow.logs import get_logger

if TYPE_CHECKING:
    from urllib.parse import ParseResult

Headers = Mapping[str, str]
OnMessage = Callable[[str, bytes, str, dict[str, str] | None], None]
"""Called with subject, data, reply subject ("" if none) and headers; must not block."""

STATUS: Final = "Status"
"""Pseudo header: the server's inline status, for example "503"."""
DESCRIPTION: Final = "Description"

# Two pings unanswered end the connection: a half-open one is noticed after 4 to 6 seconds.
_PING_INTERVAL_S: Final = 2
_PINGS_OUTSTANDING_MAX: Final = 2
_CONNECT_TIMEOUT_S: Final = 2
_CLOSE_TIMEOUT_S: Final = 2.0
_READ_BUFFER_BYTES: Final = 64 * 1024
# Above the first, writers that can wait do; above the second, a write is refused.
_BACKLOG_BYTES_HIGH: Final = 4 * 1024 * 1024
_BACKLOG_BYTES_MAX: Final = 256 * 1024 * 1024

_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f]")

_log = get_logger(__name__)


class Connection:
    """An open connection. Every method but `drain` and `close` is synchronous."""

    def __init__(self, on_error: Callable[[str], None]) -> None:
        self.dead: Final = asyncio.Event()
        """Set once, when the connection has ended for whatever reason."""
        self._on_error = on_error
        self._open = False
        self._transport = _Transport(self._die)
        self._client = _Client(self._transport)
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0

    async def open(self, url: str, *, name: str, timeout_s: float) -> None:
        """Connect to `url`. Raises Disconnected; the connection is then dead."""
        try:
            await asyncio.wait_for(self._connect(url, name), timeout_s)
        except Exception as error:
            self.abort()
            raise Disconnected(f"cannot connect to {without_password(url)}: {error!r}") from error
        except BaseException:
            self.abort()
            raise
        self._open = True
        self._client.on_end(self._die)

    @property
    def max_payload(self) -> int:
        """Most bytes of headers and data of one message, as the server says."""
        return self._client.max_payload

    @property
    def discovered(self) -> list[str]:
        """Addresses of further servers of the cluster, as the server says."""
        return [server.geturl() for server in self._client.discovered_servers]

    @property
    def congested(self) -> bool:
        """Whether so much waits to be sent that a writer should `drain` first."""
        return self._backlog() > _BACKLOG_BYTES_HIGH

    async def drain(self) -> None:
        """Wait until the socket has taken most of what was written, or the connection died."""
        self._send()
        while self.congested and not self.dead.is_set():
            try:
                await self._transport.sent()
            except OSError:
                self._die()

    def publish(self, subject: str, data: bytes, reply: str = "", headers: Headers | None = None) -> None:
        """Send a message. Raises Disconnected, and InvalidRequest for what no server would take."""
        self._check_open()
        check_subject(subject)
        head = b"" if headers is None else _header_block(headers)
        size = len(head) + len(data)
        if size > self._client.max_payload:
            raise InvalidRequest(f"{size} bytes to {subject}: the server takes {self._client.max_payload}")
        if headers is None:
            self._write(f"PUB {subject} {reply} {size}\r\n".encode() + data + b"\r\n")
        else:
            control = f"HPUB {subject} {reply} {len(head)} {size}\r\n"
            self._write(b"".join((control.encode(), head, data, b"\r\n")))

    def subscribe(self, sid: int, subject: str, queue: str, callback: OnMessage) -> None:
        """Register interest; whatever is published on this connection afterwards finds it in place.

        Subject and queue must have passed `check_subject`.
        """
        self._check_open()
        self._client.callbacks[sid] = callback
        self._write(f"SUB {subject} {queue} {sid}\r\n".encode())

    def unsubscribe(self, sid: int) -> None:
        """Drop the interest; the callback is not called again."""
        if self._client.callbacks.pop(sid, None) is not None and not self.dead.is_set():
            self._write(f"UNSUB {sid}\r\n".encode())

    def check(self) -> None:
        """Look for a death that gave no sign: a task that ended, a client that closed."""
        if self._client.ended:
            self._die()

    def abort(self) -> None:
        """End the connection now; what was not sent is lost."""
        self._die()
        self._unsent.clear()
        self._client.stop()
        self._transport.abort()

    async def close(self) -> None:
        """Send what was written, then end the connection."""
        if not self.dead.is_set():
            self._send()
            self._die()
            self._client.stop()
            try:
                await asyncio.wait_for(self._transport.end(), _CLOSE_TIMEOUT_S)
            except (OSError, TimeoutError):
                _log.warning("connection closed with bytes unsent")
        self.abort()

    async def _connect(self, url: str, name: str) -> None:
        await self._client.connect(
            servers=[url],
            name=name,
            error_cb=self._on_client_error,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=_CONNECT_TIMEOUT_S,
            ping_interval=_PING_INTERVAL_S,
            max_outstanding_pings=_PINGS_OUTSTANDING_MAX,
            dont_randomize=True,
            # Intent must be enforced on both sides: nats-py would go on in plain text otherwise.
            tls=ssl.create_default_context() if url.startswith("tls://") else None,
            tls_handshake_first=url.startswith("tls://"),
        )

    async def _on_client_error(self, error: Exception) -> None:
        if self._open:  # before, it is raised
            self._on_error(str(error) or repr(error))

    def _die(self) -> None:
        self.dead.set()

    def _check_open(self) -> None:
        if self.dead.is_set():
            raise Disconnected("the connection to NATS is lost")
        if self._backlog() > _BACKLOG_BYTES_MAX:
            raise Disconnected(f"{self._backlog()} bytes wait to be sent to NATS")

    def _backlog(self) -> int:
        return self._unsent_bytes + self._transport.backlog()

    def _write(self, command: bytes) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent.append(command)
        self._unsent_bytes += len(command)

    def _send(self) -> None:
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        if unsent and not self.dead.is_set():
            try:
                self._transport.send(unsent)
            except (OSError, RuntimeError):  # uvloop says of a transport that was reset that it is closed
                self._die()


class _Transport(TcpTransport):
    """nats-py's transport, which also tells the end of the stream at once and can be cut off."""

    def __init__(self, on_eof: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nats-py is typed in part
        self._on_eof = on_eof

    def __bool__(self) -> bool:
        # nats-py asks whether there is a transport, and brings its own if there is none.
        return True

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Connect with a read buffer of twice nats-py's size: fewer turns of the loop a megabyte."""
        await super().connect(uri, max(buffer_size, _READ_BUFFER_BYTES), connect_timeout)

    async def read(self, buffer_size: int) -> bytes:
        """Read what is there, up to the whole buffer."""
        assert self._io_reader is not None, "read before connect"
        data = await self._io_reader.read(max(buffer_size, _READ_BUFFER_BYTES))
        if not data:
            self._on_eof()
        return data

    def send(self, commands: list[bytes]) -> None:
        """Hand commands to the socket."""
        assert self._io_writer is not None, "sent before connect"
        self._io_writer.writelines(commands)

    async def sent(self) -> None:
        """Wait until the socket has taken most of it. Raises OSError."""
        assert self._io_writer is not None, "sent before connect"
        await self._io_writer.drain()

    def backlog(self) -> int:
        """Bytes accepted and not yet taken by the kernel."""
        return 0 if self._io_writer is None else self._io_writer.transport.get_write_buffer_size()

    async def end(self) -> None:
        """Close once everything is sent. Raises OSError."""
        if self._io_writer is not None:
            self._io_writer.close()
            await self._io_writer.wait_closed()

    def abort(self) -> None:
        """Close without waiting for bytes that a dead peer will never take."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()


class _Client(Client):
    """nats-py's client, reduced to handshake, parsing and pings."""

    def __init__(self, transport: _Transport) -> None:
        super().__init__()
        self._transport = transport
        self.callbacks: Final[dict[int, OnMessage]] = {}

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        callback = self.callbacks.get(sid)
        if callback is None:
            return
        try:
            callback(
                subject.decode(errors="replace"),
                data,
                reply.decode(errors="replace"),
                parse_headers(headers) if headers else None,
            )
        except Exception:  # noqa: BLE001 - it must not end the read loop, which serves everybody else
            _log.exception("a message callback failed", subject=subject.decode(errors="replace"))

    def on_end(self, ended: Callable[[], None]) -> None:
        """Call `ended` when any of the tasks ends that a live connection needs."""
        for task in self._tasks():
            task.add_done_callback(lambda _: ended())

    @property
    def ended(self) -> bool:
        """Whether it can no longer serve, whatever it says itself."""
        return not self.is_connected or any(task.done() for task in self._tasks())

    def stop(self) -> None:
        """Cancel all tasks without ceremony; the transport is the caller's."""
        self._status = Client.CLOSED
        for task in self._tasks():
            task.cancel()

    def _tasks(self) -> list[asyncio.Task[None]]:
        # nats-py says Task, and not of what.
        tasks: list[asyncio.Task[None] | None] = [
            self._reading_task,  # pyright: ignore[reportUnknownMemberType]
            self._ping_interval_task,  # pyright: ignore[reportUnknownMemberType]
            self._flusher_task,  # pyright: ignore[reportUnknownMemberType]
        ]
        return [task for task in tasks if task is not None]


def check_subject(subject: str) -> None:
    """Raise InvalidRequest for what would break the protocol line, or smuggle in another one."""
    if not subject or _UNSAFE.search(subject):
        raise InvalidRequest(f"not a subject: {subject!r}")


def parse_headers(raw: bytes) -> dict[str, str]:
    """Parse a header block; an inline status becomes `STATUS` and `DESCRIPTION`.

    A third of the time nats-py's own parser takes, which counts at 100,000 messages a second.
    """
    lines = raw.decode("utf-8", "replace").split("\r\n")
    parsed: dict[str, str] = {}
    version = lines[0]
    if len(version) > len("NATS/1.0"):
        _, _, inline = version.partition(" ")
        parsed[STATUS], _, parsed[DESCRIPTION] = inline.strip().partition(" ")
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            parsed[name] = value.strip()
    return parsed


def _header_block(headers: Headers) -> bytes:
    """Serialise headers. Raises InvalidRequest for a line break that would smuggle in a command."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\r") != len(headers) or text.count("\n") != len(headers) or "\x00" in text:
        raise InvalidRequest(f"a header contains a line break: {dict(headers)!r}")
    return f"NATS/1.0\r\n{text}\r\n".encode()


def without_password(url: str) -> str:
    """A URL as it may be shown."""
    return re.sub(r"//[^@/]*@", "//", url)
