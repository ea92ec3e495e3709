"""Masters compare their folds: one that differs is told by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentflow import wire
from agentflow.domain import digest
from agentflow_nodes.cli.masters import document, look
from agentflow_nodes.master.node import Master
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.node import ProjectorNode
from tests.app import add
from tests.cluster import Cluster
from tests.eventually import eventually

SOON_S = 15.0


def differs_at(master: Master) -> int:
    difference = master._hashes["default"].difference
    return difference.seq if difference is not None else 0


async def test_a_fold_that_differs_is_an_alarm_of_all_masters(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "EVERY", 2)
    first, second = await cluster.leader(name="first"), await cluster.master(name="second")
    await cluster.worker()
    client = await cluster.client()
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
    await eventually(lambda: "second" in first._hashes["default"]._agreement._agreed)
    client.bus.publish(wire.folds("default"), b"nonsense")
    assert (differs_at(first), differs_at(second)) == (0, 0)

    wrong = second.seats["default"].follower.state
    wrong.superseded += 1
    known_seq = wrong.seq
    assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
    await eventually(lambda: differs_at(first) and differs_at(second))
    assert differs_at(first) == differs_at(second)
    assert known_seq < differs_at(first) <= known_seq + 2, "the first position compared after that"

    async def shown() -> bool:
        seats = [each["seats"][0] for each in document(await look(client.bus, ["default"]))["masters"]]
        return all(seat["differs"] is not None for seat in seats)

    await eventually(shown)
    wrong.superseded -= 1
    assert await (await client.submit(add, 5, 6)).result(SOON_S) == 11
    await eventually(lambda: not differs_at(first) and not differs_at(second))


async def test_a_projector_compares_its_fold_too(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "EVERY", 2)
    master = await cluster.leader(name="first")
    await cluster.worker()
    client = await cluster.client()
    config = ProjectorConfig(url=cluster.url, namespaces=("default",), name="p1", data=tmp_path)
    async with ProjectorNode(config) as node:
        projection = node.projections["default"]
        await projection.opened.wait()
        assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
        await eventually(lambda: "p1" in master._hashes["default"]._agreement._agreed)
        assert projection.projector is not None
        projection.projector.state.superseded += 1
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
        await eventually(lambda: differs_at(master))
        difference = master._hashes["default"].difference
        assert difference is not None
        assert difference.other == "p1"
        await eventually(lambda: projection.hashes is not None and projection.hashes.difference is not None)
