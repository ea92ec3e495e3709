"""`agentflow query`, `report` and `tables` as processes, with a projector that answers and without."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import agentflow
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.node import ProjectorNode
from tests import app
from tests.cluster import Cluster
from tests.ran import Ran

COUNT = "SELECT count(*) AS n FROM tasks WHERE state = 'completed'"


class Shell:
    """Runs commands with a cache of their own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.folder = folder
        self._env = {
            "AGENTFLOW_NATS_URL": cluster.url,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PATH": "/bin",
        }

    async def __call__(self, *arguments: str) -> Ran:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agentflow_nodes", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())

    @property
    def cached(self) -> list[Path]:
        return sorted(self.folder.rglob("*.duckdb"))


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Shell:
    return Shell(cluster, tmp_path)


async def work(cluster: Cluster, tasks: int) -> agentflow.Client:
    """Have some tasks and a workflow done."""
    await cluster.leader()
    await cluster.worker()
    client = await cluster.client()
    await add(client, tasks)
    flow = agentflow.Workflow("sums", id="sums")
    first = flow.add(app.add, 1, 2)
    flow.add(app.add, first, 3)
    await (await client.submit_workflow(flow)).result()
    return client


async def add(client: agentflow.Client, tasks: int) -> None:
    for handle in await client.submit_many(app.add, [(n, 1) for n in range(tasks)]):
        await handle.result()


async def test_without_a_projector_the_log_is_read_further_each_time(cluster: Cluster, shell: Shell) -> None:
    client = await work(cluster, 5)
    first = await shell("query", COUNT, "--json")
    assert first.rows == [{"n": 7}], first
    before = shell.cached
    assert len(before) == 1

    await add(client, 3)
    last_seq = (await client.log.identity()).last_seq
    assert (await shell("query", COUNT, "--json", "--at-least", str(last_seq))).rows == [{"n": 10}]
    assert (await shell("query", COUNT, "--json", "--as-of", "1")).rows == [{"n": 0}]
    assert shell.cached == before

    path = shell.folder / "tasks.parquet"
    assert (await shell("query", "FROM tasks", "--parquet", str(path))).status == 0
    count = await shell(
        "query", "SELECT count(*) FROM read_parquet($path)", "--param", f"path={path}", "--csv"
    )
    assert count.out.splitlines()[1] == "10"

    late = await shell("query", COUNT, "--at-least", str(last_seq + 1_000), "--wait-s", "0.5")
    assert (late.status, "did not come within" in late.err) == (4, True), late


async def test_a_projector_answers_what_is_asked(cluster: Cluster, shell: Shell, tmp_path: Path) -> None:
    client = await work(cluster, 5)
    async with ProjectorNode(ProjectorConfig(url=cluster.url, data=tmp_path / "history")):
        last_seq = (await client.log.identity()).last_seq
        asked = await shell("query", COUNT, "--json", "--at-least", str(last_seq))
        assert asked.rows == [{"n": 7}], asked
        assert "completed" in (await shell("query", "SELECT state FROM tasks LIMIT 1")).out

        drawn = await shell("report", "workflow", "sums", "--svg", str(tmp_path / "sums.svg"))
        assert drawn.status == 0, drawn
        assert "add-2" in {each.text for each in ET.parse(tmp_path / "sums.svg").iter()}  # noqa: S314 - ours
        graph = await shell("report", "workflow", "sums", "--mermaid")
        assert "n0 --> n1" in graph.out

        written = await shell("query", "FROM frames", "--parquet", str(tmp_path / "frames.parquet"))
        assert written.status == 0, written
        wrong = await shell("query", "FROM nowhere", "--json")
        assert (wrong.status, "nowhere" in json.loads(wrong.err)["error"]) == (2, True)
        cut = await shell("query", "FROM range(100001)", "--csv")
        assert (cut.status, "cut the answer off after 100000 rows" in cut.err) == (4, True)
    assert [path for path in shell.cached if "cache" in path.parts] == []


async def test_tables_and_reports_are_listed_without_a_server(shell: Shell) -> None:
    tables = await shell("tables", "--json")
    assert {each["name"] for each in json.loads(tables.out)} >= {"tasks", "attempts", "events"}
    assert "Since when it could have been assigned" in (await shell("tables", "queue")).out
    missing = await shell("tables", "nothing")
    assert (missing.status, "there is no table 'nothing'" in missing.err) == (3, True)
    reports = await shell("report", "--json")
    assert len(json.loads(reports.out)) >= 10
