"""The hash chain over a log: what tells one history from another."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

from agentflow.log.port import Message

CHAIN_BYTES: Final = 16
START: Final = bytes(CHAIN_BYTES)


def chained(chain: bytes, message: Message) -> bytes:
    """The chain with one more link: over sequence, time, subject, headers and data of a message."""
    head = f"{message.seq}\n{message.time_ns}\n{message.subject}\n{_headers(message.headers)}\n"
    return blake2b(message.data, digest_size=CHAIN_BYTES, key=_key(chain, head)).digest()


def _key(chain: bytes, head: str) -> bytes:
    return blake2b(chain + head.encode("utf-8", "surrogateescape"), digest_size=32).digest()


def _headers(headers: Mapping[str, str] | None) -> str:
    return "" if not headers else "\n".join(f"{name}:{headers[name]}" for name in sorted(headers))
