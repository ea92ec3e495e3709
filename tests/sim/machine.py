"""One machine for many simulated processes: what they would ask theirs comes from the seed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from agentflow import wire
from agentflow.frames import Judged, judge
from agentflow.leases import memory
from agentflow.locks import contender, keeper, service
from agentflow_nodes.master import follower, seat
from tests.sim import worker
from tests.sim.cluster import Cluster


@contextmanager
def one_machine(cluster: Cluster) -> Generator[None]:
    """What nodes ask of their machine, and chance, come from the seed; what they read is judged once.

    What a message says depends on nothing but the message. `check` judges all of them again.
    """
    host = SimpleNamespace(gethostname=lambda: "simulated")
    process = SimpleNamespace(getpid=lambda: 1)
    shared = _shared_judge()
    chance = cluster.chance("locks")
    secrets = SimpleNamespace(token_hex=lambda size: f"{chance.getrandbits(8 * size):0{2 * size}x}")
    with (
        mock.patch.object(seat, "socket", host),
        mock.patch.object(seat, "os", process),
        mock.patch.object(follower, "judge", shared),
        mock.patch.object(worker, "judge", shared),
        ExitStack() as stack,
    ):
        for module in (contender, keeper, service):
            stack.enter_context(mock.patch.object(module, "random", chance))
        for module in (contender, memory):
            stack.enter_context(mock.patch.object(module, "secrets", secrets))
        yield


def _shared_judge() -> Callable[..., Judged]:
    known: dict[tuple[Any, ...], Judged] = {}

    def shared(subject: str, data: bytes, headers: Mapping[str, str] | None) -> Judged:
        decision, version = (headers or {}).get(wire.DECISION), (headers or {}).get(wire.VERSION)
        key = (subject, data, decision, version)
        judged = known.get(key)
        if judged is None:
            judged = known[key] = judge(subject, data, headers)
        return judged

    return shared
