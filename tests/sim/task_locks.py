"""Locks of simulated workers and clients: the real ones, in a bucket behind a link."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from agentflow.errors import Disconnected
from agentflow.locks.bucket import Opened
from agentflow.locks.service import Locks
from agentflow_nodes.worker.locking import TaskLocks
from tests.sim.leases import ANSWER_S, SimLeases
from tests.sim.network import SimBus, SimLog

if TYPE_CHECKING:
    from agentflow.writer import Writer
    from tests.sim.cluster import Cluster
    from tests.sim.network import Link


class SimTaskLocks(TaskLocks):
    """See `agentflow_nodes.worker.locking.TaskLocks`."""

    def __init__(self, cluster: Cluster, link: Link, writer: Writer, worker: str) -> None:
        super().__init__(cast("Any", SimBus(link)), SimLog(link), writer, worker)
        self._cluster = cluster
        self._link = link

    @cached_property
    def _locks(self) -> Locks:
        return locks_over(self._cluster, self._link, self._writer)


def locks_over(cluster: Cluster, link: Link, writer: Writer) -> Locks:
    """The real locks, in the bucket on the other side of a link."""

    async def open_bucket() -> Opened:
        if not await link.until_connected(ANSWER_S):
            raise Disconnected("no connection")
        opened = await link.ask(cluster.locks.open, ANSWER_S, faulty=True)
        if opened is None:
            raise Disconnected("no answer")
        leases = SimLeases(link, cluster.leases, cluster.nonce, cluster.locks.name, create=False)
        return Opened(await leases.__aenter__(), *opened)

    return Locks(open_bucket, writer.write, find_bucket=open_bucket, clock=cluster.loop.time)
