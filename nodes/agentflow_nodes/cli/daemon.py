"""How a node runs as a process: logs, signals, readiness, and its supervisor.

A supervised node (`--supervised`, used by `agentflow up`) says on stdout, in one line of
JSON, that it is ready, and stops when its stdin ends: nothing is left behind even if the
supervisor is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Annotated, Any, Final, Protocol, Self

import typer

from agentflow_nodes.cli.errors import CliError, Exit, classify
from agentflow_nodes.cli.logs import Level
from agentflow_nodes.cli.output import print_json, say

Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]

_log: Final = logging.getLogger(__name__)
_ECHO_S: Final = 0.3
"""What passes signals on (timeout, uv run) often delivers one twice: that is no second wish."""
_ORPHAN_S: Final = 1.0
_ORPHAN_S_MAX: Final = 15.0
"""What runs when the supervisor was killed, and the server with it, has nobody to report to."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Node(Protocol):
    """What a process runs: a master or a worker."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why."""


class Stop:
    """Wishes to stop. An async context manager, for the main task.

    Before `ready` is called a signal cancels the task; afterwards the first one sets
    `asked`, and each further one calls `insist`, which by default cancels the task.
    """

    def __init__(self, insist: Callable[[], object] | None = None) -> None:
        self.asked: Final = asyncio.Event()
        self.forced = False
        self._insist = insist
        self._ready = False
        self._asked_at = 0.0
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.ask)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
        if isinstance(error, asyncio.CancelledError):
            raise CliError("interrupted", Exit.INTERRUPTED) from error

    def ready(self) -> None:
        """From here on a wish to stop is granted in good order."""
        self._ready = True

    def ask(self) -> None:
        """Somebody wants us to stop."""
        now = asyncio.get_running_loop().time()
        if self._ready and not self.asked.is_set():
            self.asked.set()
            self._asked_at = now
            return
        if self._ready and now - self._asked_at < _ECHO_S:
            return
        self.forced = True
        if self._ready and self._insist is not None:
            self._insist()
        elif self._task is not None:
            self._task.cancel()


async def serve(node: Node, told: dict[str, Any], text: str, *, as_json: bool, supervised: bool) -> None:
    """Run a node until it is asked to stop. Raises what made it stop by itself.

    `told` is what a program reads when it is ready, `text` what a person does.
    """
    try:
        await _serve(node, told, text, as_json=as_json, supervised=supervised)
    except Exception as error:
        if classify(error) is None:
            _log.exception("a bug ended the node")
        raise


async def _serve(node: Node, told: dict[str, Any], text: str, *, as_json: bool, supervised: bool) -> None:
    async with Stop() as stop, node:
        stop.ready()
        if supervised:
            asyncio.get_running_loop().add_reader(0, _watch_supervisor, stop)
        if as_json or supervised:
            print_json({"ready": True, **told, "pid": os.getpid()})
        else:
            say(text)
        if supervised:
            os.dup2(2, 1)  # from here on the supervisor does not listen: output goes to the logs
        await _until_stop(node, stop)


async def _until_stop(node: Node, stop: Stop) -> None:
    ended = asyncio.ensure_future(node.ended())
    asked = asyncio.ensure_future(stop.asked.wait())
    try:
        await asyncio.wait([ended, asked], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
    finally:
        ended.cancel()
        asked.cancel()


def _watch_supervisor(stop: Stop) -> None:
    if not os.read(0, 1):
        loop = asyncio.get_running_loop()
        loop.remove_reader(0)
        stop.ask()
        loop.call_later(_ORPHAN_S, stop.ask)
        loop.call_later(_ORPHAN_S_MAX, os._exit, Exit.OPERATING)


def default_name(role: str) -> str:
    """A name nobody else on this machine has."""
    return f"{role}-{os.uname().nodename.split('.')[0][:32]}-{os.getpid()}".replace(".", "-")


def node_logs(*, debug: bool) -> Level:
    """What a node logs."""
    return "debug" if debug else "info"
