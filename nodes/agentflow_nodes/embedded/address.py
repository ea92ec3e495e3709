"""Where a server is reached, and whether it is ours that answers there."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from agentflow.errors import OperatingError

_INFO_TIMEOUT_S: Final = 5.0


async def check_identity(host: str, port: int, name: str) -> None:
    """Raises OperatingError unless the server called `name`, with JetStream, answers there."""
    try:
        async with asyncio.timeout(_INFO_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                line = await reader.readuntil(b"\r\n")
            finally:
                writer.close()
        info = json.loads(line.partition(b" ")[2])
        found, jetstream = info["server_name"], info.get("jetstream", False)
    except (OSError, ValueError, LookupError, EOFError, asyncio.LimitOverrunError) as error:
        raise OperatingError(f"our nats-server does not answer on {host}:{port}: {error!r}") from error
    if found != name:
        raise OperatingError(f"port {port} is in use by another nats-server, {found}: choose another port")
    if not jetstream:
        raise OperatingError(f"nats-server on port {port} runs without JetStream: see its log")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def reachable(host: str) -> str:
    """Where a server that listens on `host` is found from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - not bound to


def url_host(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
