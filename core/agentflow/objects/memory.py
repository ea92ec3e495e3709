"""The object store in memory."""

from __future__ import annotations

from agentflow.errors import ObjectMissing
from agentflow.events import ObjectRef
from agentflow.objects.port import check, describe


class MemoryObjectStore:
    """See `Objects`. Keeps everything in a dict, for tests."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    async def put(self, data: bytes) -> ObjectRef:
        """Store bytes; see `Objects`."""
        ref = await describe(data)
        self._objects[ref.name] = data
        return ref

    async def get(self, ref: ObjectRef) -> bytes:
        """The bytes; see `Objects`."""
        data = self._objects.get(ref.name)
        if data is None:
            raise ObjectMissing(f"object {ref.name} is not in memory")
        await check(ref, data)
        return data

    async def remove(self, ref: ObjectRef) -> None:
        """Remove an object; see `RemovableObjects`."""
        self._objects.pop(ref.name, None)
