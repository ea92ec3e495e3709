"""The bus: one NATS connection that is always coming back.

`Bus` keeps a connection open: it notices every way one can die (closed, reset, half open,
a dead read loop, an error from the server), opens the next one after a jittered pause,
restores the subscriptions and goes on for ever.

What was asked and not answered when a connection dies is *unknown* at once: nothing is sent
again behind the caller's back. Repeating is for those who know whether it is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import re
import secrets
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from agentflow.connection import (
    Connection,
    Headers,
    OnMessage,
    check_subject,
    without_password,
)
from agentflow.ending import end_tasks
from agentflow.errors import Disconnected, InvalidRequest, OperatingError
from agentflow.inbox import NOT_PERMITTED, Inbox, Reply
from agentflow.logs import get_logger

__all__ = ["Bus", "Reply", "Subscription", "servers_of"]

# A pause before each attempt, drawn from [0, limit): a thousand workers must not come back at once.
_PAUSE_S_FIRST: Final = 0.1
_PAUSE_S_MAX: Final = 2.0
_ATTEMPT_TIMEOUT_S: Final = 5.0
# A connection that ends sooner counts as a failed attempt.
_LIFE_S_MIN: Final = 5.0
# A server that answers nobody is left for another at most this often: an election may take as long.
_MOVE_INTERVAL_S: Final = 10.0
# Connections are checked this often for a death that gave no sign.
_WATCH_INTERVAL_S: Final = 1.0

_NO_RESPONDERS: Final = "503"
_VIOLATION: Final = re.compile(r'permissions violation for publish to "([^"]+)"', re.IGNORECASE)

_log = get_logger(__name__)


class Subscription:
    """An interest that survives reconnects. Made by `Bus.subscribe`."""

    def __init__(self, bus: Bus, sid: int, subject: str, queue: str, callback: OnMessage) -> None:
        self.subject: Final = subject
        self.queue: Final = queue
        self.callback: Final = callback
        self._bus = bus
        self._sid = sid

    async def unsubscribe(self) -> None:
        """Drop the interest. The callback is not called again; doing it twice is harmless."""
        self.end()

    def end(self) -> None:
        """Like `unsubscribe`, for who cannot wait."""
        self._bus.drop(self._sid)


class Bus:
    """A connection to NATS that survives. An async context manager: entered means connected.

    `url` is one server, or several: as a list, or as one text with commas. Entering raises
    `Disconnected` if no server answers within `connect_timeout_s`.

        async with Bus("nats://127.0.0.1:4222", name="worker-1") as bus:
            bus.publish("afq.default.heartbeat.w1", b"{}")
    """

    def __init__(self, url: str | Sequence[str], *, name: str, connect_timeout_s: float = 10.0) -> None:
        self.name: Final = name
        self._urls: Final = servers_of(url)
        self._connect_timeout_s = connect_timeout_s
        self._discovered: list[str] = []
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._adopted = False
        self._failures = 0
        self._untried: list[str] = []
        self._url = ""
        self._moved_at = -_MOVE_INTERVAL_S
        self._last_error = "no attempt was made"
        self._subscriptions: dict[int, Subscription] = {}
        self._sids = itertools.count(1)
        self._watchers: dict[int, Callable[[bool], None]] = {}
        self._inbox = Inbox(self.new_inbox() + ".")

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep(), name=f"bus {self.name}")
        self._keeper.add_done_callback(lambda _: self._up.set())  # nobody shall wait for ever
        try:
            await self.wait_connected(self._connect_timeout_s)
            await self.subscribe(self._inbox.prefix + "*", self._inbox.on_message)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await end_tasks(keeper)
        if self._connection is not None:
            await self._connection.close()
        self._lose()

    @property
    def connected(self) -> bool:
        """Whether a connection is open as far as we know."""
        return self._connection is not None and not self._connection.dead.is_set()

    @property
    def server(self) -> str:
        """The URL of the server connected to last, or tried now."""
        return self._url

    @property
    def max_payload(self) -> int:
        """Most bytes of headers and data of one message. Raises Disconnected."""
        return self._open().max_payload

    @staticmethod
    def new_inbox() -> str:
        """A subject that nobody else knows."""
        return f"_INBOX.{secrets.token_hex(11)}"

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        """Wait until connected. Raises Disconnected after `timeout_s` (None: wait for ever)."""
        if self.connected:
            return
        try:
            await asyncio.wait_for(self._wait_connected(), timeout_s)
        except TimeoutError as error:
            raise Disconnected(f"no connection to NATS within {timeout_s} s: {self._last_error}") from error

    async def _wait_connected(self) -> None:
        while not self.connected:
            if self._keeper is None or self._keeper.done():
                raise Disconnected(f"the bus {self.name} is closed")
            if self._connection is None:
                await self._up.wait()
            else:  # dead, and the keeper is about to notice
                await asyncio.sleep(0)

    def leave_server(self, why: str) -> None:
        """Go to another server, if there is one: this one is connected and of no use.

        So it is with a server that the others of its cluster cannot reach: it stays open to
        clients and knows nothing new. What was asked and not answered is unknown, as always.
        """
        now = asyncio.get_running_loop().time()
        others = [url for url in (*self._urls, *self._discovered) if url != self._url]
        if self._connection is None or not others or now - self._moved_at < _MOVE_INTERVAL_S:
            return
        _log.warning("leaving a server", bus=self.name, server=without_password(self._url), why=why)
        self._moved_at = now
        self._untried = [*random.sample(others, len(others)), self._url]
        self._connection.abort()

    async def wait_writable(self) -> None:
        """Wait while more bytes wait to be sent than the network takes. Raises Disconnected."""
        connection = self._open()
        if connection.congested:
            await connection.drain()

    def publish(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        """Send and forget; answers go to `reply`. Raises Disconnected if there is no connection now."""
        self._open().publish(subject, data, reply, headers)

    def ask(
        self, subject: str, data: bytes, headers: Headers | None = None, *, timeout_s: float
    ) -> asyncio.Future[Reply | None]:
        """Send now and hand out the future answer; None means unknown (timeout, connection lost).

        The future never raises. Raises Disconnected if nothing could be sent.
        """
        reply, future = self._inbox.expect(subject, timeout_s)
        try:
            self._open().publish(subject, data, reply, headers)
        except BaseException:
            future.cancel()
            raise
        return future

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Ask and wait for the answer. Raises Disconnected if none comes in time."""
        return (await self.request_reply(subject, data, timeout_s)).data

    async def request_reply(self, subject: str, data: bytes, timeout_s: float) -> Reply:
        """Like `request`, for who needs the headers or the status of the answer too.

        Raises Disconnected if no answer comes in time or nobody listens there, and
        OperatingError if we may not publish there.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        await self.wait_connected(timeout_s)
        left_s = deadline - asyncio.get_running_loop().time()
        reply = await self.ask(subject, data, timeout_s=max(left_s, 0.0))
        if reply is None:
            raise Disconnected(f"no answer on {subject} within {timeout_s} s")
        if reply.status == _NO_RESPONDERS:
            raise Disconnected(f"nobody answers on {subject}")
        if reply.status == NOT_PERMITTED:
            raise OperatingError(reply.description)
        return reply

    async def js_api(self, subject_suffix: str, payload: bytes, timeout_s: float) -> bytes:
        """Ask the JetStream API, for example "STREAM.INFO.AF_default". The answer is raw JSON."""
        return await self.request(f"$JS.API.{subject_suffix}", payload, timeout_s)

    async def subscribe(self, subject: str, callback: OnMessage, queue: str = "") -> Subscription:
        """Call `callback(subject, data, reply, headers)` for each message, from now on.

        Requests sent afterwards find the subscription in place. The callback runs inside
        the read loop: it must be quick and must not block; what it raises is logged.
        """
        sid = next(self._sids)
        subscription = Subscription(self, sid, subject, queue, callback)
        check_subject(subject + queue)
        if self._connection is not None and self.connected:
            self._connection.subscribe(sid, subject, queue, callback)
        self._subscriptions[sid] = subscription
        return subscription

    def drop(self, sid: int) -> None:
        """End a subscription; for `Subscription.unsubscribe`."""
        if self._subscriptions.pop(sid, None) is not None and self._connection is not None:
            self._connection.unsubscribe(sid)

    def watch(self, callback: Callable[[bool], None]) -> Callable[[], object]:
        """Call `callback(connected)` on each change. Returns the function that ends it."""
        key = next(self._sids)
        self._watchers[key] = callback
        return functools.partial(self._watchers.pop, key, None)

    def _open(self) -> Connection:
        if self._connection is None:
            raise Disconnected(f"no connection to NATS: {self._last_error}")
        return self._connection

    async def _keep(self) -> None:
        """Connect, serve, notice the end, and again: for as long as the bus is open."""
        loop = asyncio.get_running_loop()
        while True:
            connection = await self._connect()
            since = loop.time()
            self._adopt(connection)
            await self._wait_dead(connection)
            self._lose()
            connection.abort()
            lived = loop.time() - since > _LIFE_S_MIN
            self._failures = 0 if lived else self._failures + 1

    async def _connect(self) -> Connection:
        """Try the servers in random order, with growing pauses, until one answers."""
        for attempt in itertools.count():
            # The very first needs no pause; all who lost the same server do.
            if attempt or self._adopted:
                await asyncio.sleep(_pause_s(attempt + self._failures))
            if not self._untried:
                self._untried = random.sample(self._urls, len(self._urls)) + self._discovered
            connection = Connection(self._on_error)
            self._url = self._untried.pop(0)
            try:
                await connection.open(self._url, name=self.name, timeout_s=_ATTEMPT_TIMEOUT_S)
            except Disconnected as error:
                self._last_error = str(error)
                if attempt & (attempt - 1) == 0:  # the first, second, fourth, eighth ...
                    _log.warning("cannot connect", bus=self.name, attempt=attempt + 1, error=str(error))
            else:
                return connection
        raise AssertionError("attempts are not limited")

    def _adopt(self, connection: Connection) -> None:
        self._connection = connection
        self._adopted = True
        self._untried = []
        known = {urlsplit(url).netloc.rpartition("@")[2] for url in self._urls}
        others = [url for url in connection.discovered if urlsplit(url).netloc not in known]
        self._discovered = [_with_login(url, self._urls[0]) for url in others]
        with contextlib.suppress(Disconnected):  # dead already: the next connection does it
            for sid, each in self._subscriptions.items():
                connection.subscribe(sid, each.subject, each.queue, each.callback)
        self._up.set()
        _log.info("connected", bus=self.name)
        self._tell(connected=True)

    async def _wait_dead(self, connection: Connection) -> None:
        while not connection.dead.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.dead.wait(), _WATCH_INTERVAL_S)
            connection.check()

    def _lose(self) -> None:
        connection, self._connection = self._connection, None
        self._up.clear()
        self._inbox.forget()
        if connection is not None:
            _log.info("disconnected", bus=self.name)
            self._tell(connected=False)

    def _tell(self, *, connected: bool) -> None:
        for watcher in list(self._watchers.values()):
            try:
                watcher(connected)
            except Exception:  # noqa: BLE001 - it must not end the keeper
                _log.exception("a connection watcher failed", bus=self.name)

    def _on_error(self, text: str) -> None:
        self._last_error = text
        _log.warning("error from nats", bus=self.name, error=text)
        violation = _VIOLATION.search(text)
        if violation is not None:
            self._inbox.deny(violation[1].lower(), text)


def servers_of(url: str | Sequence[str]) -> list[str]:
    """The servers named, one by one. Raises InvalidRequest if there is none."""
    named = url.split(",") if isinstance(url, str) else url
    servers = [stripped for each in named if (stripped := each.strip())]
    if not servers:
        raise InvalidRequest(f"expected the URL of a NATS server, found {url!r}")
    return servers


def _pause_s(attempt: int) -> float:
    return random.uniform(0, min(_PAUSE_S_MAX, _PAUSE_S_FIRST * 2.0 ** min(attempt, 10)))


def _with_login(url: str, configured: str) -> str:
    """A discovered server's address with the user and password of the configured one."""
    login, at, _ = urlsplit(configured).netloc.rpartition("@")
    parts = urlsplit(url)
    return parts._replace(netloc=f"{login}{at}{parts.netloc}").geturl()
