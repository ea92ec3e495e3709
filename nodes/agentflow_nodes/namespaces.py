"""What nodes have in common that serve several namespaces: a task for each, and looking for more."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, Final, NoReturn

from agentflow import wire
from agentflow.bus import Bus
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError, StreamMismatch
from agentflow.log.stream import stream_names
from agentflow.logs import get_logger

_DISCOVER_S: Final = 2.0
_NAMES_TIMEOUT_S: Final = 5.0
_TURN_S: Final = 0.001
_GC_THRESHOLD: Final = (100_000, 20, 100)

_log = get_logger(__name__)


def collect_garbage_seldom() -> None:
    """For a process that folds: a fold is long-lived objects only, and collecting them often buys nothing."""
    gc.set_threshold(*_GC_THRESHOLD)


def take_short_turns() -> None:
    """For a process in which a thread writes or reads a history beside the one that folds.

    Who wants the interpreter waits for so long until it is taken from who has it. Python's own 5 ms are
    long for a loop that has to answer, and for a query that needs it several times.
    """
    sys.setswitchinterval(_TURN_S)


class Tasks:
    """What a node does at the same time: one task that serves each namespace, and others beside.

    What ends one of them ends the node. Only a log that is gone does not, while other namespaces are served.
    """

    def __init__(self, served: Mapping[str, object], leave: Callable[[str], None]) -> None:
        self._served = served
        self._leave = leave
        """What to do without a namespace; it is not among those served afterwards."""
        self._names: dict[asyncio.Task[None], str] = {}
        self._done: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()

    @property
    def running(self) -> Collection[asyncio.Task[None]]:
        """Those whose end was not looked at."""
        return self._names.keys()

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Begin a task; one that serves a namespace has its name."""
        task = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(self._done.put_nowait)
        self._names[task] = name
        return task

    async def failed(self) -> NoReturn:
        """Wait until the node has to end, and raise why: LogGone, or what else a task ended with."""
        while True:
            self._settle(await self._done.get())

    def _settle(self, task: asyncio.Task[None]) -> None:
        namespace = self._names.pop(task)
        if task.cancelled():
            return
        try:
            task.result()
        except LogGone as error:
            if len(self._served) < 2 or namespace not in self._served:  # noqa: PLR2004 - the only one
                raise
            _log.error(
                "the log is gone: this namespace is served no more", namespace=namespace, error=str(error)
            )
            self._leave(namespace)

    async def end(self, *, patience_s: float = 0.0) -> None:
        """Cancel them and wait; for so long they may end in good order before they are cancelled again."""
        if patience_s and self._names:
            for task in self._names:
                task.cancel()
            await asyncio.wait(self._names, timeout=patience_s)
        await end_tasks(*self._names)


class Discovery:
    """Finds namespaces that have a log."""

    def __init__(
        self, bus: Bus, *, wants: Callable[[str], bool], serve: Callable[[str], Awaitable[object]]
    ) -> None:
        self._bus = bus
        self._wants = wants
        self._serve = serve
        self._unfit: set[str] = set()

    def leave_alone(self, namespace: str) -> None:
        """Serve it no more, even if there is a log of its name again."""
        self._unfit.add(namespace)

    async def run(self, *, looks: Callable[[], bool] = lambda: True) -> None:
        """Look again and again, as long as `looks` says so."""
        while looks():
            await asyncio.sleep(_DISCOVER_S)
            try:
                await self.once()
            except OperatingError as error:
                _log.warning("namespaces could not be looked for", error=str(error))

    async def once(self) -> None:
        """Begin to serve those that are wanted. Raises OperatingError."""
        for name in await stream_names(self._bus, _NAMES_TIMEOUT_S):
            namespace = wire.parse_stream(name)
            if namespace is not None and namespace not in self._unfit and self._wants(namespace):
                await self._found(namespace)

    async def _found(self, namespace: str) -> None:
        try:
            await self._serve(namespace)
        except LogGone:  # in the meantime
            return
        except StreamMismatch as error:
            self.leave_alone(namespace)
            _log.warning("not a log of ours: this namespace is not served", error=str(error))
        except OperatingError as error:  # the others are found all the same
            _log.warning("a namespace is not served yet", namespace=namespace, error=str(error))
        else:
            _log.info("namespace found", namespace=namespace)
