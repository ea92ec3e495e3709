"""What commands do around their work: run, reach the server, read the log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import uvloop
from msgspec import Struct

import agentflow
from agentflow import wire
from agentflow.bus import Bus
from agentflow.client.client import DEFAULT_URL
from agentflow.errors import LogGone
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Log
from agentflow.objects import ObjectStore
from agentflow.objects.port import Objects
from agentflow_nodes.cli.errors import not_found, operating, usage
from agentflow_nodes.cli.logs import QUIET, Level, configure_logs
from agentflow_projections.history import History

CLIENT_NAME: Final = "cli"
REACH_TIMEOUT_S: Final = 3.0
_PORT: Final = 4222
_SCHEMES: Final = ("nats", "tls")

T = TypeVar("T")


class Target(Struct, frozen=True):
    """Where a command works."""

    url: str
    namespace: str

    @property
    def urls(self) -> list[str]:
        """The servers, one by one."""
        return [url.strip() for url in self.url.split(",")]


def target(nats: str | None, *namespaces: str) -> Target:
    """Check what the options say; the first namespace is where the command works. Raises CliError."""
    for namespace in namespaces:
        if not wire.is_name(namespace):
            raise usage(f"--namespace: expected 1 to 64 of A-Z a-z 0-9 _ -, found {namespace!r}")
    made = Target(nats or DEFAULT_URL, namespaces[0] if namespaces else "")
    for url in made.urls:
        _host_and_port(url)
    return made


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme not in _SCHEMES:
        raise usage(f"--nats: expected a URL like {DEFAULT_URL}, found {url!r}")
    return host, port


def run(main: Coroutine[Any, Any, T], *, logs: Level = QUIET) -> T:
    """Run a command's coroutine to its end."""
    configure_logs(logs)
    return uvloop.run(main)


def client_logs(*, debug: bool) -> Level:
    """What a command that talks to people logs: nothing, unless asked to."""
    return "debug" if debug else QUIET


async def require_server(where: Target) -> None:
    """Raise CliError at once if nobody listens there, instead of trying for long."""
    reasons = []
    for url in where.urls:
        host, port = _host_and_port(url)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), REACH_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            reasons.append(_why(error))
            continue
        writer.close()
        return
    advice = "start it with 'agentflow up' or name yours with --nats"
    raise operating(f"cannot reach NATS at {where.url}: {reasons[0]}; {advice}")


def _why(error: OSError | TimeoutError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return f"no answer within {REACH_TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)


@asynccontextmanager
async def open_client(where: Target) -> AsyncGenerator[agentflow.Client, None]:
    """A client, or a quick error."""
    await require_server(where)
    async with agentflow.Client(where.urls, namespace=where.namespace, name=CLIENT_NAME) as client:
        yield client


@asynccontextmanager
async def open_log(where: Target) -> AsyncGenerator[Log, None]:
    """The namespace's log for reading; it is never created."""
    async with open_stores(where) as (log, _):
        yield log


@asynccontextmanager
async def open_stores(where: Target) -> AsyncGenerator[tuple[Log, Objects], None]:
    """The namespace's log and its objects for reading; neither is ever created."""
    await require_server(where)
    async with (
        Bus(where.urls, name=f"agentflow {CLIENT_NAME}", connect_timeout_s=REACH_TIMEOUT_S) as bus,
        contextlib.AsyncExitStack() as stack,
    ):
        try:
            log = await stack.enter_async_context(JetStreamLog(bus, where.namespace, create=False))
        except LogGone as error:
            raise not_found(
                f"there is no namespace {where.namespace!r} at {where.url}: nothing was ever submitted to it"
            ) from error
        yield log, ObjectStore(bus, where.namespace)


def now_ms(history: History) -> int:
    """Log time goes on while nothing is said; the reader's own clock tells how far."""
    return max(history.now_ms, int(time.time() * 1000))
