"""What a bucket says of an object: ADR-20's meta message."""

from __future__ import annotations

import base64
from typing import Final

from msgspec import Struct

from agentflow.events import ObjectRef

_DIGEST_PREFIX: Final = "SHA-256="


class Options(Struct, frozen=True, gc=False):
    """How an object was stored."""

    max_chunk_size: int = 0


class Meta(Struct, frozen=True, gc=False):
    """An object's description as ADR-20 stores it; the fields we have no use for are left out."""

    name: str
    bucket: str
    nuid: str
    size: int = 0
    chunks: int = 0
    digest: str = ""
    deleted: bool = False
    options: Options | None = None

    def holds(self, ref: ObjectRef) -> bool:
        """Whether this describes, as a living object, the bytes of `ref`."""
        return not self.deleted and (self.size, self.digest) == (ref.size, digest_text(ref.sha256))


class MetaAt(Struct, frozen=True, gc=False):
    """The last meta message of a name."""

    meta: Meta | None
    """None: there is none, or one that nobody can read."""
    seq: int
    """Its sequence, 0 if there is none."""


def digest_text(sha256: str) -> str:
    """A hex digest as ADR-20 writes it; of what is no hex digest, something that equals none."""
    try:
        return _DIGEST_PREFIX + base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode()
    except ValueError:
        return f"not a digest: {sha256}"
