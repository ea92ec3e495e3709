"""Masters as processes: started, killed, paused and stopped, and what `agentflow masters` says of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

import pytest

import agentflow
from tests.app import add
from tests.cluster import Cluster, Process, audit
from tests.eventually import eventually

SOON_S = 30.0
NAMESPACES = tuple(f"n{number:02}" for number in range(12))

pytestmark = pytest.mark.timeout(180)


async def call(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    """A command's status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "agentflow_nodes", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "AGENTFLOW_NATS_URL": cluster.url, "COLUMNS": "200"},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def overview(cluster: Cluster, *options: str) -> Any:
    """What `agentflow masters --json` prints."""
    status, out, err = await call(cluster, "masters", "--json", *options)
    assert status == 0, err
    return json.loads(out)


async def led(cluster: Cluster) -> dict[str, list[str]]:
    """What each living master leads."""
    found = await overview(cluster)
    return {
        master["name"]: [seat["namespace"] for seat in master["seats"] if seat["standing"] == "leader"]
        for master in found["masters"]
    }


async def start(cluster: Cluster, name: str, *options: str) -> Process:
    """A master of all the namespaces."""
    served = ("--namespace", ",".join(NAMESPACES))
    return await cluster.process("master", "--name", name, "--lease-ttl-s", "1", *served, *options)


async def even(cluster: Cluster, shares: list[int]) -> dict[str, list[str]]:
    """Wait until each namespace is led, and so many by each master."""

    async def are() -> dict[str, list[str]] | None:
        found = await led(cluster)
        counts = Counter(namespace for names in found.values() for namespace in names)
        fits = sorted(map(len, found.values())) == shares and counts == Counter(NAMESPACES)
        return found if fits else None

    return await eventually(are, within_s=60)


async def test_namespaces_are_shared_out_and_move_when_a_master_dies(cluster: Cluster) -> None:
    processes = {name: await start(cluster, name) for name in ("a", "b", "c")}
    before = await even(cluster, [4, 4, 4])
    await processes["b"].kill()
    after = await even(cluster, [6, 6])
    assert all(set(before[name]) <= set(after[name]) for name in ("a", "c")), "what was led well stays"
    await start(cluster, "d")
    again = await even(cluster, [4, 4, 4])
    assert set(again["d"]) == set(NAMESPACES) - set(again["a"]) - set(again["c"])


async def test_one_told_to_stop_hands_over_without_waiting_for_a_time_to_live(cluster: Cluster) -> None:
    first = await cluster.process("master", "--name", "first", "--lease-ttl-s", "600")
    second = await cluster.process("master", "--name", "second", "--lease-ttl-s", "600")
    client = await cluster.client()
    await cluster.worker()
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
    leader = (await audit(client)).state.leader
    process, other = (first, "second") if leader == "first" else (second, "first")

    async def both() -> bool:
        return len((await overview(cluster))["masters"]) == 2

    await eventually(both)
    process.send(signal.SIGTERM)
    assert await process.ended() == 0
    assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
    assert (await audit(client)).state.leader == other
    assert [master["name"] for master in (await overview(cluster))["masters"]] == [other]


async def test_one_that_was_paused_for_longer_than_its_lease_follows_and_is_asked_again(
    cluster: Cluster,
) -> None:
    paused = await start(cluster, "paused")
    client = await cluster.client(namespace="n03")
    await cluster.worker(namespace="n03")
    assert await (await client.submit(add, 1, 2)).result(SOON_S) == 3
    await start(cluster, "other")
    await even(cluster, [6, 6])
    paused.send(signal.SIGSTOP)

    async def all_taken() -> bool:
        return len((await led(cluster))["other"]) == 12

    await eventually(all_taken, within_s=60)
    paused.send(signal.SIGCONT)
    await even(cluster, [6, 6])
    assert paused.running
    assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7
    found = await audit(client)
    epochs = [logged.decision.epoch for logged in found.events if logged.decision is not None]
    assert epochs == sorted(epochs), "no write of a deposed leader was stored"


async def test_a_name_that_is_taken(cluster: Cluster) -> None:
    first = await cluster.process("master", "--name", "same", "--lease-ttl-s", "1")
    second = await cluster.process("master", "--name", "same", "--lease-ttl-s", "1")

    async def pids() -> list[int]:
        return [master["pid"] for master in (await overview(cluster))["masters"]]

    assert await pids() == [first.pid]
    assert second.running
    first.send(signal.SIGTERM)
    assert await first.ended() == 0

    async def follows() -> bool:
        return await pids() == [second.pid]

    await eventually(follows)


class TestWhatIsSaid:
    async def test_where_there_never_was_a_master(self, cluster: Cluster) -> None:
        status, out, err = await call(cluster, "masters")
        assert (status, out) == (0, "")
        assert "No master lives" in err
        assert await overview(cluster) == {"masters": [], "namespaces": []}

    async def test_of_masters_and_namespaces(self, cluster: Cluster) -> None:
        await cluster.process("master", "--name", "one", "--namespace", "shop", "--namespace", "mail")

        async def leads() -> Any:
            found = await overview(cluster)
            return found if all(each["leader"] == "one" for each in found["namespaces"]) else None

        found = await eventually(leads)
        (master,) = found["masters"]
        assert (master["name"], master["level"], master["pid"] > 0) == ("one", 2, True)
        assert [each["namespace"] for each in found["namespaces"]] == ["mail", "shop"]
        assert found["namespaces"][0]["election"]["epoch"] == 1
        status, out, _ = await call(cluster, "masters", "--namespace", "shop")
        assert status == 0
        assert "one" in out
        assert "leader" in out
        assert "mail" not in out
        status, _, err = await call(cluster, "masters", "--namespace", "nowhere")
        assert status == 3
        assert "nowhere" in err

    async def test_when_nobody_lives_any_more(self, cluster: Cluster) -> None:
        process = await cluster.process("master", "--name", "gone", "--lease-ttl-s", "1")
        client = await cluster.client()

        async def elected() -> bool:
            return (await audit(client)).state.leader == "gone"

        await eventually(elected)
        process.send(signal.SIGTERM)
        await process.ended()
        status, out, err = await call(cluster, "masters")
        assert status == 0
        assert "No master lives" in err
        assert "nobody leads" in out
        assert "last gone" in out
        found = await overview(cluster)
        assert found["namespaces"][0]["leader"] is None
        assert found["namespaces"][0]["election"]["master"] == "gone"

    async def test_when_nobody_may_lead(self, cluster: Cluster) -> None:
        """A log at level 2, and only a master of level 1."""
        new = await cluster.leader(name="new")
        await cluster.process("master", "--name", "old", "--level", "1", "--lease-ttl-s", "1")
        await new.__aexit__(None, None, None)

        async def alone() -> Any:
            found = await overview(cluster)
            return found if [each["name"] for each in found["masters"]] == ["old"] else None

        found = await eventually(alone)
        assert found["namespaces"][0]["leader"] is None
        assert found["masters"][0]["seats"][0]["standing"] == "outdated"

    async def test_how_far_behind_one_is(self, cluster: Cluster) -> None:
        """A master that stands still, with what was submitted meanwhile before it."""
        process = await cluster.process("master", "--name", "slow", "--lease-ttl-s", "60")
        client = await cluster.client()

        async def leads() -> bool:
            return bool((await led(cluster)).get("slow"))

        await eventually(leads)
        process.send(signal.SIGSTOP)
        handles: list[agentflow.Handle[int]] = [await client.submit(add, number, 1) for number in range(5)]
        (seat,) = (await overview(cluster))["masters"][0]["seats"]
        assert seat["lag"] >= len(handles)
        process.send(signal.SIGCONT)

    @pytest.mark.parametrize("options", [("--namespace", "a b"), ("--namespace", "a,"), ("--level", "9")])
    async def test_what_cannot_be_meant(self, cluster: Cluster, options: tuple[str, str]) -> None:
        status, _, err = await call(cluster, "master", *options)
        assert status == 2
        assert options[0] in err
