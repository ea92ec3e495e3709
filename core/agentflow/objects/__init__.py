"""Large arguments and results: where they are kept, and the adapters."""

from agentflow.objects.bucket import BYTES_MAX, CHUNK_BYTES, bucket_config, faults
from agentflow.objects.jetstream import ObjectStore
from agentflow.objects.memory import MemoryObjectStore
from agentflow.objects.port import OBJECT_BYTES_MAX, Objects, RemovableObjects

__all__ = [
    "BYTES_MAX",
    "CHUNK_BYTES",
    "OBJECT_BYTES_MAX",
    "MemoryObjectStore",
    "ObjectStore",
    "Objects",
    "RemovableObjects",
    "bucket_config",
    "faults",
]
