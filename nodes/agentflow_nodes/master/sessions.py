"""Sessions: which masters live, by one lease each.

A master renews its session lease and writes into it what it does where; all watch all. Who
has been silent for a full time to live is evicted by compare-and-set, so that his next
renewal fails and everybody learns of the same death.

Silence counts only over time in which our own renewals succeeded: when the bucket itself was
out of reach, or is another one than before, everybody gets a fresh, full time to live.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LogGone
from agentflow.frames import encode
from agentflow.leases.port import Change, Entry, Lease, Leases, Removed
from agentflow.logs import get_logger
from agentflow_nodes.master.sharing import Session

_RENEWALS: Final = 3
"""Renewals within one time to live."""
_AGAIN_S: Final = 0.25
"""After a renewal of which nothing was heard."""
_REOPEN_S: Final = 0.5
_RELEASE_S: Final = 1.0

_decode: Final = msgspec.json.Decoder(Session).decode
_log = get_logger(__name__)


class _Known(Struct, frozen=True):
    """Another master's session."""

    session: Session
    entry: Entry


class Sessions:
    """Our session and the others'. `run` keeps both; `on_change` is called when somebody came, went or changed.

    `describe` says what our session lease is to hold.
    """

    def __init__(
        self,
        open_leases: Callable[[], Leases],
        ttl_s: int,
        describe: Callable[[], Session],
        on_change: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_leases = open_leases
        self._ttl_s = ttl_s
        self._describe = describe
        self._on_change = on_change
        self._clock = clock
        own = describe()
        self._instance = own.instance
        self._key = wire.master_session(own.name)
        self._lease: Lease | None = None
        self._others: dict[str, _Known] = {}
        self._nonce = ""
        """Under which we ask for our lease, until it is ours: then another."""
        self._namesake = ""
        self._touched = asyncio.Event()
        self._moved = asyncio.Event()
        self._leaving = False
        self._left = asyncio.Event()
        self._answered_at = float("-inf")
        """When the bucket last answered a write of ours, whatever it said."""
        self._unanswered = False
        self._fresh_at = clock()
        self._seen_all = False

    @property
    def held(self) -> bool:
        """Whether we have a session and know the others': only then we may try to lead."""
        return self._seen_all and self._lease is not None and self._clock() < self._lease.deadline

    def alive(self) -> list[Session]:
        """All living masters as far as we know, ourselves included."""
        own = [self._describe()] if self._lease is not None else []
        return own + [known.session for known in self._others.values()]

    def touch(self) -> None:
        """What we say of ourselves changed: tell the others now."""
        self._touched.set()

    async def run(self) -> None:
        """Keep our session and watch the others', for ever."""
        while True:
            try:
                async with self._open_leases() as leases:
                    await self._keep(leases)
            except AgentFlowError as error:
                _log.warning("the bucket of leases is out of reach", error=str(error))
            await asyncio.sleep(_REOPEN_S)

    async def leave(self) -> None:
        """Give our session back, so that others take over at once."""
        self._leaving = True
        if self._lease is None:
            return
        self._touched.set()
        try:
            async with asyncio.timeout(_RELEASE_S):
                await self._left.wait()
        except TimeoutError:
            _log.warning("the session was not given back in time")

    async def _keep(self, leases: Leases) -> None:
        tasks = [
            asyncio.create_task(self._renew(leases), name="session"),
            asyncio.create_task(self._watch(leases), name="session watch"),
            asyncio.create_task(self._evict(leases), name="session eviction"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._seen_all = False
            await end_tasks(*tasks)

    # Our own ---------------------------------------------------------------------------

    async def _renew(self, leases: Leases) -> None:
        while not self._leaving:
            self._touched.clear()
            wait_s = self._ttl_s / _RENEWALS
            try:
                await self._write(leases)
            except LogGone:
                raise
            except AgentFlowError as error:
                _log.warning("the session could not be renewed", error=str(error))
                self._unanswered = True
                wait_s = min(wait_s, _AGAIN_S)
            if self._lease is None:
                wait_s = min(wait_s, _AGAIN_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._touched.wait()
            except TimeoutError:
                pass
        await self._give_back(leases)
        await asyncio.Event().wait()

    async def _give_back(self, leases: Leases) -> None:
        lease, self._lease = self._lease, None
        try:
            if lease is not None:
                await leases.release(lease)
        except AgentFlowError as error:
            _log.warning("the session was not given back", error=str(error))
        self._left.set()

    async def _write(self, leases: Leases) -> None:
        """Write our session once. A lease that could not be renewed is asked for anew."""
        value = encode(self._describe())
        lease = self._lease
        renewed = await leases.renew(lease, value) if lease is not None else None
        if renewed is None:
            self._lease = None
            self._nonce = self._nonce or secrets.token_hex(8)
            renewed = await leases.acquire(self._key, value, self._ttl_s, nonce=self._nonce)
        self._answered()
        self._lease = renewed
        if self._lease is None:
            self._tell_namesake()
            return
        self._nonce = self._namesake = ""
        if lease is None or lease.epoch != self._lease.epoch:
            _log.info("session acquired", key=self._key, epoch=self._lease.epoch)
            self._on_change()

    def _answered(self) -> None:
        """The bucket is within reach. If it was not, nobody could renew, for all we know."""
        now = self._clock()
        if self._unanswered or now - self._answered_at > self._gap_s:
            self._fresh_at = now
        self._unanswered = False
        self._answered_at = now

    @property
    def _gap_s(self) -> float:
        """Silence of the bucket towards us that is not usual."""
        return 2 * self._ttl_s / _RENEWALS

    def _tell_namesake(self) -> None:
        """Somebody else has our name: one of before us that has not expired yet, or one that lives."""
        known = self._others.get(self._key)
        if known is not None and known.session.instance != self._namesake:
            other = known.session
            self._namesake = other.instance
            _log.warning(
                "another master has this name: we follow, and lead only when it is gone",
                name=other.name,
                host=other.host,
                pid=other.pid,
            )

    # The others' -----------------------------------------------------------------------

    async def _watch(self, leases: Leases) -> None:
        pattern = wire.master_session("*")
        snapshot = await leases.entries(pattern)
        # Whom we knew and do not find may have lost his session with the bucket, like us.
        self._fresh_at = self._clock()
        self._apply(snapshot.entries)
        self._seen_all = True
        self._on_change()
        async for changes in leases.watch(pattern, snapshot.revision):
            self._apply(changes)
            self._on_change()

    def _apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, Removed):
                self._others.pop(change.key, None)
                continue
            session = _session(change)
            if session.instance != self._instance:
                self._others[change.key] = _Known(session, change)
            else:
                self._others.pop(change.key, None)
        self._moved.set()

    async def _evict(self, leases: Leases) -> None:
        """Take the sessions of masters that fell silent."""
        while True:
            self._moved.clear()
            try:
                async with asyncio.timeout(self._next_silence_s()):
                    await self._moved.wait()
            except TimeoutError:
                for known in list(self._others.values()):
                    if self._is_silent(known):  # still: others may have taken time
                        await self._take(leases, known)

    def _next_silence_s(self) -> float | None:
        due = [self._due(known) for known in self._others.values()]
        return max(0.0, min(due) - self._clock()) if due else None

    def _due(self, known: _Known) -> float:
        return max(known.entry.seen, self._fresh_at) + known.entry.ttl_s

    def _is_silent(self, known: _Known) -> bool:
        current = self._others.get(known.entry.key)
        return current is known and self._due(known) <= self._clock()

    async def _take(self, leases: Leases, known: _Known) -> None:
        key = known.entry.key
        deaf = self._unanswered or self._clock() - self._answered_at > self._gap_s
        if deaf or (self._lease is None and key != self._key):
            # We do not know whether it is the others who are silent.
            await asyncio.sleep(_AGAIN_S)
            return
        try:
            gone = await leases.evict(known.entry)
        except AgentFlowError as error:
            _log.warning("a silent master could not be evicted", master=known.session.name, error=str(error))
            gone = False
        if not gone:
            await asyncio.sleep(_AGAIN_S)
            return
        _log.warning("master lost", master=known.session.name, led=known.session.led)
        if self._others.get(key) is known:
            del self._others[key]
        self._on_change()
        self._touched.set()


def _session(entry: Entry) -> Session:
    """The session in a lease; of one that says nothing sensible, a master that does nothing.

    That one is evicted when it is silent, like any other.
    """
    name = entry.key.rpartition(".")[2]
    try:
        session = _decode(entry.value)
    except (msgspec.MsgspecError, RecursionError) as error:
        _log.warning("a session could not be read", key=entry.key, error=str(error))
        return Session(name, "")
    if session.name != name:
        _log.warning("a session under another name", key=entry.key, name=session.name[:64])
        return Session(name, "")
    return session
