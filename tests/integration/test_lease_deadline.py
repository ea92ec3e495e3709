"""From when a lease's time counts: the server's begins after ours, however long the answer takes."""

from __future__ import annotations

import itertools

from agentflow.bus import Bus
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.leases.port import MARGIN_SHARE

TTL_S = 30
ANSWER_S = 1_000.0
"""What passes, by the holder's clock, between any two looks at it."""


async def test_a_deadline_counts_from_before_the_send(bus: Bus) -> None:
    ticks = itertools.count(0.0, ANSWER_S)
    looked: list[float] = []

    def clock() -> float:
        looked.append(next(ticks))
        return looked[-1]

    async with JetStreamLeases(bus, "AF_DEADLINES", clock=clock) as leases:
        lease = await leases.acquire("k", b"", TTL_S)
        assert lease is not None
        assert lease.deadline == looked[0] + TTL_S * (1 - MARGIN_SHARE)
        before = len(looked)
        renewed = await leases.renew(lease)
        assert renewed is not None
        assert renewed.deadline == looked[before] + TTL_S * (1 - MARGIN_SHARE)
