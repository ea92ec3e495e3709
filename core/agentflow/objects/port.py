"""What every object store promises, and what it checks."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final, Protocol

from agentflow.errors import InvalidRequest, ObjectMissing
from agentflow.events import ObjectRef

OBJECT_BYTES_MAX: Final = 256 * 1024 * 1024
"""Largest object."""
_HASH_INLINE_BYTES_MAX: Final = 1024 * 1024


class Objects(Protocol):
    """Where bytes too large for the log are kept."""

    async def put(self, data: bytes) -> ObjectRef:
        """Store bytes; when it returns they are stored for good. Storing them again is harmless.

        Raises InvalidRequest (too large), AppendRefused (full, not permitted), AppendUnknown,
        StreamMismatch, Disconnected.
        """
        ...

    async def get(self, ref: ObjectRef) -> bytes:
        """The bytes, of the size and digest the reference names.

        Raises ObjectMissing if there are none, or others; Disconnected.
        """
        ...


class RemovableObjects(Objects, Protocol):
    """A store that forgets what it is told to: snapshots follow each other, results do not."""

    async def remove(self, ref: ObjectRef) -> None:
        """Remove the object the reference names; harmless if it is not there.

        Raises OperatingError, Disconnected.
        """
        ...


async def describe(data: bytes) -> ObjectRef:
    """The reference of bytes. Raises InvalidRequest if they are too many."""
    if len(data) > OBJECT_BYTES_MAX:
        raise InvalidRequest(f"an object of {len(data)} bytes, at most {OBJECT_BYTES_MAX} are stored")
    sha256 = await _sha256(data)
    return ObjectRef(name=sha256, size=len(data), sha256=sha256)


async def check(ref: ObjectRef, data: bytes) -> None:
    """Raises ObjectMissing unless these are the bytes the reference names."""
    if len(data) != ref.size:
        raise ObjectMissing(f"object {ref.name}: expected {ref.size} bytes, found {len(data)}")
    sha256 = await _sha256(data)
    if sha256 != ref.sha256:
        raise ObjectMissing(f"object {ref.name}: expected bytes of SHA-256 {ref.sha256}, found {sha256}")


async def _sha256(data: bytes) -> str:
    """The hex digest; of many bytes in a thread, since hashing them takes long."""
    if len(data) <= _HASH_INLINE_BYTES_MAX:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
