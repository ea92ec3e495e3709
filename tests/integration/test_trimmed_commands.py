"""Commands on a log that was trimmed: what is open is shown, what ended is in the archive, and people are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentflow.bus import Bus
from agentflow.events import WorkflowSubmitted, WorkflowTask
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame
from agentflow.objects import ObjectStore
from agentflow_nodes.cli import main
from agentflow_nodes.cli.errors import Exit
from agentflow_projections.archive import Archive
from agentflow_projections.archiver import Archiver, Keep
from tests.ran import Ran
from tests.servers import NatsServer
from tests.unit.given import (
    NAMESPACE,
    Logged,
    Scene,
    acquired,
    assigned,
    completed,
    elected,
    given,
    joined,
    lost,
    quarantined,
    released,
    says,
    started,
    submitted,
)

LARGE = "x" * 3_000


class Trimmed:
    """A log of which the first part was trimmed, and commands that read it."""

    def __init__(self, url: str, log: JetStreamLog, bus: Bus, folder: Path, capsys: Any) -> None:
        self.url = url
        self._log = log
        self._bus = bus
        self.archive = str(folder)
        self._capsys = capsys
        self.scene = Scene()

    async def write(self, messages: Sequence[Logged]) -> None:
        for each in messages:
            frame = Frame(each.subject, each.data, f"t.{each.seq}", each.headers)
            assert isinstance(await self._log.append(frame), Done)

    async def trim(self) -> int:
        last = (await self._log.identity()).last_seq
        archive, objects = Archive(Path(self.archive), NAMESPACE), ObjectStore(self._bus, NAMESPACE)
        async with Archiver(self._log, archive, objects, keep=Keep(age_s=0, young_s=0)) as archiver:
            await archiver.run(until=last)
        assert (await self._log.identity()).trimmed_seq == last
        return last

    async def ask(self, *arguments: str) -> Ran:
        """Run a command in a thread, as it would run alone."""
        self._capsys.readouterr()
        where = ("--nats", self.url, "--namespace", NAMESPACE)
        status = await asyncio.to_thread(self._run, [*arguments, *where])
        return Ran(status, *self._capsys.readouterr())

    @staticmethod
    def _run(arguments: Sequence[str]) -> int:
        try:
            main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)


@pytest.fixture
async def trimmed(
    nats_server: NatsServer,
    bus: Bus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Trimmed]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AGENTFLOW_ARCHIVE", raising=False)
    async with JetStreamLog(bus, NAMESPACE) as log:
        made = Trimmed(nats_server.url, log, bus, tmp_path / "archive", capsys)
        tasks = [
            WorkflowTask(task_id="a", shell="make"),
            WorkflowTask(task_id="b", argv=["x"], dependencies=["a"]),
        ]
        scene = given(elected(level=2), joined("w1", slots=4), joined("w2"))
        scene.given(says(WorkflowSubmitted(id="f", name="Release", tasks=tasks)))
        scene.given(submitted("done"), assigned("done"), completed("done", result=b"7"))
        scene.given(submitted("waits", title="Waits", needs=None, priority=700, args=[1]))
        scene.given(submitted("large", title="Large", args=[LARGE]))
        scene.given(assigned("f/a"), completed("f/a", result=b'"made"'), assigned("f/b"))
        scene.given(submitted("killer", args=["x"]), assigned("killer", to="w2"), started("killer"))
        scene.given(acquired("stock", 5, metadata={"for": "count"}), acquired("till", 6))
        await made.write(scene.messages)
        made.scene = scene
        last = await made.trim()
        scene.given(
            lost("w2"), quarantined("killer"), completed("f/b"), released("stock", 5), submitted("late")
        )
        await made.write(scene.messages[last:])
        yield made


async def test_lists_show_what_is_open_and_say_from_where_on_they_know(trimmed: Trimmed) -> None:
    tasks = await trimmed.ask("tasks", "--json")
    shown = {row["id"]: (row["state"], row["title"]) for row in tasks.rows}
    assert shown == {
        "f/a": ("completed", ""),
        "f/b": ("completed", ""),
        "waits": ("ready", ""),
        "large": ("ready", "Large"),
        "killer": ("failed", ""),
        "late": ("ready", ""),
    }
    assert {row["known_from"] for row in tasks.rows} == {18}
    assert tasks.err == ""
    told = await trimmed.ask("tasks")
    assert "from position 18 on" in told.err
    (one,) = (await trimmed.ask("task", "f/a", "--json")).rows
    assert (one["result"], one["workflow"]) == ("made", "f")
    (flow,) = (await trimmed.ask("workflow", "f", "--json")).rows
    assert (flow["state"], flow["counts"]) == ("completed", {"completed": 2})
    (queue,) = (await trimmed.ask("queue", "--json")).rows
    assert [each["id"] for each in queue["next"]] == ["waits", "large", "late"]
    workers = (await trimmed.ask("workers", "--json")).rows
    assert [(row["name"], row["state"], row["completed"]) for row in workers] == [
        ("w1", "active", 3),
        ("w2", "offline", 0),
    ]


async def test_what_ended_before_is_named_and_found_in_the_archive(trimmed: Trimmed) -> None:
    gone = await trimmed.ask("task", "done")
    assert gone.status == Exit.NOT_FOUND
    assert "'done' is completed since position 7.0, which was trimmed: --archive DIR has it" in gone.err
    archive = ("--archive", trimmed.archive, "--json")
    (found,) = (await trimmed.ask("task", "done", *archive)).rows
    assert (found["result"], found["known_from"]) == (7, 1)
    whole = await trimmed.ask("tasks", *archive)
    assert {row["id"]: row["title"] for row in whole.rows}["waits"] == "Waits"
    assert len(whole.rows) == 7
    (flow,) = (await trimmed.ask("workflow", "f", *archive)).rows
    assert flow["name"] == "Release"
    nowhere = await trimmed.ask("tasks", "--archive", "/nowhere")
    assert (nowhere.status, "there is no folder /nowhere" in nowhere.err) == (Exit.USAGE, True)


async def test_events_and_locks_begin_where_the_log_begins_or_with_the_archive(trimmed: Trimmed) -> None:
    late = await trimmed.ask("events", "--after", "0", "--limit", "0", "--json")
    assert [row["seq"] for row in late.rows] == [18, 19, 20, 21, 22]
    assert "begins at position 18" in (await trimmed.ask("events")).err
    whole = await trimmed.ask(
        "events", "--after", "0", "--limit", "0", "--json", "--archive", trimmed.archive
    )
    assert [row["seq"] for row in whole.rows] == list(range(1, 23))
    first = await trimmed.ask("events", "--follow", "--after", "3", "--limit", "1", "--json")
    assert first.rows[0]["seq"] == 18

    def told(ran: Ran) -> list[Any]:
        return [[row[name] for name in ("lock", "what", "token", "detail")] for row in ran.rows]

    held = await trimmed.ask("locks", "--history", "--json")
    assert told(held) == [
        ["stock", "acquired", 5, "for=count"],
        ["till", "acquired", 6, ""],
        ["stock", "released", 5, ""],
    ]
    assert [row["seq"] for row in held.rows] == [None, None, 21]
    assert held.rows[-1]["held_ms"] is not None
    archived = await trimmed.ask("locks", "--history", "--json", "--archive", trimmed.archive)
    assert told(archived) == told(held)
    assert [row["seq"] for row in archived.rows] == [16, 17, 21]


async def test_queries_begin_with_the_snapshot_or_with_the_archive(trimmed: Trimmed) -> None:
    count = "SELECT count(*) AS n, count(*) FILTER (state = 'ready') AS ready FROM tasks"
    late = await trimmed.ask("query", count, "--json")
    assert (late.rows, "from position 18 on" in late.err) == ([{"n": 6, "ready": 3}], True)
    whole = await trimmed.ask("query", count, "--json", "--archive", trimmed.archive)
    assert (whole.rows, whole.err) == ([{"n": 7, "ready": 3}], "")
    replayed = [await trimmed.ask("replay", "--json", *more) for more in ((), ("--archive", trimmed.archive))]
    assert replayed[0].rows[0]["hash"] == replayed[1].rows[0]["hash"]
    assert [each.rows[0]["first_seq"] for each in replayed] == [18, 1]
    for more in ((), ("--archive", trimmed.archive), ()):
        (verified,) = (await trimmed.ask("replay", "--verify", "--json", *more)).rows
        assert (verified["same"], verified["seq"]) == (True, 22)


async def test_runs_are_compared_out_of_a_file_without_a_server(trimmed: Trimmed, tmp_path: Path) -> None:
    for number, more in enumerate(((), ("--archive", trimmed.archive))):
        path = str(tmp_path / f"incident-{number}.parquet")
        written = await trimmed.ask("export", path, "--json", *more)
        assert written.rows[0]["basis"] == (0 if more else 17)
        url, trimmed.url = trimmed.url, "nats://127.0.0.1:1"
        (found,) = (await trimmed.ask("diff", "f", "f", "--file", path, "--json")).rows
        trimmed.url = url
        assert (found["first"]["tasks"], found["first"]["state"]) == (2, "completed")
        assert (found["first"]["took_ms"] is None) is not bool(more)
        assert found["first"] == found["second"]
        assert "completed" in (await trimmed.ask("diff", "f", "f", "--file", path)).out
    gone = await trimmed.ask("why", "done", "--json")
    assert gone.status == Exit.NOT_FOUND
    assert json.loads(gone.err)["error"].startswith(
        "'done' is completed, but no task of which this history tells"
    )
    known = await trimmed.ask("why", "done", "--json", "--archive", trimmed.archive)
    assert known.rows[0]["state"] == "completed"


async def test_a_task_given_up_is_handed_over_again_though_its_submission_was_trimmed(
    trimmed: Trimmed,
) -> None:
    (given_up,) = (await trimmed.ask("quarantine", "--json")).rows
    assert (given_up["id"], given_up["workers_lost"]) == ("killer", ["w2"])
    (shown,) = (await trimmed.ask("quarantine", "show", "killer", "--json")).rows
    assert (shown["submission"]["function"], shown["submission"]["args"]) == ("app.work", ["x"])
    (again,) = (await trimmed.ask("quarantine", "requeue", "killer", "--json")).rows
    (new,) = (await trimmed.ask("task", again["requeued_as"], "--json")).rows
    assert (new["title"], new["runs"]["what"]) == ("(requeued from killer)", "app.work")

    await trimmed.trim()
    gone = await trimmed.ask("quarantine", "requeue", "killer")
    assert (gone.status, "which was trimmed: --archive DIR has it" in gone.err) == (Exit.NOT_FOUND, True)
    (again,) = (
        await trimmed.ask("quarantine", "requeue", "killer", "--json", "--archive", trimmed.archive)
    ).rows
    assert again["id"] == "killer"
