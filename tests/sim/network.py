"""The network: what lies between each node and the server, and everything that goes wrong there.

Every node has a `Link` of its own: requests and answers take time, in order, and get lost
while a direction is cut or the server is down. What is sent into a cut is lost, or arrives
when the cut is healed, long after its sender gave it up: the write of a leader that was
deposed meanwhile. `SimLog` asks for appends through the link as `JetStreamLog` does over a
connection: it repeats what was not answered and looks up what is in doubt. The log itself,
on the other side, is the one in memory.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from msgspec import Struct

from agentflow.errors import Disconnected
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Appended, Done, Fence, Frame, Identity, Message, Reason, Refused, Unknown
from agentflow.log.stored import oversize
from tests.sim.loop import Process, SimLoop

T = TypeVar("T")

ANSWER_S: Final = 1.0
"""How long one attempt waits for its answer."""
READ_S: Final = 2.0
_PAUSE_S_MAX: Final = 0.25
_REDELIVERED_MAX: Final = 20
_BUSY: Final = Refused(Reason.BUSY, 10164, "another write to the same subject is in flight")


class Weather(Struct):
    """How a link behaves. Probabilities are for each message."""

    delay_s: float = 0.002
    jitter_s: float = 0.004
    request_lost: float = 0.0
    answer_lost: float = 0.0
    busy: float = 0.0
    stored_unknown: float = 0.0
    """For each append: it is stored, and no answer to any attempt arrives."""
    lost_unknown: float = 0.0
    """For each append: no attempt arrives."""
    redelivered: float = 0.02
    """For each delivery to a reader of everything: what came before it comes again."""
    beats_lost: float = 0.0


class Listener:
    """A subscription to what is not kept."""

    def __init__(self, prefix: str, link: Link, callback: Callable[..., Any]) -> None:
        self.prefix: Final = prefix
        self.link: Final = link
        self.callback: Final = callback
        self.ended = False

    def end(self) -> None:
        """Hear no more."""
        self.ended = True


class Network:
    """The server and the links to it."""

    def __init__(self, loop: SimLoop, chance: random.Random, namespace: str) -> None:
        self.loop: Final = loop
        self.chance: Final = chance
        self.server: Final = MemoryServer(loop.time)
        self.server.create(namespace)
        self.log: Final = MemoryLog(self.server, namespace)
        self.stream: Final = self.server.streams[namespace]
        self.harmed: Final[Counter[str]] = Counter()
        """Messages harmed, by how."""
        self.seen: Final[Counter[str]] = Counter()
        """Situations that were reached."""
        self.up = True
        self.links: Final[dict[str, Link]] = {}
        self._listeners: list[Listener] = []

    def link(self, process: Process) -> Link:
        """The way of a new process to the server; an older one of the same name ends."""
        before = self.links.get(process.name)
        link = self.links[process.name] = Link(self, process)
        if before is not None:
            before.close()
            link.weather = before.weather
            link.there_cut, link.back_cut = before.there_cut, before.back_cut
        return link

    def stop_server(self) -> None:
        """No request arrives, no answer leaves."""
        self.up = False
        for link in self.links.values():
            link.notice()

    def start_server(self) -> None:
        """With all that it had stored."""
        self.up = True
        for link in self.links.values():
            link.notice()

    def listen(self, subject: str, link: Link, callback: Callable[..., Any]) -> Listener:
        """Subscribe to what is not kept: `subject` ends in `*`, or is exact."""
        listener = Listener(subject.removesuffix("*"), link, callback)
        self._listeners.append(listener)
        return listener

    def publish(self, sender: Link, subject: str, data: bytes) -> None:
        """What is not kept reaches who listens now, or nobody."""
        self._listeners = [each for each in self._listeners if not each.ended and not each.link.closed]
        for each in self._listeners:
            if subject.startswith(each.prefix) and self.chance.random() >= sender.weather.beats_lost:
                sender.tell(each.link, each.callback, subject, data)


class Link:
    """One process's way to the server."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network: Final = network
        self.process: Final = process
        self.weather = Weather()
        self.there_cut = False
        self.back_cut = False
        self.connected = True
        """What the process believes: it takes a while to notice."""
        self.closed = False
        self._loop = network.loop
        self._there_at = self._back_at = 0.0
        self._waiting: list[Callable[[], None]] = []
        """What was sent into a cut and will arrive late."""
        self._changed = asyncio.Event()
        self._watchers: list[Callable[[bool], None]] = []

    @property
    def is_cut(self) -> bool:
        """Whether something is in the way, in either direction."""
        return self.there_cut or self.back_cut or not self.network.up

    def cut(self, *, there: bool, back: bool) -> None:
        """Part the process from the server."""
        self.there_cut, self.back_cut = there, back
        self.notice()

    def heal(self) -> None:
        """Let everything through again, also what was on its way, late and out of turn."""
        self.there_cut = self.back_cut = False
        self.notice()
        waiting, self._waiting = self._waiting, []
        self.network.seen["requests_late"] += len(waiting)
        for deliver in waiting:
            self._loop.outside(self._loop.time() + self.network.chance.uniform(0, 2), deliver)

    def close(self) -> None:
        """The process is gone; what it sent may arrive yet."""
        self.closed = True

    def notice(self) -> None:
        """Sooner or later the process learns whether it is connected."""
        chance = self.network.chance
        after_s = chance.uniform(0.2, 2.5) if self.is_cut else chance.uniform(0.02, 0.5)
        self._loop.outside(self._loop.time() + after_s, self._learn)

    def watch(self, callback: Callable[[bool], None]) -> Callable[[], None]:
        """Be told of connections lost and found, until what is returned is called."""
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    def _learn(self) -> None:
        connected = not self.is_cut
        if connected != self.connected and not self.closed:
            self.connected = connected
            self._loop.call_in(self.process, self._tell, connected)

    def _tell(self, connected: bool) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for watcher in self._watchers:
            watcher(connected)

    # Requests and answers.

    async def ask(self, operation: Callable[[], T], timeout_s: float, *, faulty: bool = False) -> T | None:
        """Have the server do something; None if no answer came. `faulty`: acknowledgements suffer."""
        answer: asyncio.Future[T | None] = self._loop.create_future()
        self._send(lambda: self._serve(operation, answer, faulty=faulty), faulty=faulty)
        timer = self._loop.call_later(timeout_s, _settle, answer, None)
        try:
            return await answer
        finally:
            timer.cancel()

    def _send(self, deliver: Callable[[], None], *, faulty: bool) -> None:
        chance, weather = self.network.chance, self.weather
        if faulty and weather.request_lost and chance.random() < weather.request_lost:
            self.network.harmed["requests_lost"] += 1
            return
        at = self._loop.time() + weather.delay_s + weather.jitter_s * chance.random()
        self._there_at = at = max(at, self._there_at)
        self._loop.outside(at, self._arrive, deliver)

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if self.there_cut:
            if self.network.chance.random() < 0.5:
                self._waiting.append(deliver)
            return
        if self.network.up:
            deliver()

    def _serve(self, operation: Callable[[], T], answer: asyncio.Future[T | None], *, faulty: bool) -> None:
        result = operation()
        weather = self.weather
        if faulty and weather.answer_lost and self.network.chance.random() < weather.answer_lost:
            self.network.harmed["answers_lost"] += 1
            return
        self._loop.outside(self._back(), self._answer, answer, result)

    def _back(self) -> float:
        """When something sent by the server now reaches the process."""
        weather = self.weather
        at = self._loop.time() + weather.delay_s + weather.jitter_s * self.network.chance.random()
        self._back_at = max(at, self._back_at)
        return self._back_at

    def _answer(self, answer: asyncio.Future[T | None], result: T) -> None:
        if not self.is_cut:
            _settle(answer, result)

    def tell(self, other: Link, callback: Callable[..., Any], subject: str, data: bytes) -> None:
        """Something that is not kept, on its way to another process."""
        if self.there_cut or not self.network.up:
            return
        self._loop.outside(other._back(), other._hear, callback, subject, data)

    def _hear(self, callback: Callable[..., Any], subject: str, data: bytes) -> None:
        if not self.is_cut and not self.closed:
            self._loop.call_in(self.process, callback, subject, data, "", None)

    async def until_connected(self, timeout_s: float | None = None) -> bool:
        """Wait for a connection; False if none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.connected:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def delivery(self) -> None:
        """Wait until what the server has for us arrives."""
        while True:
            at = self._back()
            await asyncio.sleep(at - self._loop.time())
            if not self.is_cut:
                return
            while not self.connected or self.is_cut:
                await asyncio.sleep(self.network.chance.uniform(0.05, 0.3))


def _settle(answer: asyncio.Future[Any], result: object) -> None:
    if not answer.done():
        answer.set_result(result)


class SimLog:
    """One process's log. See `agentflow.log.port.Log`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._network = link.network
        self._log = link.network.log

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    @property
    def namespace(self) -> str:
        """The namespace this log belongs to."""
        return self._log.namespace

    async def identity(self) -> Identity:
        """See the port."""
        stream = self._network.stream

        def operation() -> Identity:
            first, last = stream.first_seq, stream.last_seq
            return Identity(stream.name, stream.created_ns, first, last, 1, stream.bytes, stream.bytes_max)

        return await self._read(operation)

    async def read(self, seq: int) -> Message | None:
        """See the port."""
        (found,) = await self._read(lambda: (self._network.stream.message(seq),))
        return found

    async def last(self, subject: str) -> Message | None:
        """See the port."""
        (found,) = await self._read(lambda: (self._network.stream.last(subject),))
        return found

    async def find(self, msg_id: str, *, after: int) -> int | None:
        """See the port."""
        (found,) = await self._read(lambda: (self._network.stream.find(msg_id, after),))
        return found

    async def _read(self, operation: Callable[[], T]) -> T:
        if not await self._link.until_connected(READ_S):
            raise Disconnected("no connection")
        answer = await self._link.ask(operation, READ_S)
        if answer is None:
            raise Disconnected(f"no answer within {READ_S} s")
        return answer

    async def append(
        self,
        frame: Frame,
        *,
        fence: Fence | None = None,
        timeout_s: float = 5.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """See the port."""
        return await self._append((frame,), fence, timeout_s, in_doubt_after)

    async def append_batch(
        self,
        frames: Sequence[Frame],
        *,
        fence: Fence | None = None,
        timeout_s: float = 10.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """See the port."""
        return await self._append(tuple(frames), fence, timeout_s, in_doubt_after)

    async def _append(
        self, frames: Sequence[Frame], fence: Fence | None, timeout_s: float, in_doubt_after: int | None
    ) -> Appended:
        refused = oversize(frames)
        if refused is not None:
            return refused
        return await _Append(self._link, frames, fence, timeout_s, in_doubt_after).run()

    async def follow(
        self, after: int, *, subjects: Sequence[str] = ()
    ) -> AsyncGenerator[list[Message], None]:
        """See the port."""
        before: list[Message] = []
        async for messages in self._log.follow(after, subjects=subjects):
            await self._link.delivery()
            weather = self._link.weather
            again = not subjects and weather.redelivered
            if again and before and self._network.chance.random() < weather.redelivered:
                self._network.harmed["deliveries_repeated"] += 1
                yield before[-self._network.chance.randint(1, _REDELIVERED_MAX) :] + messages
            else:
                yield messages
            before = messages


class _Append:
    """One append under way."""

    def __init__(
        self,
        link: Link,
        frames: Sequence[Frame],
        fence: Fence | None,
        timeout_s: float,
        in_doubt_after: int | None,
    ) -> None:
        self._link = link
        self._frames = frames
        self._fence = fence
        self._repeatable = all(frame.msg_id is not None for frame in frames)
        self._in_doubt = in_doubt_after is not None
        self._until = link.network.loop.time() + timeout_s
        network = link.network
        after = network.stream.last_seq if fence is None else fence.seq
        self._after = after if in_doubt_after is None else min(after, in_doubt_after)
        self._doom = self._drawn_doom()

    def _drawn_doom(self) -> str:
        weather, network = self._link.weather, self._link.network
        for name in ("stored_unknown", "lost_unknown"):
            if getattr(weather, name) and network.chance.random() < getattr(weather, name):
                network.harmed[f"writes_{name}"] += 1
                return name
        return ""

    @property
    def _left_s(self) -> float:
        return self._until - self._link.network.loop.time()

    async def run(self) -> Appended:
        """Attempt until the fate is known, or time has run out."""
        pause_s = 0.01
        while True:
            settled = await self._attempt()
            if settled is not None:
                return settled
            if not self._repeatable or self._left_s <= pause_s:
                return Unknown("no answer came") if self._in_doubt else _BUSY
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _attempt(self) -> Appended | None:
        if not await self._link.until_connected(max(self._left_s, 0)):
            return None
        answer = await self._link.ask(self._operation, min(ANSWER_S, max(self._left_s, 0.01)), faulty=True)
        if answer is None or self._doom:
            self._in_doubt = True
            return None
        if isinstance(answer, Refused):
            return await self._refused(answer)
        return answer

    def _operation(self) -> Appended:
        """What the server does once a request arrives."""
        weather, network = self._link.weather, self._link.network
        if weather.busy and network.chance.random() < weather.busy:
            network.harmed["writes_busy"] += 1
            return _BUSY
        if self._doom == "lost_unknown":
            return _BUSY
        stored = network.log.arrive(self._frames, self._fence)
        if isinstance(stored, Refused):
            network.seen[f"appends_{stored.reason}"] += 1
        elif isinstance(stored, Done) and stored.duplicate:
            network.seen["appends_repeated"] += 1
        return stored

    async def _refused(self, refused: Refused) -> Appended | None:
        if refused.reason is Reason.BUSY:
            return None
        if not self._in_doubt:
            return refused
        msg_id = self._frames[0].msg_id
        if refused.reason is not Reason.FENCED or msg_id is None:
            return Unknown(f"an earlier attempt may arrive yet; the last was refused: {refused.detail}")
        stream = self._link.network.stream
        found = await self._link.ask(lambda: (stream.find(msg_id, self._after),), READ_S)
        if found is None:
            return None
        return refused if found[0] is None else Done(found[0] + len(self._frames) - 1, duplicate=True)


class SimBus:
    """What nodes use of `agentflow.bus.Bus` for what is not kept."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def subscribe(self, subject: str, callback: Callable[..., Any], queue: str = "") -> Listener:
        """Hear what is said from now on."""
        return self._link.network.listen(subject, self._link, callback)

    def watch(self, callback: Callable[[bool], None]) -> Callable[[], None]:
        """Be told of connections lost and found, until what is returned is called."""
        return self._link.watch(callback)

    def publish(self, subject: str, data: bytes) -> None:
        """Say it, now or never. Raises Disconnected."""
        if not self._link.connected:
            raise Disconnected("no connection")
        self._link.network.publish(self._link, subject, data)
