"""Reading a stream for ever: an ordered push consumer that is remade whenever in doubt.

The server pushes without waiting for acknowledgements, numbering what it sends. A hole in
that numbering, a heartbeat that does not come or that counts more than we got, a lost
connection: each means the same, the consumer is thrown away and a new one starts after the
last message seen. So whatever happens, messages come in order and none is left out.

Memory is bounded by the server's flow control (32 MiB at most are under way): its requests
are answered only when the reader has taken all that came before them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from agentflow.bus import Bus, Subscription
from agentflow.connection import Headers
from agentflow.errors import Disconnected, LogGone
from agentflow.log.port import Identity, Message
from agentflow.log.stream import RECOVERY, ApiFailed, StreamInfo, ask, cut_off, same_stream, trimmed_off
from agentflow.logs import get_logger

_HEARTBEAT_S: Final = 1.0
_HEARTBEATS_MISSED_MAX: Final = 3
_INACTIVE_S: Final = 30.0
_API_TIMEOUT_S: Final = 5.0
_PAUSE_S_MAX: Final = 1.0
_CHECK_S: Final = 5.0
# So often in a row nobody could say what became of the log before another server is asked.
_FAILURES_MAX: Final = 2

_STALLED: Final = "Nats-Consumer-Stalled"
_LAST_CONSUMER: Final = "Nats-Last-Consumer"
_LAST_STREAM: Final = "Nats-Last-Stream"

_log = get_logger(__name__)


async def follow(
    bus: Bus,
    opened: StreamInfo,
    after: int,
    subjects: Sequence[str] = (),
    *,
    headers_only: bool = False,
    compacted: bool = False,
) -> AsyncGenerator[list[Message], None]:
    """Yield what is stored after sequence `after`, in lists, for ever. Raises LogGone.

    A `compacted` stream keeps the last message of each subject only: that its first ones go is its way.
    """
    reader = _Reader(bus, opened, after, tuple(subjects), headers_only=headers_only, compacted=compacted)
    try:
        while True:
            await reader.wait()
            messages = reader.take()
            if messages:
                yield messages
    finally:
        reader.close()


class _Reader:
    """What has arrived and was not taken, and the consumer it comes from."""

    def __init__(
        self,
        bus: Bus,
        opened: StreamInfo,
        after: int,
        subjects: tuple[str, ...],
        *,
        headers_only: bool,
        compacted: bool,
    ) -> None:
        self._bus = bus
        self._opened = opened.identity
        self._subjects = subjects
        self._headers_only = headers_only
        self._compacted = compacted
        self._last_seq = after
        self._started_after = after
        self._passed_seq = after
        """Up to where the server has looked for us: nothing of it is still to come."""
        self._first_seq = 0
        """The first message held when reading began."""
        self._trimmed_seq = 0
        """Up to where it was trimmed then."""
        self._hole: LogGone | None = None
        """What was delivered does not follow what came before; why is to be found out."""
        self._arrived: list[Message] = []
        self._gone: LogGone | None = None
        self._wake = asyncio.Event()
        # The consumer: its name, the number of the last delivery, what it waits to hear.
        self._consumer: str | None = None
        self._subscription: Subscription | None = None
        self._deliveries = 0
        self._flow_reply = ""
        self._heard = False
        self._timer: asyncio.TimerHandle | None = None
        self._unwatch = bus.watch(self._on_connection)
        self._watcher = asyncio.create_task(self._watch_log(), name=f"watch {opened.identity.name}")

    async def wait(self) -> None:
        """Return when there is something to take. Raises LogGone, after all was taken."""
        while not self._arrived:
            if self._gone is not None:
                raise self._gone
            if self._consumer is None:
                await self._start()
                continue
            self._wake.clear()
            await self._wake.wait()

    def take(self) -> list[Message]:
        """All that has arrived; the server may send more."""
        messages, self._arrived = self._arrived, []
        if self._flow_reply:
            self._answer(self._flow_reply)
            self._flow_reply = ""
        return messages

    def close(self) -> None:
        """Remove the consumer."""
        self._unwatch()
        self._watcher.cancel()
        self._drop()

    async def _start(self) -> None:
        """Make a consumer after the last message seen, trying for ever. Raises LogGone."""
        for attempt in itertools.count():
            await self._bus.wait_connected()
            try:
                await self._check()
                if self._hole is not None:
                    raise self._hole
                await self._create(min(_API_TIMEOUT_S, 2.0**attempt))
            except (Disconnected, ApiFailed) as error:
                _log.warning(
                    "cannot follow", stream=self._opened.name, after=self._last_seq, error=str(error)
                )
                self._drop()
                if attempt >= _FAILURES_MAX:
                    self._bus.leave_server(str(error))
                await asyncio.sleep(random.uniform(0, min(_PAUSE_S_MAX, 0.05 * 2.0 ** min(attempt, 10))))
            else:
                return

    async def _check(self) -> None:
        """Raises LogGone if this is not the log we read any more, Disconnected if nobody can say."""
        seen = self._last_seq
        found = await same_stream(self._bus, self._opened, seen, _API_TIMEOUT_S)
        self._check_trim(found)
        purged = found.last_seq > seen and found.first_seq > seen + 1
        if purged and not self._subjects:
            raise cut_off(found, seen + 1)
        if self._compacted:
            return
        # What lies before the place where reading began may be removed, it is not needed any more;
        # and what was read, if it was written down that it would be.
        needed = max(self._first_seq, self._started_after + 1, found.trimmed_seq + 1)
        if self._first_seq and found.first_seq > needed:
            raise cut_off(found, needed)
        self._first_seq, self._trimmed_seq = found.first_seq, found.trimmed_seq

    def _check_trim(self, found: Identity) -> None:
        """Raises LogTrimmed if that took away what was not read yet."""
        seen = max(self._last_seq, self._passed_seq)
        if self._compacted or seen >= found.trimmed_seq:
            return
        # Who reads some subjects only may begin before the place where the log begins now.
        if not self._subjects or (self._first_seq and found.trimmed_seq > self._trimmed_seq):
            raise trimmed_off(found, seen + 1)

    async def _watch_log(self) -> None:
        """Look now and then whether the log is still there, whole: purged, it would be silent only."""
        failures = 0
        while self._gone is None:
            await asyncio.sleep(random.uniform(_CHECK_S / 2, _CHECK_S))
            if self._consumer is None:
                continue
            try:
                await self._check()
                failures = 0
            except LogGone as gone:
                self._end(gone)
            except Disconnected as error:
                failures += 1
                if failures >= _FAILURES_MAX:
                    self._bus.leave_server(str(error))

    async def _create(self, timeout_s: float) -> None:
        inbox = self._bus.new_inbox()
        name = inbox.rpartition(".")[2]
        self._drop()
        self._subscription = await self._bus.subscribe(inbox, self._on_message)
        self._deliveries = 0
        # Set before the answer: the first messages may overtake it.
        self._consumer = name
        self._watch_silence()
        request = f"CONSUMER.CREATE.{self._opened.name}.{name}"
        payload = {"stream_name": self._opened.name, "action": "create", "config": self._config(name, inbox)}
        try:
            await ask(self._bus, request, payload, dict[str, Any], timeout_s)
        except BaseException:
            self._drop()
            raise

    def _config(self, name: str, inbox: str) -> dict[str, Any]:
        return {
            "name": name,
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._last_seq + 1,
            "filter_subjects": list(self._subjects),
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(_HEARTBEAT_S * 1e9),
            "inactive_threshold": int(_INACTIVE_S * 1e9),
            "headers_only": self._headers_only,
            "mem_storage": True,
            "num_replicas": 1,
        }

    def _on_message(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        self._heard = True
        if not reply.startswith("$JS.ACK."):
            self._on_control(reply, headers or {})
            return
        # $JS.ACK.<stream>.<consumer>.<tries>.<stream seq>.<consumer seq>.<time>.<pending>, or with
        # .<domain>.<account> before the stream and possibly a token at the end.
        tokens = reply.split(".")
        at = 5 if len(tokens) == 9 else 7  # noqa: PLR2004 - see above
        seq = int(tokens[at])
        delivery = int(tokens[at + 1])
        if delivery != self._deliveries + 1:
            self._restart(f"delivery {delivery} after {self._deliveries}")
            return
        if not self._subjects and seq != self._last_seq + 1:
            name = self._opened.name
            self._hole = LogGone(f"stream {name} holds {seq} but not {self._last_seq + 1}; {RECOVERY}")
            self._restart(f"{seq} came after {self._last_seq}")
            return
        self._deliveries = delivery
        self._last_seq = seq
        if not self._arrived:
            self._wake.set()
        self._arrived.append(Message(seq, int(tokens[at + 2]), subject, data, headers))

    def _on_control(self, reply: str, headers: Headers) -> None:
        """A request to confirm what was delivered, or a heartbeat; either may need an answer."""
        answer_to = reply or headers.get(_STALLED, "")
        if answer_to and self._arrived:
            self._flow_reply = answer_to
        elif answer_to:
            self._answer(answer_to)
        delivered = headers.get(_LAST_CONSUMER, "")
        if delivered and int(delivered) != self._deliveries:
            self._restart(f"the server sent {delivered} messages, {self._deliveries} came")
        elif _LAST_STREAM in headers:
            self._passed_seq = max(self._passed_seq, int(headers[_LAST_STREAM]))

    def _answer(self, reply: str) -> None:
        with contextlib.suppress(Disconnected):
            self._bus.publish(reply, b"")

    def _on_connection(self, connected: bool) -> None:  # noqa: FBT001 - the bus's callback
        if not connected:
            self._restart("the connection was lost")

    def _watch_silence(self, silent: int = 0) -> None:
        self._heard = False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_HEARTBEAT_S, self._on_timer, silent)

    def _on_timer(self, silent: int) -> None:
        """Count the heartbeats that did not come."""
        if self._heard:
            self._watch_silence()
        elif silent + 1 < _HEARTBEATS_MISSED_MAX:
            self._watch_silence(silent + 1)
        else:
            self._restart(f"{_HEARTBEATS_MISSED_MAX} heartbeats did not come")

    def _end(self, gone: LogGone) -> None:
        self._gone = gone
        self._drop()
        self._wake.set()

    def _restart(self, reason: str) -> None:
        _log.info("following anew", stream=self._opened.name, after=self._last_seq, reason=reason)
        self._drop()
        self._wake.set()

    def _drop(self) -> None:
        """Forget the consumer; the server removes it by itself if it does not hear us."""
        name, self._consumer = self._consumer, None
        self._flow_reply = ""
        if self._timer is not None:
            self._timer.cancel()
        if self._subscription is not None:
            self._subscription.end()
            self._subscription = None
        if name is not None and self._bus.connected:
            with contextlib.suppress(Disconnected):
                self._bus.publish(f"$JS.API.CONSUMER.DELETE.{self._opened.name}.{name}", b"")
