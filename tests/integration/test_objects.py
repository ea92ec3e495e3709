"""The object store's promises, kept by both adapters, and what is JetStream's alone."""

# pyright: reportUnknownMemberType=false
# The client library is typed in part.

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import nats
import pytest
from nats.js import JetStreamContext

from agentflow import ids, wire
from agentflow.bus import Bus
from agentflow.errors import AppendRefused, InvalidRequest, ObjectMissing, StreamMismatch
from agentflow.events import ObjectRef
from agentflow.objects import (
    CHUNK_BYTES,
    OBJECT_BYTES_MAX,
    MemoryObjectStore,
    Objects,
    ObjectStore,
    RemovableObjects,
    bucket_config,
)
from tests.eventually import eventually
from tests.faultproxy import FaultProxy
from tests.servers import NatsServer

NAMESPACE = "objects"
BUCKET = wire.object_bucket(NAMESPACE)
STREAM = wire.object_stream(NAMESPACE)
MIB = 1024 * 1024


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class ObjectsConformance:
    """What every object store promises; an adapter's test class provides the fixture `objects`."""

    @pytest.mark.parametrize(
        "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 40 * CHUNK_BYTES + 7]
    )
    async def test_what_was_put_is_got(self, objects: Objects, size: int) -> None:
        data = some_bytes(size)
        ref = await objects.put(data)
        assert (ref.size, ref.sha256) == (size, hashlib.sha256(data).hexdigest())
        assert ids.is_id(ref.name)
        assert await objects.get(ref) == data

    async def test_equal_bytes_are_one_object(self, objects: Objects) -> None:
        assert await objects.put(b"equal") == await objects.put(b"equal")
        assert await objects.put(b"other") != await objects.put(b"equal")

    async def test_equal_bytes_put_at_once_are_one_object(self, objects: Objects) -> None:
        data = some_bytes(3 * CHUNK_BYTES)
        refs = await asyncio.gather(*[objects.put(data) for _ in range(10)])
        assert len({ref.name for ref in refs}) == 1
        assert await objects.get(refs[0]) == data

    async def test_what_was_removed_is_missing_and_the_rest_is_not(self, objects: RemovableObjects) -> None:
        removed, kept = await objects.put(some_bytes(3 * CHUNK_BYTES)), await objects.put(b"kept")
        await objects.remove(removed)
        await objects.remove(removed)
        with pytest.raises(ObjectMissing):
            await objects.get(removed)
        assert await objects.get(kept) == b"kept"
        assert await objects.put(some_bytes(3 * CHUNK_BYTES)) == removed
        assert await objects.get(removed) == some_bytes(3 * CHUNK_BYTES)

    async def test_an_object_never_put_is_missing(self, objects: Objects) -> None:
        await objects.put(b"something")
        digest = hashlib.sha256(b"never").hexdigest()
        with pytest.raises(ObjectMissing, match=digest):
            await objects.get(ObjectRef(name=digest, size=5, sha256=digest))

    async def test_bytes_of_another_size_or_digest_are_not_handed_out(self, objects: Objects) -> None:
        ref = await objects.put(b"something")
        for wrong in (
            ObjectRef(name=ref.name, size=ref.size + 1, sha256=ref.sha256),
            ObjectRef(name=ref.name, size=ref.size, sha256="0" * 64),
            ObjectRef(name=ref.name, size=ref.size, sha256="no digest"),
        ):
            with pytest.raises(ObjectMissing, match="expected"):
                await objects.get(wrong)

    async def test_too_many_bytes_are_refused(self, objects: Objects) -> None:
        with pytest.raises(InvalidRequest, match=str(OBJECT_BYTES_MAX)):
            await objects.put(bytes(OBJECT_BYTES_MAX + 1))


class TestMemory(ObjectsConformance):
    @pytest.fixture
    def objects(self) -> Objects:
        return MemoryObjectStore()


@pytest.fixture
def objects(bus: Bus) -> ObjectStore:
    return ObjectStore(bus, NAMESPACE)


@pytest.fixture
async def js(nats_server: NatsServer) -> AsyncIterator[JetStreamContext]:
    """The client library's own view."""
    client = await nats.connect(nats_server.url)
    yield client.jetstream()
    await client.close()


async def subjects(bus: Bus) -> dict[str, int]:
    """Messages held, by subject."""
    raw = await bus.js_api(f"STREAM.INFO.{STREAM}", b'{"subjects_filter":">"}', 5)
    held: dict[str, int] = msgspec.json.decode(raw)["state"].get("subjects") or {}
    return held


async def chunks(bus: Bus) -> int:
    """Chunks held."""
    prefix = wire.object_chunks(NAMESPACE, "")
    return sum(count for subject, count in (await subjects(bus)).items() if subject.startswith(prefix))


async def chunks_become(bus: Bus, count: int, *, or_more: bool = False) -> None:
    """Wait until so many chunks are held."""

    async def reached() -> bool:
        held = await chunks(bus)
        return held >= count if or_more else held == count

    await eventually(reached)


async def create(bus: Bus, **changed: Any) -> None:
    """Create the bucket with other options."""
    config = bucket_config(NAMESPACE, replicas=1, bytes_max=-1) | changed
    raw = await bus.js_api(f"STREAM.CREATE.{STREAM}", msgspec.json.encode(config), 5)
    assert b'"error"' not in raw, raw


class TestJetStream(ObjectsConformance):
    async def test_without_a_bucket_everything_is_missing(self, objects: ObjectStore) -> None:
        digest = hashlib.sha256(b"never").hexdigest()
        with pytest.raises(ObjectMissing, match="stream not found"):
            await objects.get(ObjectRef(name=digest, size=5, sha256=digest))

    @pytest.mark.parametrize("size", [0, 10, 3 * CHUNK_BYTES + 1])
    async def test_the_client_library_reads_what_we_put(
        self, objects: ObjectStore, js: JetStreamContext, size: int
    ) -> None:
        ref = await objects.put(some_bytes(size))
        store = await js.object_store(BUCKET)
        found = await store.get(ref.name)
        assert found.data == some_bytes(size)
        assert (found.info.bucket, found.info.size, found.info.name) == (BUCKET, size, ref.name)
        assert [info.name for info in await store.list()] == [ref.name]

    async def test_we_read_what_the_client_library_put(
        self, objects: ObjectStore, js: JetStreamContext
    ) -> None:
        store = await js.create_object_store(BUCKET)
        data = some_bytes(3 * CHUNK_BYTES + 1)
        await store.put("by hand", data)
        ref = ObjectRef(name="by hand", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        assert await objects.get(ref) == data
        assert await objects.get(await objects.put(data)) == data

    async def test_what_the_client_library_deleted_is_missing_until_put_again(
        self, objects: ObjectStore, js: JetStreamContext, bus: Bus
    ) -> None:
        data = some_bytes(3 * CHUNK_BYTES)
        ref = await objects.put(data)
        await (await js.object_store(BUCKET)).delete(ref.name)
        with pytest.raises(ObjectMissing, match="was deleted from the bucket"):
            await objects.get(ref)
        assert await objects.put(data) == ref
        assert await objects.get(ref) == data
        assert await chunks(bus) == 3

    async def test_equal_bytes_are_stored_once(self, objects: ObjectStore, bus: Bus) -> None:
        data = some_bytes(3 * CHUNK_BYTES)
        ref = await objects.put(data)
        before = await subjects(bus)
        await objects.put(data)
        assert await subjects(bus) == before
        assert before[wire.object_meta(NAMESPACE, ref.name)] == 1

    async def test_of_equal_bytes_put_at_once_one_copy_stays(self, objects: ObjectStore, bus: Bus) -> None:
        data = some_bytes(4 * CHUNK_BYTES)
        await asyncio.gather(*[objects.put(data) for _ in range(10)])
        await chunks_become(bus, 4)

    async def test_reusing_makes_the_object_younger(self, objects: ObjectStore, bus: Bus) -> None:
        ref = await objects.put(b"reused")
        first = await last_seq(bus, ref)
        await objects.put(b"reused")
        assert await last_seq(bus, ref) > first

    async def test_objects_put_at_once_lie_between_each_other_and_are_read_whole(
        self, objects: ObjectStore
    ) -> None:
        datas = [some_bytes(30 * CHUNK_BYTES, seed) for seed in range(4)]
        refs = await asyncio.gather(*[objects.put(data) for data in datas])
        assert await asyncio.gather(*[objects.get(ref) for ref in refs]) == datas

    async def test_an_object_that_lost_a_chunk_is_missing_and_stored_anew(
        self, objects: ObjectStore, bus: Bus
    ) -> None:
        data = some_bytes(3 * CHUNK_BYTES)
        ref = await objects.put(data)
        await bus.js_api(f"STREAM.MSG.DELETE.{STREAM}", b'{"seq":2}', 5)
        with pytest.raises(ObjectMissing, match="lacks some of its chunks"):
            await objects.get(ref)
        await objects.put(data)
        assert await objects.get(ref) == data
        await chunks_become(bus, 3)

    async def test_damaged_bytes_are_not_handed_out(
        self, objects: ObjectStore, bus: Bus, js: JetStreamContext
    ) -> None:
        data = some_bytes(3 * CHUNK_BYTES)
        ref = await objects.put(data)
        (subject,) = [name for name in await subjects(bus) if ".C." in name]
        await bus.js_api(f"STREAM.MSG.DELETE.{STREAM}", b'{"seq":2}', 5)
        await js.publish(subject, some_bytes(CHUNK_BYTES, 99))
        with pytest.raises(ObjectMissing, match="expected bytes of SHA-256"):
            await objects.get(ref)

    async def test_no_consumer_stays_behind(self, objects: ObjectStore, bus: Bus) -> None:
        await objects.get(await objects.put(some_bytes(20 * CHUNK_BYTES)))
        raw = await bus.js_api(f"CONSUMER.NAMES.{STREAM}", b"", 5)
        assert msgspec.json.decode(raw)["total"] == 0

    async def test_a_full_bucket_refuses_and_keeps_nothing_of_it(self, bus: Bus) -> None:
        objects = ObjectStore(bus, NAMESPACE, bytes_max=MIB)
        kept = await objects.put(some_bytes(2 * CHUNK_BYTES))
        with pytest.raises(AppendRefused, match="maximum bytes"):
            await objects.put(some_bytes(2 * MIB, 2))
        await chunks_become(bus, 2)
        assert await objects.get(kept) == some_bytes(2 * CHUNK_BYTES)

    async def test_a_cancelled_put_leaves_nothing(self, objects: ObjectStore, bus: Bus) -> None:
        await objects.put(b"")
        putting = asyncio.create_task(objects.put(some_bytes(32 * MIB)))
        await chunks_become(bus, 16, or_more=True)
        putting.cancel()
        await asyncio.wait([putting])
        await chunks_become(bus, 0)

    @pytest.mark.parametrize(
        "changed",
        [
            {"retention": "workqueue"},
            {"discard": "old"},
            {"storage": "memory"},
            {"allow_rollup_hdrs": False},
            {"max_msgs_per_subject": 1},
            {"max_msg_size": 1000},
            {"subjects": wire.object_subjects(NAMESPACE)[:1]},
            {"duplicate_window": 1_000_000_000},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    async def test_a_bucket_that_would_lose_objects_is_refused(
        self, objects: ObjectStore, bus: Bus, changed: dict[str, Any]
    ) -> None:
        await create(bus, **changed)
        with pytest.raises(StreamMismatch, match=f"{next(iter(changed))}: "):
            await objects.put(b"data")

    async def test_a_bucket_with_other_harmless_options_is_used(self, objects: ObjectStore, bus: Bus) -> None:
        await create(bus, allow_direct=False, compression="s2", max_bytes=64 * MIB, description="ours")
        data = some_bytes(3 * CHUNK_BYTES)
        assert await objects.get(await objects.put(data)) == data

    async def test_a_bucket_deleted_meanwhile_is_created_again(self, objects: ObjectStore, bus: Bus) -> None:
        ref = await objects.put(b"data")
        await bus.js_api(f"STREAM.DELETE.{STREAM}", b"", 5)
        with pytest.raises(ObjectMissing):
            await objects.get(ref)
        await objects.put(b"data")
        assert await objects.get(ref) == b"data"


async def test_put_and_get_survive_kills_of_the_server() -> None:
    data = some_bytes(24 * MIB)
    async with NatsServer() as server, Bus(server.url, name="objects") as bus:
        objects = ObjectStore(bus, NAMESPACE)
        await objects.put(b"")
        putting = asyncio.create_task(objects.put(data))
        for kill in range(3):
            await chunks_become(bus, 16 * (kill + 1), or_more=True)
            await server.restart()
        ref = await putting
        await chunks_become(bus, len(data) // CHUNK_BYTES)
        getting = asyncio.create_task(objects.get(ref))
        await asyncio.sleep(0)
        await server.restart()
        assert await getting == data


async def test_a_crash_before_the_meta_message_leaves_nothing_visible(nats_server: NatsServer) -> None:
    data = some_bytes(8 * MIB)
    async with Bus(nats_server.url, name="crashing") as bus:
        ref = await ObjectStore(bus, NAMESPACE).put(b"")
        putting = asyncio.create_task(ObjectStore(bus, NAMESPACE).put(data))
        await chunks_become(bus, 16, or_more=True)
        await bus.__aexit__(None, None, None)
        putting.cancel()
        await asyncio.wait([putting])
    async with Bus(nats_server.url, name="after") as bus:
        objects = ObjectStore(bus, NAMESPACE)
        assert [name for name in await subjects(bus) if ".M." in name] == [
            wire.object_meta(NAMESPACE, ref.name)
        ]
        assert await objects.get(await objects.put(data)) == data


async def last_seq(bus: Bus, ref: ObjectRef) -> int:
    """Sequence of an object's meta message."""
    query = msgspec.json.encode({"last_by_subj": wire.object_meta(NAMESPACE, ref.name)})
    seq: int = msgspec.json.decode(await bus.js_api(f"STREAM.MSG.GET.{STREAM}", query, 5))["message"]["seq"]
    return seq


async def test_lost_acknowledgements_change_nothing(nats_server: NatsServer) -> None:
    data = some_bytes(4 * MIB)
    async with FaultProxy(nats_server.port) as proxy, Bus(proxy.url, name="objects") as bus:
        objects = ObjectStore(bus, NAMESPACE)
        await objects.put(b"")
        for round_ in range(4):
            proxy.drop_answers()
            putting = asyncio.create_task(objects.put(data[round_:]))
            await eventually(lambda: proxy.dropped_bytes)
            proxy.heal()
            assert await objects.get(await putting) == data[round_:]
