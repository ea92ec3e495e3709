"""The log on NATS JetStream: one stream per namespace.

The hard part of appending is not to store, but to know. Three rules make it certain:

- A write without an answer is repeated byte for byte under its message id. Where the stream
  checks expectations before it looks for duplicates (one replica) the repetition of a write
  that did arrive is refused as fenced; where it looks first (three replicas) it is
  acknowledged as a duplicate. So after doubt a refusal is never believed before the log was
  searched for our message.
- "Duplicate" says that the message *id* is known, not that our message is: ids are
  stream-wide and somebody else may have used ours. What lies there is compared.
- A refusal by the fence is final for earlier attempts still under way too, because the
  sequence on the fence's subject only grows.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Final, Self

from agentflow import wire
from agentflow.bus import Bus
from agentflow.connection import Headers
from agentflow.errors import Disconnected, LogGone, StreamMismatch
from agentflow.inbox import Reply
from agentflow.log.follow import follow
from agentflow.log.port import (
    Appended,
    Done,
    Fence,
    Frame,
    Identity,
    Message,
    Reason,
    Refused,
    Trim,
    Unknown,
)
from agentflow.log.publisher import NO_RESPONDERS, Ack, ApiError, Publisher, read_ack
from agentflow.log.stored import DUPLICATE_WINDOW_S, headers_of, is_stored_as, msg_id_of, oversize
from agentflow.log.stream import (
    MESSAGE_BYTES_MAX,
    StreamInfo,
    get_message,
    log_config,
    open_stream,
    parse_time_ns,
    same_stream,
    stream_info,
    went_back,
)
from agentflow.log.trim import trim
from agentflow.log.write import KNOWN_ID_IN_BATCH, Write, reason_of

BYTES_MAX: Final = -1
"""Default hard limit of a log: the server's own (`max_file_store`). A positive one is reserved
on the server's disk when the stream is created, and refused if it is not there."""

_OPEN_TIMEOUT_S: Final = 10.0
_READ_TIMEOUT_S: Final = 5.0
# An answer not here by then was probably lost; asking again is harmless.
_ATTEMPT_TIMEOUT_S: Final = 2.0
# What even a slow disk stores of a large batch.
_BYTES_PER_S_MIN: Final = 10 * 1024 * 1024
# Who was refused for long is told why, if that can be learnt soon.
_WHY_TIMEOUT_S: Final = 1.0
# A server that cannot reach the others takes no writes, and others may.
_LEAVE_AFTER_S: Final = 3.0
_PAUSE_S_FIRST: Final = 0.002
_PAUSE_S_MAX: Final = 0.25


# What a direct get adds to the message's own headers.
_SUBJECT: Final = "Nats-Subject"
_SEQUENCE: Final = "Nats-Sequence"
_TIME: Final = "Nats-Time-Stamp"
_ADDED: Final = frozenset(
    {_SUBJECT, _SEQUENCE, _TIME, "Nats-Stream", "Nats-Num-Pending", "Nats-Last-Sequence"}
)


class JetStreamLog:
    """See `agentflow.log.port.Log`.

        async with Bus(url, name="master-1") as bus, JetStreamLog(bus, "default") as log:
            await log.append(Frame(subject, data, msg_id))

    With `create` the stream is created if it is missing; otherwise entering raises LogGone.
    """

    def __init__(
        self, bus: Bus, namespace: str, *, replicas: int = 1, bytes_max: int = BYTES_MAX, create: bool = True
    ) -> None:
        self._bus = bus
        self._namespace = namespace
        self._config = log_config(namespace, replicas=replicas, bytes_max=bytes_max)
        self._create = create
        self._stream = wire.stream(namespace)
        self._prefix = wire.stream_subjects(namespace).removesuffix(">")
        self._publisher = Publisher(bus)
        self._opened: StreamInfo | None = None
        self._last_known = 0
        self._gone: LogGone | None = None
        """Set once this is known to be another log: nothing is written into it any more."""

    async def __aenter__(self) -> Self:
        await self._bus.wait_connected(_OPEN_TIMEOUT_S)
        if self._bus.max_payload < MESSAGE_BYTES_MAX:
            raise StreamMismatch(
                f"the server's max_payload is {self._bus.max_payload}, expected {MESSAGE_BYTES_MAX} or more"
            )
        self._opened = await open_stream(
            self._bus, self._config, create=self._create, timeout_s=_OPEN_TIMEOUT_S
        )
        self._last_known = self._opened.state.last_seq
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: the bus belongs to the caller."""

    @property
    def namespace(self) -> str:
        """The namespace this log belongs to."""
        return self._namespace

    @property
    def replicas(self) -> int:
        """On how many servers it is kept, as of opening it."""
        replicas: int = self._open().config["num_replicas"]
        return replicas

    async def identity(self) -> Identity:
        """The stream's identity and extent now; see the port."""
        opened = self._open().identity
        try:
            found = await same_stream(self._bus, opened, self._last_known, _READ_TIMEOUT_S)
        except LogGone as gone:
            self._gone = gone
            raise
        self._last_known = max(self._last_known, found.last_seq)
        return found

    async def trim(self, to: Trim) -> int:
        """Remove what was archived; see `agentflow.log.trim`."""
        await self.identity()
        return await trim(self._bus, self._namespace, to)

    async def append(
        self,
        frame: Frame,
        *,
        fence: Fence | None = None,
        timeout_s: float = 5.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store one frame; see the port."""
        return await self._append((frame,), fence, timeout_s, in_doubt_after)

    async def append_batch(
        self,
        frames: Sequence[Frame],
        *,
        fence: Fence | None = None,
        timeout_s: float = 10.0,
        in_doubt_after: int | None = None,
    ) -> Appended:
        """Store all frames next to each other, or none of them; see the port."""
        return await self._append(tuple(frames), fence, timeout_s, in_doubt_after)

    async def find(self, msg_id: str, *, after: int) -> int | None:
        """Sequence of the message stored under `msg_id` after sequence `after`, or None."""
        return await self._find(msg_id, after, (await self.identity()).last_seq)

    async def read(self, seq: int) -> Message | None:
        """The message at `seq`, or None. Any replica may answer, only the leader may deny."""
        payload = b'{"seq":%d}' % seq
        try:
            reply = await self._bus.request_reply(
                f"$JS.API.DIRECT.GET.{self._stream}", payload, _READ_TIMEOUT_S
            )
        except Disconnected:
            return await self._get({"seq": seq})
        return await self._get({"seq": seq}) if reply.status else _direct_message(reply)

    async def last(self, subject: str) -> Message | None:
        """The last message on an exact subject, read from the stream's leader."""
        return await self._get({"last_by_subj": subject})

    def follow(self, after: int, *, subjects: Sequence[str] = ()) -> AsyncGenerator[list[Message], None]:
        """Everything after sequence `after`; see the port."""
        return follow(self._bus, self._open(), after, subjects)

    def _open(self) -> StreamInfo:
        assert self._opened is not None, "the log was not entered"
        return self._opened

    # Appending.

    async def _append(
        self, frames: Sequence[Frame], fence: Fence | None, timeout_s: float, in_doubt_after: int | None
    ) -> Appended:
        assert frames, "nothing to append"
        if self._gone is not None:
            raise self._gone
        assert all(frame.subject.startswith(self._prefix) for frame in frames), frames[0].subject
        refused = oversize(frames)
        if refused is not None:
            return refused
        return await self._repeat(Write(frames, fence, self._last_known, timeout_s, in_doubt_after))

    async def _repeat(self, write: Write) -> Appended:
        """Attempt until the fate is known, the time is over, or another attempt could do harm."""
        for attempt in itertools.count():
            settled = await self._attempt(write)
            if settled is not None:
                return settled
            if write.tried_s > _LEAVE_AFTER_S:
                self._bus.leave_server(f"{self._stream} takes no writes: {write.detail}")
            pause_s = random.uniform(0, min(_PAUSE_S_MAX, _PAUSE_S_FIRST * 2.0 ** min(attempt, 10)))
            if not write.repeatable or write.left_s <= pause_s:
                break
            await asyncio.sleep(pause_s)
        return await self._give_up(write)

    async def _attempt(self, write: Write) -> Appended | None:
        """Send once and judge the answer; None if it did not settle anything."""
        try:
            await self._bus.wait_connected(write.left_s)
            ack = await self._send(write)
        except Disconnected as error:
            write.note(f"not sent: {error}")
            return None
        try:
            return await self._judge(write, ack)
        except Disconnected as error:  # while looking what became of it
            write.in_doubt = True
            write.note(f"not verified: {error}")
            return None

    async def _judge(self, write: Write, ack: Ack) -> Appended | None:
        if ack is None:
            write.in_doubt = True
            write.note("no acknowledgement came")
            return None
        if isinstance(ack, ApiError):
            return await self._judge_error(write, ack)
        if ack.duplicate:
            return await self._judge_duplicate(write, ack.seq)
        if ack.seq <= write.last_known:
            self._gone = LogGone(went_back(self._stream, ack.seq, write.last_known))
            raise self._gone
        self._last_known = max(self._last_known, ack.seq)
        return Done(ack.seq)

    async def _judge_error(self, write: Write, error: ApiError) -> Appended | None:
        reason = reason_of(error)
        if reason is Reason.BUSY:
            write.note(error.description, error.err_code or error.code)
            return None
        found = await self._look(write, error)
        if found is not None:
            return found
        if write.in_doubt and error.err_code == KNOWN_ID_IN_BATCH:
            # Replicas know an id before its message can be read.
            write.note(error.description, error.err_code)
            return None
        if write.in_doubt and reason is not Reason.FENCED:
            return Unknown(f"an earlier attempt may arrive yet; the last was refused: {error.description}")
        return Refused(reason, error.err_code or error.code, error.description)

    async def _look(self, write: Write, error: ApiError) -> Appended | None:
        """Look whether an earlier attempt was stored, if it can have been."""
        if not write.repeatable:
            return None
        first = write.frames[0]
        if error.err_code == KNOWN_ID_IN_BATCH:
            after = min(write.after, await self._seq_before_window())
        elif write.fence is not None and write.fence.subject == first.subject:
            # A repeated compare-and-set is refused because of itself, in this call or an earlier one.
            after = write.fence.seq
        elif write.in_doubt:
            after = write.after
        else:
            return None
        at = await self._find_frame(first, after)
        if at is None:
            foreign = error.err_code == KNOWN_ID_IN_BATCH and not write.in_doubt
            return Refused(Reason.FOREIGN_ID, error.err_code, error.description) if foreign else None
        return await self._judge_duplicate(write, at + len(write.frames) - 1)

    async def _judge_duplicate(self, write: Write, last_seq: int) -> Appended:
        """The message id is in the log: is what lies there ours?"""
        for seq, frame in enumerate(write.frames, last_seq + 1 - len(write.frames)):
            message = await self.read(seq)
            if message is None and seq <= last_seq and len(write.frames) == 1:
                return Unknown(f"acknowledged as a duplicate of {seq}, which is no longer there")
            if message is None or not is_stored_as(frame, message):
                return Refused(Reason.FOREIGN_ID, 0, f"message id {frame.msg_id} is taken by message {seq}")
        self._last_known = max(self._last_known, last_seq)
        return Done(last_seq, duplicate=True)

    async def _give_up(self, write: Write) -> Appended:
        if write.code == NO_RESPONDERS and not write.in_doubt:
            try:
                await stream_info(self._bus, self._stream, _WHY_TIMEOUT_S)
            except LogGone as gone:
                return Refused(Reason.GONE, write.code, str(gone))
            except Disconnected as error:
                write.note(f"no server takes writes to {self._stream} now: {error}")
        return write.given_up()

    async def _send(self, write: Write) -> Ack:
        size = sum(len(frame.data) for frame in write.frames)
        timeout_s = max(min(write.left_s, _ATTEMPT_TIMEOUT_S + size / _BYTES_PER_S_MIN), 0.0)
        if len(write.frames) > 1:
            return await self._send_batch(write.frames, write.fence, timeout_s)
        (frame,) = write.frames
        return await self._publisher.publish(
            frame.subject, frame.data, headers_of(frame, write.fence), timeout_s=timeout_s
        )

    async def _send_batch(self, frames: Sequence[Frame], fence: Fence | None, timeout_s: float) -> Ack:
        """Send an atomic batch under a fresh id; raised before its end, it cannot be stored."""
        batch = secrets.token_hex(8)
        opening: asyncio.Future[Reply | None] | None = None
        for number, frame in enumerate(frames[:-1], 1):
            headers = headers_of(frame, fence if number == 1 else None)
            headers |= {wire.BATCH_ID: batch, wire.BATCH_SEQ: str(number)}
            await self._bus.wait_writable()
            if opening is None:
                opening = self._publisher.send(frame.subject, frame.data, headers, timeout_s=timeout_s)
            else:
                self._bus.publish(frame.subject, frame.data, headers)
        last = frames[-1]
        headers = headers_of(last, None)
        headers |= {wire.BATCH_ID: batch, wire.BATCH_SEQ: str(len(frames)), wire.BATCH_COMMIT: "1"}
        ack = await self._publisher.publish(last.subject, last.data, headers, timeout_s=timeout_s)
        assert opening is not None, "a batch has two frames or more"
        opened = read_ack(opening.result()) if opening.done() else None
        return opened if isinstance(opened, ApiError) else ack

    # Reading.

    async def _get(self, query: dict[str, int | str]) -> Message | None:
        return await get_message(self._bus, self._stream, query, _READ_TIMEOUT_S)

    async def _find_frame(self, frame: Frame, after: int) -> int | None:
        """Sequence of the frame's message id on the frame's subject after `after`, or None."""
        assert frame.msg_id is not None
        last = await self.last(frame.subject)
        if last is None or last.seq <= after:
            return None
        if msg_id_of(last) == frame.msg_id:
            return last.seq
        return await self._find(frame.msg_id, after, last.seq, subjects=(frame.subject,))

    async def _find(self, msg_id: str, after: int, until: int, subjects: Sequence[str] = ()) -> int | None:
        if after >= until:
            return None
        batches = follow(self._bus, self._open(), after, subjects, headers_only=True)
        try:
            async for messages in batches:
                for message in messages:
                    if msg_id_of(message) == msg_id:
                        return message.seq
                if messages[-1].seq >= until:
                    return None
        finally:
            await batches.aclose()
        return None

    async def _seq_before_window(self) -> int:
        """A sequence that everything the server recognises as duplicate comes after."""
        info = await stream_info(self._bus, self._stream, _READ_TIMEOUT_S)
        since_ns = parse_time_ns(info.ts) - (DUPLICATE_WINDOW_S + 10) * 1_000_000_000
        low, high = info.identity.first_seq - 1, info.state.last_seq
        while low < high:
            middle = (low + high + 1) // 2
            message = await self.read(middle)
            if message is None or message.time_ns < since_ns:
                low = middle
            else:
                high = middle - 1
        return low


def _direct_message(reply: Reply) -> Message:
    given: Headers = reply.headers or {}
    headers = {name: value for name, value in given.items() if name not in _ADDED}
    return Message(
        int(given[_SEQUENCE]), parse_time_ns(given[_TIME]), given[_SUBJECT], reply.data, headers or None
    )
