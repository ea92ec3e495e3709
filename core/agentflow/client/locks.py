"""Locks in the SDK: acquire one, hold it while a block runs, and know when it is lost.

async with client.lock("db-migrate", wait_s=5.0) as held:
    await migrate(fencing_token=held.token)
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, Literal

from msgspec import Struct

from agentflow.checks import check
from agentflow.errors import InvalidRequest, LockLost, LockNotHeld, LockTimeout
from agentflow.events import LockAcquired
from agentflow.locks.held import Held
from agentflow.locks.service import LockHolder, LockInfo, Locks
from agentflow.locks.ticket import Mode, Ticket
from agentflow.logs import get_logger

__all__ = ["Held", "Lock", "LockHolder", "LockInfo", "LockOptions", "Locks", "OnLost"]

OnLost = Literal["cancel", "warn"] | Callable[[Held], Awaitable[None] | None]
"""What happens when a lock is lost while it is held.

"cancel" cancels the body of the `async with`, which then raises LockLost; "warn" logs it, and
the body goes on; a callback is called, and the body goes on.
"""

TTL_S: Final = 10

_log = get_logger(__name__)


class LockOptions(Struct, frozen=True, kw_only=True):
    """How a lock is to be held; see `Client.lock`."""

    wait_s: float | None = None
    ttl_s: int = TTL_S
    mode: Literal["exclusive", "shared", "semaphore"] = "exclusive"
    permits: int = 1
    metadata: Mapping[str, str] = {}
    on_lost: OnLost = "cancel"
    holder: str = ""


class Lock:
    """One contender for a lock of that name. Made by `Client.lock`; an async context manager.

    Not re-entrant: who holds it and asks again is told InvalidRequest. After its release it
    may be acquired again.
    """

    def __init__(self, locks: Locks, client: str, name: str, options: LockOptions) -> None:
        self.name: Final = name
        self._locks = locks
        self._client = client
        self._options = options
        self._held: Held | None = None
        self._acquiring = False
        self._block: _Block | None = None
        _require_sound(name, options)

    async def acquire(self, wait_s: float | None = None) -> Held:
        """Wait for at most `wait_s` seconds (None: for ever) and hold the lock.

        Raises LockTimeout, InvalidRequest, Disconnected (only with a limited wait),
        AppendRefused, AppendUnknown.
        """
        if self._acquiring or (self._held is not None and self._held.is_held()):
            raise InvalidRequest(f"lock {self.name!r} is held, or waited for, by this very Lock")
        self._acquiring = True
        try:
            self._held = await self._locks.acquire(self._ticket(), self._options.ttl_s, wait_s)
        finally:
            self._acquiring = False
        return self._held

    async def try_acquire(self) -> Held | None:
        """Hold the lock now, or None if somebody is before us. Raises as `acquire`."""
        try:
            return await self.acquire(0)
        except LockTimeout:
            return None

    async def release(self) -> None:
        """Give it back. Raises LockNotHeld if it was never acquired, LockLost if it was lost."""
        await self._require_held().release()

    async def renew(self) -> None:
        """Renew it now. Raises LockNotHeld, LockLost, Disconnected."""
        await self._require_held().renew()

    async def extend(self, ttl_s: int) -> None:
        """Renew it now, and from now on for `ttl_s` seconds each time. Raises as `renew`."""
        await self._require_held().extend(ttl_s)

    async def __aenter__(self) -> Held:
        held = await self.acquire(self._options.wait_s)
        self._block = _Block(held, self._options.on_lost)
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        assert block is not None, "left without having been entered"
        await block.leave(error)

    def _ticket(self) -> Ticket:
        options = self._options
        return Ticket(
            name=self.name,
            holder=options.holder or _default_holder(self._client),
            client=self._client,
            mode=Mode(options.mode),
            permits=options.permits,
            since_ms=int(time.time() * 1_000),
            metadata=dict(options.metadata),
        )

    def _require_held(self) -> Held:
        if self._held is None:
            raise LockNotHeld(f"lock {self.name!r} was not acquired by this Lock")
        return self._held


class _Block:
    """The body of an `async with`: who runs it, and whether we have cancelled it."""

    def __init__(self, held: Held, on_lost: OnLost) -> None:
        task = asyncio.current_task()
        assert task is not None, "a lock is entered by a task"
        self._task = task
        self._held = held
        self._on_lost = on_lost
        self._cancelled = False
        self._told: asyncio.Task[None] | None = None
        held.on_lost(self._lost)

    async def leave(self, error: BaseException | None) -> None:
        """Release it. Raises LockLost, also in place of the cancellation that we asked for."""
        delivered = isinstance(error, asyncio.CancelledError)
        if self._cancelled:
            await self._end_cancellation(delivered=delivered)
        ours = delivered and self._cancelled and not self._task.cancelling()
        try:
            await self._held.release()
        except LockLost as lost:
            if self._on_lost == "cancel" and (error is None or ours):
                raise lost from error

    async def _end_cancellation(self, *, delivered: bool) -> None:
        """Take our cancellation back; one that is still under way is awaited here."""
        if not delivered:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        self._task.uncancel()

    def _lost(self) -> None:
        held = self._held
        _log.warning("a lock was lost", lock=held.name, token=held.token, why=held.loss().reason)
        if self._on_lost == "cancel":
            self._cancelled = True
            self._task.cancel(f"lock {held.name!r} was lost")
        elif callable(self._on_lost):
            self._told = asyncio.create_task(_call(self._on_lost, held), name=f"told of {held.name}")


async def _call(callback: Callable[[Held], Awaitable[None] | None], held: Held) -> None:
    try:
        answer = callback(held)
        if inspect.isawaitable(answer):
            await answer
    except Exception:  # noqa: BLE001 - a callback's own failure must not be silent
        _log.exception("the callback for a lost lock failed", lock=held.name)


def _default_holder(client: str) -> str:
    return f"{client}@{socket.gethostname()}:{os.getpid()}"


def _is_text(value: object) -> bool:
    """Whether it can be written as JSON text and read again by everybody."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:  # half of a character
        return False


def _require_sound(name: str, options: LockOptions) -> None:
    """Raise InvalidRequest for what the contract does not take."""
    if options.mode != "semaphore" and options.permits != 1:
        raise InvalidRequest(f"permits={options.permits} is for mode='semaphore', not {options.mode!r}")
    if options.ttl_s != int(options.ttl_s):
        raise InvalidRequest(f"ttl_s={options.ttl_s}: whole seconds are expected")
    for text in (name, options.holder, *options.metadata, *options.metadata.values()):
        if not _is_text(text):
            raise InvalidRequest(f"name, holder and metadata must be texts without NUL, found {text!r}")
    event = LockAcquired(
        name=name,
        token=1,
        holder=options.holder,
        mode=options.mode,
        permits=options.permits,
        ttl_s=options.ttl_s,
        metadata=dict(options.metadata),
    )
    bad = check(event)
    if bad is not None:
        raise InvalidRequest(f"{bad.reason}: {bad.detail}")
