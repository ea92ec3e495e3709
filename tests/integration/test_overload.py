"""A log that is nearly full turns submissions away and still takes outcomes."""

from __future__ import annotations

import asyncio

import pytest

import agentflow
from agentflow_nodes.master import leader
from tests.app import add
from tests.cluster import Cluster
from tests.eventually import eventually

_LOG_BYTES_MAX = 8_000


async def test_a_nearly_full_log_rejects_submissions_and_still_takes_outcomes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "HOUSEKEEPING_S", 0.05)
    await cluster.leader(log_bytes_max=_LOG_BYTES_MAX)
    client = await cluster.client()
    accepted = await client.submit_many(add, [(number, 1) for number in range(100)])
    assert (await client.log.identity()).bytes > _LOG_BYTES_MAX * leader.BYTES_CLOSED_SHARE

    async def rejected() -> agentflow.Outcome | None:
        outcome = await _soon(await client.submit(add, 1, 1))
        return outcome if outcome is not None and outcome.state == "rejected" else None

    outcome = await eventually(rejected)
    assert outcome.error == "overloaded"
    await cluster.worker()
    assert [await handle.result(20) for handle in accepted] == [number + 1 for number in range(100)]


async def test_a_client_that_is_turned_away_slows_down(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "HOUSEKEEPING_S", 0.05)
    await cluster.leader(log_bytes_max=1)
    client = await cluster.client()
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def turned_away() -> bool:
        outcome = await _soon(await client.submit(add, 1, 1))
        return outcome is not None and outcome.state == "rejected"

    await eventually(turned_away)
    monkeypatch.setattr("agentflow.client.waiting.asyncio.sleep", counted)
    await client.submit(add, 1, 1)
    assert max(pauses) > 0


async def _soon(handle: agentflow.Handle[int]) -> agentflow.Outcome | None:
    try:
        return await handle.outcome(0.2)
    except TimeoutError:
        return None
