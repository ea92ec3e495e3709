"""A cluster's logs and objects in a folder, and back: the same sequences, the same times.

    <folder>/
        manifest.json                what is there; written last
        <stream>.snapshot            a stream as the server hands it out
        <namespace>.state            the snapshot of the fold that stands for what was trimmed

The servers' own snapshot of a stream keeps what no writer could write again: the sequence and
time of each message, and where the log was trimmed. Objects are taken after the log that
names them, and put back before it, so no event ever names an object that is not there. Leases
and locks are left out: nobody holds them in a cluster that begins anew, and the first who
opens the bucket of locks begins a generation above those in the log.

Restoring goes stream by stream, each whole or not at all. What was restored already is
recognised and left alone, so a restore that was interrupted is run again. A stream that holds
anything else is never touched.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, InvalidRequest, LogGone, ObjectMissing, OperatingError
from agentflow.log.port import Trim
from agentflow.log.publisher import ApiError
from agentflow.log.stream import (
    NO_STREAM,
    ApiFailed,
    StreamInfo,
    ask,
    ask_again,
    read_trim,
    stream_info,
    stream_names,
)
from agentflow.logs import get_logger
from agentflow.objects import ObjectStore

FORM: Final = 1
MANIFEST: Final = "manifest.json"

_CHUNK_BYTES: Final = 128 * 1024
_API_TIMEOUT_S: Final = 10.0
# Checking a large stream before the first chunk takes long; between two chunks nothing does.
_FIRST_S_MAX: Final = 120.0
_CHUNK_S_MAX: Final = 30.0
# The server answers a chunk once what is in it is on the disk, and gives up on whoever sends the
# next one later than 5 s: so many small messages must not be in one.
_PIECE_BYTES_FIRST: Final = 8 * 1024
_PIECE_BYTES_MIN: Final = 512
_PIECE_S_FAST: Final = 0.2
_PIECE_S_SLOW: Final = 1.0
# A restore that was cut off blocks its stream until the server gives it up; servers that just
# started look for each other, and elect.
_NOT_NOW: Final = frozenset({10130, 10005, 10008})
_BLOCKED_S_MAX: Final = 30.0
_ASK_AGAIN_S: Final = 0.5
_ATTEMPTS_MAX: Final = 3
_STATUS: Final = "Status"
_DONE: Final = "204"

Progress = Callable[[str, int, int], None]
"""Told a stream's name, the bytes done and their number, 0 if that is not known."""

_log = get_logger(__name__)


class BackupDamaged(OperatingError):
    """What lies in the folder is not what was backed up there, or not all of it."""


class SavedStream(Struct, frozen=True):
    """A stream in a backup."""

    name: str
    config: dict[str, Any]
    state: dict[str, Any]
    """As the server described it: messages, bytes, first and last sequence and time."""
    size: int
    sha256: str


class SavedNamespace(Struct, frozen=True):
    """A namespace in a backup: its log, and its objects if it has any."""

    name: str
    log: SavedStream
    objects: SavedStream | None
    trim: Trim | None
    """Where the log was trimmed; the state that stands for the rest is in the backup, too."""


class Manifest(Struct, frozen=True):
    """What is in a backup."""

    form: int
    namespaces: list[SavedNamespace]


class _Snapshot(Struct, frozen=True):
    config: dict[str, Any]
    state: dict[str, Any]


class _Restore(Struct, frozen=True):
    deliver_subject: str


class _Restored(Struct, frozen=True):
    error: ApiError | None = None


async def namespaces_of(bus: Bus) -> list[str]:
    """All namespaces that have a log. Raises Disconnected."""
    found = map(wire.parse_stream, await stream_names(bus, _API_TIMEOUT_S))
    return sorted(name for name in found if name is not None)


# Backup ------------------------------------------------------------------------------------


async def backup(
    bus: Bus, folder: Path, namespaces: Sequence[str], progress: Progress = lambda *_: None
) -> Manifest:
    """Write the namespaces' logs and objects into an empty folder, while they are used.

    What somebody left there who was interrupted is written anew. Raises InvalidRequest if the
    folder holds a backup already, LogGone if there is no such namespace, Disconnected, OSError.
    """
    _prepare(folder)
    saved = [await _save(bus, folder, name, progress) for name in namespaces]
    manifest = Manifest(FORM, saved)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    await asyncio.to_thread(_put, folder / MANIFEST, text)
    return manifest


def _prepare(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise InvalidRequest(f"{folder} holds a backup already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)


async def _save(bus: Bus, folder: Path, namespace: str, progress: Progress) -> SavedNamespace:
    """The log, then the objects it names."""
    log_name = wire.stream(namespace)
    for attempt in range(_ATTEMPTS_MAX):
        log = await _save_stream(bus, folder, log_name, progress)
        trim = read_trim(log.config)
        try:
            if trim is not None:
                state = await ObjectStore(bus, namespace).get(trim.snapshot)
                await asyncio.to_thread(_put, folder / f"{namespace}.state", state)
        except ObjectMissing:
            if attempt + 1 == _ATTEMPTS_MAX:
                raise
            continue  # trimmed further since, with another snapshot
        objects: SavedStream | None = None
        with suppress(LogGone):
            objects = await _save_stream(bus, folder, wire.object_stream(namespace), progress)
        if (await stream_info(bus, log.name, _API_TIMEOUT_S)).identity.trim == trim:
            return SavedNamespace(namespace, log, objects, trim)
        # Trimmed further since, what stands for what was trimmed may be gone from the objects.
    raise OperatingError(f"{log_name} is trimmed again and again while it is backed up: stop its archiver")


async def _save_stream(bus: Bus, folder: Path, name: str, progress: Progress) -> SavedStream:
    path = folder / f"{name}.snapshot"
    size, digest = 0, hashlib.sha256()
    async with _chunks(bus, name) as (head, chunks):
        with path.open("wb") as file:
            async for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress(name, size, 0)
            await asyncio.to_thread(_flush, file)
    _log.info("saved", stream=name, size=size, messages=head.state.get("messages", 0))
    return SavedStream(name, head.config, head.state, size, digest.hexdigest())


@asynccontextmanager
async def _chunks(bus: Bus, name: str) -> AsyncGenerator[tuple[_Snapshot, AsyncGenerator[bytes, None]]]:
    """What the server says of a stream, and its snapshot, chunk by chunk."""
    arrived: asyncio.Queue[tuple[bytes, str, dict[str, str]]] = asyncio.Queue()
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(
        inbox, lambda _, data, reply, headers: arrived.put_nowait((data, reply, headers or {}))
    )
    try:
        query = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": _CHUNK_BYTES, "jsck": True}
        try:
            head = await ask(bus, f"STREAM.SNAPSHOT.{name}", query, _Snapshot, _FIRST_S_MAX)
        except ApiFailed as failed:
            if failed.error.err_code == NO_STREAM:
                raise LogGone(f"there is no stream {name}") from failed
            raise OperatingError(f"stream {name} cannot be backed up: {failed}") from failed
        yield head, _read_chunks(bus, name, arrived)
    finally:
        subscription.end()


async def _read_chunks(
    bus: Bus, name: str, arrived: asyncio.Queue[tuple[bytes, str, dict[str, str]]]
) -> AsyncGenerator[bytes, None]:
    patience_s = _FIRST_S_MAX
    while True:
        try:
            data, reply, headers = await asyncio.wait_for(arrived.get(), patience_s)
        except TimeoutError as error:
            raise Disconnected(f"the snapshot of stream {name} stopped coming; begin anew") from error
        if not data:
            status = headers.get(_STATUS, _DONE)
            if status != _DONE:
                detail = headers.get("Description", "")
                raise OperatingError(f"stream {name} cannot be backed up: {status} {detail}")
            return
        yield data
        if reply:  # only what was written is acknowledged: the server sends so much and no more
            bus.publish(reply, b"")
        patience_s = _CHUNK_S_MAX


# Restore -----------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """What is in a backup; its files are checked. Raises BackupDamaged."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise BackupDamaged(
            f"{folder} holds no whole backup: expected {path}, which is written last"
        ) from error
    except (OSError, msgspec.DecodeError) as error:
        raise BackupDamaged(f"{path} cannot be read: {error}") from error
    if manifest.form != FORM:
        raise BackupDamaged(f"{path} is of form {manifest.form}; this release reads {FORM}")
    for namespace in manifest.namespaces:
        for saved in (namespace.log, namespace.objects):
            if saved is not None:
                _check_file(folder / f"{saved.name}.snapshot", saved)
    return manifest


def _check_file(path: Path, saved: SavedStream) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackupDamaged(f"{path} cannot be read: {error}") from error
    if (size, found) != (saved.size, saved.sha256):
        raise BackupDamaged(
            f"{path}: expected {saved.size} bytes of SHA-256 {saved.sha256}, found {size} of {found}"
        )


async def restore(
    bus: Bus,
    folder: Path,
    namespaces: Sequence[str] = (),
    *,
    replicas: int | None = None,
    progress: Progress = lambda *_: None,
) -> list[str]:
    """Bring namespaces (none named: all) back into a cluster that has none of them; those that were not there.

    On as many servers as they were, unless `replicas` says otherwise. Raises BackupDamaged before
    anything is touched; InvalidRequest if a stream is there already, and is not as it was
    backed up; Disconnected, OperatingError.
    """
    manifest = await asyncio.to_thread(read_manifest, folder)
    known = {each.name: each for each in manifest.namespaces}
    for name in namespaces:
        if name not in known:
            raise InvalidRequest(f"{folder} holds {', '.join(known)}, not {name!r}")
    chosen = [known[name] for name in namespaces or known]
    missing = {
        saved.name: await _is_missing(bus, saved)
        for each in chosen
        for saved in (each.log, each.objects)
        if saved is not None
    }
    for each in chosen:
        for saved in (each.objects, each.log):
            if saved is not None and missing[saved.name]:
                await _bring_back(bus, folder, saved, replicas, progress)
        await _bring_state(bus, folder, each)
    return [each.name for each in chosen if missing[each.log.name]]


async def _is_missing(bus: Bus, saved: SavedStream) -> bool:
    """Whether a stream is to be restored; False: it was. Raises InvalidRequest if it is another."""
    try:
        info = await ask_again(bus, f"STREAM.INFO.{saved.name}", None, dict[str, Any], _API_TIMEOUT_S)
    except ApiFailed as failed:
        if failed.error.err_code == NO_STREAM:
            return True
        raise Disconnected(str(failed)) from failed
    found, expected = _extent(info["state"]), _extent(saved.state)
    if found == expected:
        return False
    raise InvalidRequest(
        f"stream {saved.name} is there already: expected none, or messages {expected[1]} to {expected[2]},"
        f" found {found[1]} to {found[2]}. Stop all nodes, and restore into an empty cluster, or delete it first"
    )


def _extent(state: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(state.get(name) for name in ("messages", "first_seq", "last_seq", "first_ts", "last_ts"))


async def _bring_back(
    bus: Bus, folder: Path, saved: SavedStream, replicas: int | None, progress: Progress
) -> None:
    config = saved.config if replicas is None else {**saved.config, "num_replicas": replicas}
    target = await _announce(bus, saved.name, {"config": config, "state": saved.state})
    with (folder / f"{saved.name}.snapshot").open("rb") as file:
        await _send(bus, saved, target, file, progress)
    answer = await bus.request(target, b"", _FIRST_S_MAX)
    error = msgspec.json.decode(answer, type=_Restored).error if answer else None
    if error is not None:
        raise OperatingError(
            f"stream {saved.name} cannot be restored: {error.description} ({error.err_code})"
        )
    if await _is_missing(bus, saved):
        raise OperatingError(f"stream {saved.name} was restored, and is not there: run it again")
    _log.info("restored", stream=saved.name, messages=saved.state.get("messages", 0))


async def _announce(bus: Bus, name: str, payload: dict[str, Any]) -> str:
    """Where to send the snapshot. Whoever was interrupted before us is waited for, and servers that elect."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _BLOCKED_S_MAX
    while True:
        try:
            return (
                await ask(bus, f"STREAM.RESTORE.{name}", payload, _Restore, _API_TIMEOUT_S)
            ).deliver_subject
        except ApiFailed as failed:
            if failed.error.err_code not in _NOT_NOW or loop.time() > until:
                raise OperatingError(f"stream {name} cannot be restored: {failed}") from failed
        await asyncio.sleep(_ASK_AGAIN_S)


async def _send(bus: Bus, saved: SavedStream, target: str, file: BinaryIO, progress: Progress) -> None:
    """Send a snapshot in pieces of a size that the server's disk keeps up with."""
    loop = asyncio.get_running_loop()
    size, sent = _PIECE_BYTES_FIRST, 0
    while piece := file.read(size):
        began = loop.time()
        answer = await bus.request(target, piece, _CHUNK_S_MAX)
        error = msgspec.json.decode(answer, type=_Restored).error if answer else None
        if error is not None:
            raise OperatingError(f"stream {saved.name} cannot be restored: {error.description}")
        sent += len(piece)
        progress(saved.name, sent, saved.size)
        took_s = loop.time() - began
        if took_s < _PIECE_S_FAST:
            size = min(2 * size, _CHUNK_BYTES)
        elif took_s > _PIECE_S_SLOW:
            size = max(size // 4, _PIECE_BYTES_MIN)


async def _bring_state(bus: Bus, folder: Path, namespace: SavedNamespace) -> None:
    """Put the state that stands for what was trimmed into the object store, if it is not there."""
    if namespace.trim is None:
        return
    objects = ObjectStore(bus, namespace.name, replicas=(await _replicas_of(bus, namespace)))
    try:
        await objects.get(namespace.trim.snapshot)
    except ObjectMissing:
        ref = await objects.put((folder / f"{namespace.name}.state").read_bytes())
        if ref != namespace.trim.snapshot:
            raise BackupDamaged(
                f"{folder / namespace.name}.state is not the snapshot {namespace.trim.snapshot.name}"
            ) from None


async def _replicas_of(bus: Bus, namespace: SavedNamespace) -> int:
    info: StreamInfo = await stream_info(bus, namespace.log.name, _API_TIMEOUT_S)
    replicas: int = info.config["num_replicas"]
    return replicas


def _put(path: Path, data: bytes) -> None:
    fresh = path.with_name(path.name + ".unfinished")
    with fresh.open("wb") as file:
        file.write(data)
        _flush(file)
    fresh.replace(path)
    number = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
