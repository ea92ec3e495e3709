"""The master node: one process, a seat in each namespace it serves."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from msgspec.structs import replace

from agentflow import wire
from agentflow.bus import Bus
from agentflow.domain.state import Ended, Namespace
from agentflow.errors import LogGone, OperatingError
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Identity
from agentflow.logs import get_logger
from agentflow.objects import ObjectStore
from agentflow_nodes.master.abandoned import Abandoned
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.hashes import FoldHashes
from agentflow_nodes.master.seat import Seat
from agentflow_nodes.master.sessions import Sessions
from agentflow_nodes.master.sharing import Session, handover
from agentflow_nodes.master.telling import Services, tell
from agentflow_nodes.namespaces import Discovery, Tasks, collect_garbage_seldom, take_short_turns
from agentflow_projections.hydrate import hydrate
from agentflow_projections.trimmed import fetch_snapshot

if TYPE_CHECKING:
    from agentflow_nodes.master.history import History

_SWEEP_S: Final = 5.0
_CLOSE_S_MAX: Final = 6.0
_LAST_WORDS_S_MAX: Final = 1.0
# Revisions of a bucket created anew lie above those of an earlier one: a session of before must
# not be renewed into it. What depends on that for safety is not here but in the log.
_REVISIONS_PER_S: Final = 2**20

_log = get_logger(__name__)


class Master:
    """Follows its namespaces, stands by, and leads where it is its turn. An async context manager.

    Entered, it has folded what the logs held. `ended` raises what made it stop.
    """

    def __init__(self, config: MasterConfig) -> None:
        self.config: Final = config
        self.bus: Final = Bus(config.url, name=f"agentflow master {config.name}")
        self.seats: Final[dict[str, Seat]] = {}
        self._instance = secrets.token_hex(8)
        self._started_ms = time.time_ns() // 1_000_000
        self._sessions = Sessions(self._open_leases, config.lease_ttl_s, self._describe, self._look)
        self._tasks = Tasks(self.seats, self._lose_seat)
        self._discovery = Discovery(
            self.bus, wants=lambda namespace: namespace not in self.seats, serve=self._take_found_seat
        )
        self._stack = AsyncExitStack()
        self._histories = AsyncExitStack()
        """Closes them: after whatever folds."""
        self._leaving = False
        self._hashes: dict[str, FoldHashes] = {}
        self._beside: dict[str, tuple[Callable[[], object], ...]] = {}
        """What ends what goes on beside each seat."""

    async def __aenter__(self) -> Self:
        collect_garbage_seldom()
        if self.config.history is not None:
            take_short_turns()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            stack.push_async_callback(self._histories.aclose)
            # A projector beside is closed in good order.
            stack.push_async_callback(self._tasks.end, patience_s=_CLOSE_S_MAX)
            for namespace in self.config.served:
                await self._take_seat(namespace)
            if self.config.discover:
                await self._discovery.once()
            await self._wait_caught_up()
            self._tasks.start(self._sessions.run(), "sessions")
            self._tasks.start(self._balance(), "balance")
            if self.config.discover:
                self._tasks.start(self._discovery.run(), "discovery")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        await asyncio.gather(*(seat.leave() for seat in self.seats.values()))
        await self._sessions.leave()
        if self.config.history is not None and error is None:
            await self._read_last_words()
        await self._stack.aclose()

    @property
    def leading(self) -> bool:
        """Whether it leads any namespace, as far as it knows."""
        return any(seat.leading for seat in self.seats.values())

    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why: LogGone, or a bug."""
        await self._tasks.failed()

    def _leads(self, namespace: str) -> bool:
        seat = self.seats.get(namespace)
        return seat is not None and seat.leading

    # Seats -----------------------------------------------------------------------------

    async def _take_seat(self, namespace: str, *, create: bool = True) -> None:
        config = self.config
        log = JetStreamLog(self.bus, namespace, replicas=config.replicas, create=create)
        await log.__aenter__()  # nothing to release: the bus is ours
        identity = await log.identity()
        history = await self._open_history(namespace, identity) if config.history is not None else None
        state, chain = await self._kept_state(log, identity)
        seat = Seat(log, config, self._instance, self._sessions, partial(self._tell, namespace), state=state)
        await seat.liveness.listen(self.bus)
        services = Services(self.bus, seat.follower.state, lambda: seat.leading, lambda: seat.follower.now_ms)
        await services.listen()
        hashes = FoldHashes(self.bus, namespace, config.name, self._instance, seat.caught_up.is_set)
        hashes.watch(seat.follower.digests)
        await hashes.listen()
        self._hashes[namespace] = hashes
        self.seats[namespace] = seat
        ends: list[Callable[[], object]] = [seat.liveness.close, services.close, hashes.close]
        if history is not None:
            history.follow(seat.follower.state, chain)
            seat.follower.recording = history
            ends.append(self._tasks.start(history.run(), f"history of {namespace}").cancel)
        self._tasks.start(seat.run(), namespace)
        ends.append(
            self._tasks.start(self._sweep(namespace, seat, log), f"abandoned locks of {namespace}").cancel
        )
        self._beside[namespace] = tuple(ends)

    async def _take_found_seat(self, namespace: str) -> None:
        await self._take_seat(namespace, create=False)
        self._sessions.touch()

    def _lose_seat(self, namespace: str) -> None:
        del self.seats[namespace]
        for end in self._beside.pop(namespace):
            end()
        self._sessions.touch()

    async def _open_history(self, namespace: str, identity: Identity) -> History:
        """Raises LogGone if the file is one of another log."""
        from agentflow_nodes.master.history import History  # noqa: PLC0415 - DuckDB, for who needs it

        history = History(self.bus, self.config, namespace, lambda: self._leads(namespace))
        self._histories.push_async_callback(history.close)
        await history.open(identity)
        return history

    async def _kept_state(
        self, log: JetStreamLog, identity: Identity
    ) -> tuple[Namespace | None, bytes | None]:
        """The state kept on this machine, or the one that stands for what was trimmed, and the chain up to it.

        With it only the log's tail is read. Neither is of use or needed: None.
        """
        config = self.config
        folder = config.history or config.data
        state, chain = None, None
        if folder is not None:
            kept = await asyncio.to_thread(hydrate, folder, identity, log.namespace, level=config.level)
            if kept is not None:
                state, chain = kept.state, kept.chain
        if state is None and identity.trim is not None:
            objects = ObjectStore(self.bus, log.namespace)
            state, _ = await fetch_snapshot(log, objects, level=config.level)
        if state is not None:
            tail = identity.last_seq - state.seq
            _log.info("begun with a kept state", namespace=log.namespace, seq=state.seq, tail=tail)
        return state, chain

    async def _read_last_words(self) -> None:
        """What was said by whoever ended before us, and by ourselves, is part of the history."""
        with suppress(TimeoutError, OperatingError):
            async with asyncio.timeout(_LAST_WORDS_S_MAX):
                await asyncio.gather(*(seat.read_all() for seat in self.seats.values()))

    async def _wait_caught_up(self) -> None:
        caught_up = asyncio.ensure_future(self._all_caught_up())
        try:
            await asyncio.wait({*self._tasks.running, caught_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            caught_up.cancel()
        for task in self._tasks.running:
            if task.done():
                task.result()

    async def _all_caught_up(self) -> None:
        for seat in self.seats.values():
            await seat.caught_up.wait()

    async def _sweep(self, namespace: str, seat: Seat, log: JetStreamLog) -> None:
        """While it leads: tell of locks whose holders died."""
        tickets = partial(self._tickets, namespace)
        abandoned = Abandoned(log, seat.follower.state, self.config.name, self._instance, tickets)
        while True:
            await asyncio.sleep(_SWEEP_S)
            if not seat.leading:
                continue
            try:
                await abandoned.sweep()
            except OperatingError as error:
                _log.warning("abandoned locks were not looked for", namespace=namespace, error=str(error))

    async def _tickets(self, namespace: str) -> set[int]:
        leases = JetStreamLeases(self.bus, wire.lock_bucket(namespace), create=False)
        try:
            async with leases:
                return {entry.epoch for entry in (await leases.entries(">")).entries}
        except LogGone:
            return set()  # there is no bucket: nobody holds anything

    def _tell(self, namespace: str, ended: Sequence[Ended]) -> None:
        tell(self.bus, namespace, ended)

    def _look(self) -> None:
        for seat in self.seats.values():
            seat.look()

    # Sessions --------------------------------------------------------------------------

    def _open_leases(self) -> JetStreamLeases:
        return JetStreamLeases(
            self.bus,
            wire.LEASE_BUCKET,
            replicas=self.config.replicas,
            first_seq=int(time.time()) * _REVISIONS_PER_S,
        )

    def _describe(self) -> Session:
        config = self.config
        return Session(
            name=config.name,
            instance=self._instance,
            level=config.level,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_ms=self._started_ms,
            # Who leaves is asked for nothing any more.
            seats={
                namespace: replace(seat.report(), differs=self._hashes[namespace].difference)
                for namespace, seat in self.seats.items()
                if seat.leading or not self._leaving
            },
        )

    async def _balance(self) -> None:
        """Hand a namespace over when somebody else leads fewer; one at a time."""
        while True:
            await asyncio.sleep(self.config.lease_ttl_s)
            move = handover(self.config.name, self._sessions.alive())
            if move is not None and self._sessions.held:
                namespace, successor = move
                self.seats[namespace].hand_over(successor)
