"""The master node: one process, one namespace."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self

from agentflow import wire
from agentflow.bus import Bus
from agentflow.domain.state import Ended
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, LogGone, OperatingError
from agentflow.frames import encode
from agentflow.lease import Lease, LeaseStore
from agentflow.log.jetstream import JetStreamLog
from agentflow.logs import get_logger
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.follower import Follower
from agentflow_nodes.master.leader import End, Leader
from agentflow_nodes.master.liveness import Liveness
from agentflow_nodes.master.telling import Services, tell

_RENEWALS: Final = 3
"""Renewals within one time to live."""
_ELECT_PAUSE_S: Final = 0.1
_ASK_SHARE: Final = 4
"""A standby asks for the lease this often within one time to live."""
# A fold of a million tasks is long-lived objects only: collecting them often buys nothing.
_GC_THRESHOLD: Final = (100_000, 20, 100)

_log = get_logger(__name__)


class Master:
    """Follows, stands by, and leads while it holds the lease. An async context manager.

    Entered, it has folded what the log held. `ended` raises what made it stop.
    """

    def __init__(self, config: MasterConfig) -> None:
        self.config: Final = config
        self.bus: Final = Bus(config.url, name=f"agentflow master {config.name}")
        self._log = JetStreamLog(self.bus, config.namespace, replicas=config.replicas)
        self._leases = LeaseStore(self.bus, replicas=config.replicas)
        self._follower = Follower(self._log, self._on_folded)
        self._liveness = Liveness(config.namespace, config.worker_ttl_s)
        self._leader: Leader | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._caught_up = asyncio.Event()
        self._target_seq = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        gc.set_threshold(*_GC_THRESHOLD)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.bus)
            await stack.enter_async_context(self._log)
            await stack.enter_async_context(self._leases)
            await self._liveness.listen(self.bus)
            services = Services(
                self.bus, self._follower.state, lambda: self.leading, lambda: self._follower.now_ms
            )
            await services.listen()
            self._target_seq = (await self._log.identity()).last_seq
            self._stack = stack.pop_all()
        self._tasks.append(asyncio.create_task(self._follower.run(), name="follower"))
        try:
            await self._wait_caught_up()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._tasks.append(asyncio.create_task(self._stand(), name="lease"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks(*self._tasks)
        await self._stack.aclose()

    @property
    def leading(self) -> bool:
        """Whether it leads now, as far as it knows."""
        return self._leader is not None and self._leader.leading

    async def ended(self) -> None:
        """Wait until it stops by itself, and raise why: LogGone, or a bug."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _wait_caught_up(self) -> None:
        follower = self._tasks[0]
        caught_up = asyncio.create_task(self._caught_up.wait())
        if self._follower.state.seq >= self._target_seq:
            self._caught_up.set()
        await asyncio.wait([follower, caught_up], return_when=asyncio.FIRST_COMPLETED)
        caught_up.cancel()
        if follower.done():
            follower.result()

    def _on_folded(self, ended: Sequence[Ended]) -> None:
        leader = self._leader
        if leader is not None:
            if ended and leader.leading:
                tell(self.bus, self.config.namespace, ended)
            leader.wake()
        if self._follower.state.seq >= self._target_seq:
            self._caught_up.set()

    # The lease -------------------------------------------------------------------------

    async def _stand(self) -> None:
        """Ask for the lease, lead while it is ours, and again."""
        key = wire.leader_lease(self.config.namespace)
        value = encode({"holder": self.config.name})
        while True:
            lease = await self._acquire(key, value)
            if lease is None:
                await asyncio.sleep(self.config.lease_ttl_s / _ASK_SHARE)
                continue
            try:
                lease = await self._hold(lease)
            finally:
                await self._release(lease)

    async def _acquire(self, key: str, value: bytes) -> Lease | None:
        try:
            return await self._leases.acquire(key, value, self.config.lease_ttl_s)
        except AgentFlowError as error:
            _log.warning("the lease could not be asked for", error=str(error))
            return None

    async def _release(self, lease: Lease) -> None:
        try:
            await self._leases.release(lease)
        except AgentFlowError as error:
            _log.warning("the lease was not released", error=str(error))

    async def _hold(self, lease: Lease) -> Lease:
        """Lead until somebody else does."""
        leading = asyncio.create_task(self._lead(), name="leader")
        try:
            while not leading.done():
                await asyncio.wait([leading], timeout=self.config.lease_ttl_s / _RENEWALS)
                if leading.done():
                    break
                lease, held = await self._renew(lease)
                if not held:
                    _log.warning("somebody else holds the lease", master=self.config.name)
                    break
        finally:
            await end_tasks(leading)
            self._leader = None
        if not leading.cancelled():
            leading.result()
        return lease

    async def _renew(self, lease: Lease) -> tuple[Lease, bool]:
        """The renewed lease, and whether it is still ours.

        A lease that could not be renewed does not end the term: only the log deposes.
        """
        try:
            renewed = await self._leases.renew(lease)
            if renewed is not None:
                return renewed, True
            again = await self._leases.acquire(lease.key, lease.value, self.config.lease_ttl_s)
        except AgentFlowError as error:
            _log.warning("the lease could not be renewed", error=str(error))
            return lease, True
        return (again, True) if again is not None else (lease, False)

    async def _lead(self) -> None:
        last_term = 0
        while True:
            leader = Leader(
                self._log,
                self._follower,
                self.config,
                lambda: self._liveness.silences(self._follower.state),
            )
            self._leader = leader
            self._liveness.refresh()
            try:
                if not await leader.elect(after=last_term):
                    if leader.deposed:
                        return
                    await asyncio.sleep(_ELECT_PAUSE_S)
                    continue
                last_term = leader.elected_seq
                if await leader.lead() is End.DEPOSED:
                    return
            except LogGone:
                return
            except OperatingError as error:
                _log.warning("the term could not be held", error=str(error))
                await asyncio.sleep(_ELECT_PAUSE_S)
