"""The object store in a standard JetStream object store bucket.

The layout is ADR-20's, so `nats object get` and every client's object store read it:

    OBJ_<bucket>                the stream
    $O.<bucket>.C.<nuid>        the chunks of one upload, in order
    $O.<bucket>.M.<base64>      what is known of the object of that name, as JSON

An object is named by the SHA-256 of its bytes, so equal bytes are stored once. Chunks go
first, under a nuid nobody else knows; the last write is the meta message, by compare-and-set,
and only it makes the object visible. So a crash leaves garbage at worst, never half an object,
and of two that store the same bytes at once one wins and the other removes its chunks.

Who finds his bytes already there writes the meta message again, also by compare-and-set: it
is then younger than his `put`, and whoever removes old objects (by age, under the same
compare-and-set) cannot remove this one behind his back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import (
    AgentFlowError,
    AppendRefused,
    AppendUnknown,
    Disconnected,
    LogGone,
    ObjectMissing,
    OperatingError,
    StreamMismatch,
)
from agentflow.events import ObjectRef
from agentflow.log.stream import ApiFailed, StreamInfo, ask, ask_again, get_message, stream_info
from agentflow.logs import get_logger
from agentflow.objects.bucket import BYTES_MAX, CHUNK_BYTES, bucket_config, faults
from agentflow.objects.meta import Meta, MetaAt, Options, digest_text
from agentflow.objects.port import OBJECT_BYTES_MAX, check, describe
from agentflow.objects.writes import Pauses, Write, Writes, now

_API_TIMEOUT_S: Final = 5.0
_READ_S_MAX: Final = 60.0
# Chunks sent and not acknowledged: 2 MiB.
_IN_FLIGHT_MAX: Final = 16
# Chunks asked for at once. A read that finds other objects' chunks between ours asks in vain.
_READ_AHEAD_MAX: Final = 8
# Somebody else changed the object between our look and our write, so often.
_CONFLICTS_MAX: Final = 20
# Chunks that arrived out of order are sent anew, so often.
_UPLOADS_MAX: Final = 5

_WRONG_LAST_SEQUENCE: Final = 10071
_NAME_IN_USE: Final = 10058

T = TypeVar("T")

_log = get_logger(__name__)


class _Put:
    """One `put` under way."""

    def __init__(self, ref: ObjectRef, data: bytes) -> None:
        self.ref: Final = ref
        self.data: Final = data
        self.first_seq: int | None = None
        """The meta message found at first; later ones were written while we were at it."""
        self.nuid: str | None = None
        """Under which the chunks are stored, once they are."""


class _Counts(Struct, frozen=True, gc=False):
    subjects: dict[str, int] = {}


class _CountsAnswer(Struct, frozen=True, gc=False):
    state: _Counts


class _Chunk(Struct, frozen=True, gc=False):
    seq: int
    data: bytes


class ObjectStore:
    """See `Objects`. Keeps a namespace's objects in its JetStream bucket.

    store = ObjectStore(bus, "default")
    ref = await store.put(data)

    The bucket is created when it is first needed. One that exists already is used as it is,
    unless it would lose or damage objects: then StreamMismatch says how.
    """

    def __init__(self, bus: Bus, namespace: str, *, replicas: int = 1, bytes_max: int = BYTES_MAX) -> None:
        self._bus = bus
        self._namespace = namespace
        self._bucket = wire.object_bucket(namespace)
        self._stream = wire.object_stream(namespace)
        self._config = bucket_config(namespace, replicas=replicas, bytes_max=bytes_max)
        self._writes = Writes(bus, self._look_again)
        self._ready = False

    async def put(self, data: bytes) -> ObjectRef:
        """Store bytes; see `Objects`."""
        ref = await describe(data)
        put = _Put(ref, data)
        for _ in range(_CONFLICTS_MAX):
            await self._ensure_bucket()
            try:
                found = await self._persist(lambda: self._look(ref.name))
                stored = found.meta is not None and found.meta.holds(ref) and await self._is_whole(found.meta)
            except LogGone:  # deleted since we looked: it is created again
                self._ready = False
                continue
            if await (self._reuse(put, found) if stored else self._replace(put, found)):
                return ref
        raise AppendUnknown(
            f"object {ref.name} was changed by others {_CONFLICTS_MAX} times while we stored it"
        )

    async def get(self, ref: ObjectRef) -> bytes:
        """The bytes; see `Objects`."""
        if ref.size > OBJECT_BYTES_MAX:
            raise ObjectMissing(
                f"object {ref.name} has {ref.size} bytes, at most {OBJECT_BYTES_MAX} are stored"
            )
        try:
            data = await self._read(ref)
        except LogGone as gone:
            raise ObjectMissing(f"object {ref.name} is not there: {gone}") from gone
        await check(ref, data)
        return data

    async def remove(self, ref: ObjectRef) -> None:
        """Remove an object that nothing refers to any more; see `RemovableObjects`."""
        try:
            found = await self._persist(lambda: self._look(ref.name))
        except LogGone:
            return
        if found.meta is None or not found.meta.holds(ref):
            return
        query = {"filter": wire.object_meta(self._namespace, ref.name), "seq": found.seq + 1}
        try:
            await ask_again(self._bus, f"STREAM.PURGE.{self._stream}", query, dict[str, Any], _API_TIMEOUT_S)
        except ApiFailed as failed:
            raise OperatingError(f"object {ref.name} cannot be removed: {failed}") from failed
        self._discard(found.meta.nuid)

    # The bucket.

    async def _ensure_bucket(self) -> None:
        if not self._ready:
            info = await self._persist(self._open)
            wrong = faults(self._config, info.config)
            if wrong:
                raise StreamMismatch(f"the bucket {self._bucket} cannot hold objects: " + "; ".join(wrong))
            self._ready = True

    def _look_again(self) -> None:
        """The bucket may be gone: look, next time."""
        self._ready = False

    async def _open(self) -> StreamInfo:
        try:
            return await stream_info(self._bus, self._stream, _API_TIMEOUT_S)
        except LogGone:
            return await self._create()

    async def _create(self) -> StreamInfo:
        try:
            return await ask(
                self._bus, f"STREAM.CREATE.{self._stream}", self._config, StreamInfo, _API_TIMEOUT_S
            )
        except ApiFailed as failed:
            if failed.error.err_code == _NAME_IN_USE:  # somebody else was quicker
                return await stream_info(self._bus, self._stream, _API_TIMEOUT_S)
            raise OperatingError(f"cannot create the bucket {self._bucket}: {failed}") from failed

    # Writing.

    async def _reuse(self, put: _Put, found: MetaAt) -> bool:
        """Keep what is stored already, and make it younger than this call; False: look again."""
        assert found.meta is not None, "nothing is stored"
        if put.first_seq is None:
            put.first_seq = found.seq
        fresh = found.seq > put.first_seq  # written since we began: by us, or as good as by us
        if fresh or await self._store_meta(found.meta, found.seq):
            self._discard(put.nuid, unless=found.meta.nuid)
            return True
        return False

    async def _replace(self, put: _Put, found: MetaAt) -> bool:
        """Store chunks, then make them visible instead of what was found; False: look again."""
        if put.first_seq is None:
            put.first_seq = found.seq
        put.nuid = put.nuid or await self._upload(put.data)
        try:
            done = await self._store_meta(self._meta_of(put.ref, put.nuid), found.seq)
        except AppendRefused:
            self._discard(put.nuid)
            raise
        if done and found.meta is not None:
            self._discard(found.meta.nuid, unless=put.nuid)
        return done

    async def _upload(self, data: bytes) -> str:
        """Store the chunks, in order, under a fresh nuid, and return it."""
        for _ in range(_UPLOADS_MAX):
            nuid = secrets.token_hex(11)
            if await self._upload_as(nuid, data):
                return nuid
            self._discard(nuid)
        raise AppendUnknown(f"the chunks of an object arrived out of order {_UPLOADS_MAX} times")

    async def _upload_as(self, nuid: str, data: bytes) -> bool:
        """Store the chunks; False if one that had to be repeated came to lie behind later ones."""
        last_seq = 0
        for start in range(0, len(data), CHUNK_BYTES * _IN_FLIGHT_MAX):
            offsets = range(start, min(start + CHUNK_BYTES * _IN_FLIGHT_MAX, len(data)), CHUNK_BYTES)
            seqs = await self._store_chunks(nuid, data, offsets)
            ascending = [last_seq, *seqs]
            if any(a >= b for a, b in zip(ascending, seqs, strict=False)):
                return False
            last_seq = seqs[-1]
        return True

    async def _store_chunks(self, nuid: str, data: bytes, offsets: Sequence[int]) -> list[int]:
        """Send the chunks at `offsets`, the unknown ones again, until all are acknowledged."""
        subject = wire.object_chunks(self._namespace, nuid)
        writes = [
            Write(subject, data[at : at + CHUNK_BYTES], {wire.MSG_ID: f"{nuid}.{at // CHUNK_BYTES}"})
            for at in offsets
        ]
        try:
            await self._writes.settle(writes)
        except BaseException:  # cancelled too
            self._discard_later(nuid, writes)
            raise
        return [write.seq for write in writes]

    async def _store_meta(self, meta: Meta, expected_seq: int) -> bool:
        """Make the object visible; False if somebody wrote that name since we looked."""
        write = Write(
            wire.object_meta(self._namespace, meta.name),
            msgspec.json.encode(meta),
            {
                wire.MSG_ID: f"{meta.nuid}.meta.{secrets.token_hex(11)}",
                wire.EXPECTED_SUBJECT_SEQ: str(expected_seq),
                wire.ROLLUP: wire.ROLLUP_SUBJECT,
            },
        )
        try:
            await self._writes.settle([write])
        except AppendRefused as refused:
            # Our own write, repeated, is refused like that too: who looks again finds it.
            if refused.code == _WRONG_LAST_SEQUENCE:
                return False
            if write.in_doubt:
                raise AppendUnknown(
                    f"an earlier attempt may be stored, the last was not: {refused}"
                ) from refused
            raise
        return True

    def _meta_of(self, ref: ObjectRef, nuid: str) -> Meta:
        return Meta(
            name=ref.name,
            bucket=self._bucket,
            nuid=nuid,
            size=ref.size,
            chunks=-(-ref.size // CHUNK_BYTES),
            digest=digest_text(ref.sha256),
            options=Options(max_chunk_size=CHUNK_BYTES),
        )

    def _discard(self, nuid: str | None, *, unless: str = "") -> None:
        """Ask for the removal of chunks nothing refers to. If it gets lost, they are garbage."""
        if nuid is None or nuid == unless or not wire.is_name(nuid):  # a wildcard would remove others'
            return
        payload = msgspec.json.encode({"filter": wire.object_chunks(self._namespace, nuid)})
        try:
            self._bus.publish(f"$JS.API.STREAM.PURGE.{self._stream}", payload)
        except AgentFlowError as error:
            _log.warning("chunks left behind", bucket=self._bucket, nuid=nuid, error=str(error))

    def _discard_later(self, nuid: str, writes: Sequence[Write]) -> None:
        """Discard once all answers are in: a purge overtakes chunks under way."""
        answers = [write.answer for write in writes if write.answer is not None]
        asyncio.gather(*answers, return_exceptions=True).add_done_callback(lambda _: self._discard(nuid))

    # Reading.

    async def _read(self, ref: ObjectRef) -> bytes:
        """The object's chunks, joined. Raises ObjectMissing, LogGone, Disconnected."""
        missing: Meta | None = None
        for _ in range(_CONFLICTS_MAX):
            meta = await self._find(ref)
            if missing is not None and missing.nuid == meta.nuid:
                break
            data = await self._read_chunks(meta)
            if data is not None:
                return data
            missing = meta  # unless it was stored anew under our eyes
        raise ObjectMissing(f"object {ref.name} in {self._bucket} lacks some of its chunks")

    async def _find(self, ref: ObjectRef) -> Meta:
        """The object's description. Raises ObjectMissing, LogGone, Disconnected."""
        meta = (await self._persist(lambda: self._look(ref.name))).meta
        if meta is None or meta.deleted:
            state = "was deleted from" if meta else "is not in"
            raise ObjectMissing(f"object {ref.name} ({ref.size} bytes) {state} the bucket {self._bucket}")
        if not meta.holds(ref):
            raise ObjectMissing(
                f"object {ref.name} in {self._bucket} is another one: expected {ref.size} bytes of"
                f" {digest_text(ref.sha256)}, found {meta.size} of {meta.digest}"
            )
        return meta

    async def _look(self, name: str) -> MetaAt:
        """The last meta message of a name, from the stream's leader. Raises LogGone, Disconnected."""
        query = {"last_by_subj": wire.object_meta(self._namespace, name)}
        message = await get_message(self._bus, self._stream, query, _API_TIMEOUT_S)
        if message is None:
            return MetaAt(None, 0)
        try:
            return MetaAt(msgspec.json.decode(message.data, type=Meta), message.seq)
        except msgspec.DecodeError:
            return MetaAt(None, message.seq)

    async def _is_whole(self, meta: Meta) -> bool:
        """Whether as many chunks are there as the object has."""
        subject = wire.object_chunks(self._namespace, meta.nuid)
        request, query = f"STREAM.INFO.{self._stream}", {"subjects_filter": subject}
        try:
            answer = await self._persist(
                lambda: ask(self._bus, request, query, _CountsAnswer, _API_TIMEOUT_S)
            )
        except ApiFailed as failed:
            raise LogGone(str(failed)) from failed
        return answer.state.subjects.get(subject, 0) == meta.chunks

    async def _read_chunks(self, meta: Meta) -> bytes | None:
        """All chunks in order; None if some are not there.

        Who asks for the first chunk at or after each of the next sequences gets every chunk
        that lies there, whatever lies between them, and needs to know no sequence.
        """
        subject = wire.object_chunks(self._namespace, meta.nuid)
        found: dict[int, bytes] = {}
        after = size = 0
        while len(found) < meta.chunks and size <= meta.size:
            width = min(_READ_AHEAD_MAX, meta.chunks - len(found)) if found else 1
            answers = await asyncio.gather(
                *[self._persist(_bound(self._next, subject, after + 1 + i)) for i in range(width)]
            )
            chunks = {chunk.seq: chunk.data for chunk in answers if chunk is not None}
            if not chunks:
                return None
            found |= chunks
            size += sum(map(len, chunks.values()))
            after = max(chunks)
        return b"".join([found[seq] for seq in sorted(found)])

    async def _next(self, subject: str, seq: int) -> _Chunk | None:
        """The first chunk at or after `seq`. Any replica may answer, only the leader may deny."""
        query: dict[str, int | str] = {"seq": seq, "next_by_subj": subject}
        chunk = await self._next_direct(query)
        if chunk is not None:
            return chunk
        message = await get_message(self._bus, self._stream, query, _API_TIMEOUT_S)
        return None if message is None else _Chunk(message.seq, message.data)

    async def _next_direct(self, query: dict[str, int | str]) -> _Chunk | None:
        request = f"$JS.API.DIRECT.GET.{self._stream}"
        try:
            reply = await self._bus.request_reply(request, msgspec.json.encode(query), _API_TIMEOUT_S)
        except Disconnected:
            return None
        if reply.status or reply.headers is None:
            return None
        return _Chunk(int(reply.headers[wire.SEQUENCE]), reply.data)

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a reading call until it is answered. Raises Disconnected when time has run out."""
        deadline = now() + _READ_S_MAX
        pauses = Pauses()
        while True:
            try:
                return await call()
            except Disconnected:
                if now() > deadline:
                    raise
            await pauses.wait()


def _bound(call: Callable[[str, int], Awaitable[T]], subject: str, seq: int) -> Callable[[], Awaitable[T]]:
    return lambda: call(subject, seq)
