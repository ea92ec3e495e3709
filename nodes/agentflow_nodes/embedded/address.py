"""Where a server is reached, and whether it is ours that answers there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from typing import Final

from agentflow.errors import OperatingError

_INFO_TIMEOUT_S: Final = 5.0
_FREE_PORTS: Final = range(12_000, 32_000)
"""Below those that kernels give to outgoing connections, which would take a free one before its server does."""


def free_ports(count: int) -> list[int]:
    """Different ports on loopback that nobody listens on, and that no outgoing connection takes meanwhile."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # somebody listens there: the next one
                listener.bind(("127.0.0.1", secrets.choice(_FREE_PORTS)))
                found.append(listener.getsockname()[1])
    return found


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
