"""One run: a cluster, a load, faults; then quiet, then the audit."""

from __future__ import annotations

import asyncio
import logging
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from agentflow.ending import end_tasks
from tests.chaos.audit import HASHES, RUN, Audit, Finding, check
from tests.chaos.cluster import Cluster
from tests.chaos.faults import Faults
from tests.chaos.liveness import Liveness
from tests.chaos.nodes import ROOT
from tests.chaos.options import Options
from tests.chaos.record import record
from tests.chaos.schedule import plan

_TELL_EVERY_S: Final = 0.5

Tell = Callable[[str], None]
"""Says what goes on."""


class Result(Struct, frozen=True):
    """What came of a run."""

    seed: int
    violations: int
    """Broken invariants."""
    tasks: int
    faults: int
    faults_by_kind: dict[str, int]
    seconds: dict[str, float]
    coverage: dict[str, int]
    looked: dict[str, int]
    """Rows each invariant looked at."""
    broken: list[Finding]
    memory_mb: int
    """The most this process took."""
    folder: str
    """Where the run was kept; empty if it was not."""
    command: str


async def run(options: Options, keep: Path | None, tell: Tell) -> Result:
    """Run, audit, and say what was found. A run that broke an invariant is kept."""
    parent = keep if keep is not None else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{options.seed}-", dir=parent))
    logging.basicConfig(filename=folder / "campaign.log", level=logging.INFO, force=True)
    seconds, struck = await _suffer(options, folder, tell)
    began = time.monotonic()
    tell("audit")
    findings, coverage = await asyncio.to_thread(_audit, folder)
    seconds["audit"] = round(time.monotonic() - began, 1)
    broken = [finding for finding in findings if finding.violations]
    result = Result(
        seed=options.seed,
        violations=len(broken),
        tasks=coverage["tasks"],
        faults=sum(struck.values()),
        faults_by_kind=dict(sorted(struck.items())),
        seconds=seconds,
        coverage=coverage,
        looked={finding.name: finding.looked for finding in findings},
        broken=broken,
        memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        folder=str(folder) if broken or keep is not None else "",
        command=options.command(),
    )
    if result.folder:
        (folder / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    else:
        _remove(folder)
    return result


async def _suffer(options: Options, folder: Path, tell: Tell) -> tuple[dict[str, float], dict[str, int]]:
    """The run itself; how long its stages took, and the faults by kind."""
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def stage(name: str, following: str) -> None:
        nonlocal began
        seconds[name] = round(time.monotonic() - began, 1)
        began = time.monotonic()
        tell(following)

    tell("start")
    async with Cluster(options, folder) as cluster:
        about = {
            "options": options,
            "canary": cluster.canary,
            "revision": revision(),
            "command": options.command(),
        }
        (folder / RUN).write_bytes(msgspec.json.encode(about))
        await cluster.start_clients()
        stage("start", "faults")
        faults = Faults(cluster, folder)
        telling = asyncio.create_task(_tell_on(cluster, faults, tell))
        try:
            await faults.run(plan(options), time.monotonic())
            stage("faults", "liveness")
            liveness = Liveness(cluster)
            await liveness.check(time.monotonic())
        finally:
            await end_tasks(telling)
        stage("liveness", "record")
        seconds["settled"] = round(liveness.settled_s, 1)
        await record(cluster.watch.client, folder)
        (folder / HASHES).write_bytes(cluster.watch.hashes.tobytes())
        coverage = {"reconnects": cluster.reconnects()}
        (folder / "coverage.json").write_bytes(msgspec.json.encode(coverage))
        stage("record", "end")
    return seconds, dict(faults.struck)


async def _tell_on(cluster: Cluster, faults: Faults, tell: Tell) -> None:
    while True:
        watch = cluster.watch
        tell(
            f"{sum(faults.struck.values())} faults, {watch.elections} elections, leader {watch.leader},"
            f" {watch.last_seq} messages, about {watch.ended} attempts"
        )
        await asyncio.sleep(_TELL_EVERY_S)


def _audit(folder: Path) -> tuple[list[Finding], dict[str, int]]:
    run: dict[str, Any] = msgspec.json.decode((folder / RUN).read_bytes())
    audit = Audit(folder, run["canary"])
    audit.load()
    findings = check(audit.connection)
    return findings, audit.coverage() | msgspec.json.decode((folder / "coverage.json").read_bytes())


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


def revision() -> str:
    """The commit this is, with a plus sign if there is more than that."""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
