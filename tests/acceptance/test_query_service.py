"""Questions over NATS, as any client may ask them: a real server, a real file, processes that answer."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import Disconnected, InvalidRequest, OperatingError
from agentflow_projections.asking import ask_service
from agentflow_projections.database import Database
from agentflow_projections.sandbox import DeadlineExceeded, Limits, Overloaded
from agentflow_projections.service import QueryService, Request
from tests.eventually import eventually
from tests.integration.test_projector import World
from tests.integration.test_projector_faults import following, has_all
from tests.integration.test_queries import written
from tests.integration.test_sandbox import BOMBS, LIMITS_NAMED
from tests.unit.given import NAMESPACE
from tests.unit.histories import History

SUBJECT = f"afq.{NAMESPACE}.query"
LAST_SEQ = 300
FOR_EVER = "SELECT count(*) FROM range(1000000000000)"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    return written(folder / "history.duckdb", History(3).run(400)[:LAST_SEQ])


@pytest.fixture
def database(history: Path) -> Iterator[Database]:
    """A history's file, open for writing as a projector has it."""
    with Database(history, NAMESPACE) as opened:
        yield opened


@pytest.fixture
async def service(bus: Bus, database: Database) -> AsyncIterator[QueryService]:
    async with QueryService(bus, NAMESPACE, lambda: database) as answering:
        yield answering


async def ask(bus: Bus, **request: Any) -> dict[str, Any]:
    """A whole answer: all rows, and the rest of all parts."""
    found: dict[str, Any] = {"rows": [], "parts": 0, "arrow": b""}
    async for part in ask_service(bus, NAMESPACE, Request(**request)):
        found["parts"] += 1
        if isinstance(part, bytes):
            found["arrow"] += part
        else:
            found["rows"] += part.pop("rows", [])
            found |= part
    return found


async def test_a_small_answer_is_one_message_for_any_client(bus: Bus, service: QueryService) -> None:
    request = json.dumps({"sql": "SELECT count(*) AS n FROM frames WHERE seq <= $s", "params": {"s": 5}})
    reply = await bus.request_reply(SUBJECT, request.encode(), 10)
    answer = json.loads(reply.data)
    assert answer["columns"] == [{"name": "n", "type": "BIGINT"}]
    assert answer["rows"] == [[5]]
    assert (answer["end"]["rows"], answer["end"]["truncated"]) == (1, False)
    assert answer["position"] == answer["end"]["position"] == LAST_SEQ


async def test_a_large_answer_comes_in_numbered_parts(bus: Bus, service: QueryService) -> None:
    found = await ask(bus, sql="SELECT range AS n, repeat('x', 100) AS x FROM range(20000)")
    assert [row[0] for row in found["rows"]] == list(range(20_000))
    assert found["parts"] > 5
    assert found["end"]["rows"] == 20_000
    assert not found["end"]["truncated"]


async def test_rows_in_arrow_are_one_stream(bus: Bus, service: QueryService) -> None:
    found = await ask(bus, sql="SELECT seq, logged_at, kind FROM frames ORDER BY seq", format="arrow")
    table = pa.ipc.open_stream(found["arrow"]).read_all()
    assert table.column("seq").to_pylist() == list(range(1, LAST_SEQ + 1))
    assert table.schema.field("logged_at").type == pa.timestamp("ms")
    assert found["end"]["rows"] == LAST_SEQ


@pytest.mark.parametrize("form", ["json", "arrow"])
async def test_a_limit_cuts_the_answer_off_and_says_so(bus: Bus, service: QueryService, form: str) -> None:
    found = await ask(bus, sql="FROM range(10000)", limit=7, format=form)
    rows = found["rows"] if form == "json" else pa.ipc.open_stream(found["arrow"]).read_all().to_pylist()
    assert len(rows) == found["end"]["rows"] == 7
    assert found["end"]["truncated"]


async def test_as_many_rows_as_the_limit_are_whole(bus: Bus, service: QueryService) -> None:
    found = await ask(bus, sql="FROM range(7)", limit=7)
    assert (len(found["rows"]), found["end"]["truncated"]) == (7, False)


async def test_bytes_are_limited_too(bus: Bus, database: Database) -> None:
    async with QueryService(bus, NAMESPACE, lambda: database, Limits(bytes_max=1_000_000)):
        found = await ask(bus, sql="SELECT repeat('x', 1000) FROM range(100000)")
    assert found["end"]["truncated"]
    assert 0 < len(found["rows"]) < 1_100
    assert found["end"]["rows"] == len(found["rows"])


async def test_it_answers_as_of_a_position_or_a_time(bus: Bus, service: QueryService) -> None:
    found = await ask(bus, sql="SELECT max(seq) FROM events", as_of=100)
    assert found["rows"] == [[100]]
    ((moment, last),) = (
        await ask(
            bus,
            sql="SELECT logged_at, max(seq) FROM frames WHERE logged_at < (SELECT max(logged_at) FROM frames) GROUP BY 1 ORDER BY 1 DESC LIMIT 1",
        )
    )["rows"]
    assert (await ask(bus, sql="SELECT max(seq) FROM events", as_of=moment))["rows"] == [[last]]
    assert (await ask(bus, as_of=moment))["position"] == last


async def test_ready_made_questions_are_answered_by_name(bus: Bus, service: QueryService) -> None:
    found = await ask(bus, report="throughput", params={"buckets": 5})
    assert len(found["rows"]) == found["end"]["rows"] == 5
    assert found["columns"][0]["name"] == "from_time"


async def test_who_wrote_reads_what_they_wrote(bus: Bus, tmp_path: Path, database: Database) -> None:
    with Database(tmp_path / "empty.duckdb", NAMESPACE) as before:
        now = before
        async with QueryService(bus, NAMESPACE, lambda: now):
            assert (await ask(bus, sql="SELECT count(*) FROM frames"))["rows"] == [[0]]
            asked = asyncio.ensure_future(ask(bus, sql="SELECT max(seq) FROM frames", at_least=LAST_SEQ))
            with pytest.raises(DeadlineExceeded, match=f"did not reach {LAST_SEQ} within"):
                await ask(bus, sql="SELECT 1", at_least=LAST_SEQ, timeout_s=0.3)
            now = database
            assert (await asked)["rows"] == [[LAST_SEQ]]


WRONG = [
    (b"", "expected a JSON object"),
    (b"[]", "expected a JSON object"),
    (b'{"sql": 5}', "expected a JSON object"),
    (b'{"sql": "SELECT 1", "nonsense": true}', "expected a JSON object"),
    (b'{"sql": "SELECT 1", "report": "waits"}', "found both"),
    (b'{"sql": "SELECT 1", "limit": -1}', "Expected `int` >= 0 - at `$.limit`"),
    (b'{"sql": "SELECT 1", "at_least": 100000000000000000000000}', "`$.at_least`"),
    (b'{"sql": "SELECT $a", "params": {"a": 100000000000000000000000}}', "expected a JSON object"),
    (b'{"sql": "SELECT $a", "params": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "recursion"),
    (b'{"report": "nothing"}', "there is no report"),
    (b'{"report": "waits", "format": "arrow"}', "with sql there is arrow too"),
    (b'{"sql": "DROP TABLE frames"}', "found DROP"),
    (b'{"sql": "FROM tasks", "as_of": 100000}', "reaches to position"),
    (b'{"sql": "FROM tasks", "as_of": "soon"}', "expected a position, a time"),
    (b'{"sql": "FROM read_text(\'/etc/passwd\')"}', "disabled by configuration"),
]


async def test_what_is_wrong_is_said(bus: Bus, service: QueryService) -> None:
    for request, found in WRONG:
        reply = await bus.request_reply(SUBJECT, request, 10)
        error = json.loads(reply.data)["error"]
        assert (error["kind"], found in error["message"]) == ("invalid", True), error


async def test_who_asks_nobody_is_told(bus: Bus) -> None:
    with pytest.raises(Disconnected, match="no query service answers"):
        await ask(bus, sql="SELECT 1")


async def test_too_many_at_once_are_turned_away(bus: Bus, database: Database) -> None:
    limits = Limits(at_once=1, waiting_max=2, deadline_s=3)
    async with QueryService(bus, NAMESPACE, lambda: database, limits):
        found = await asyncio.gather(*(ask(bus, sql=FOR_EVER) for _ in range(8)), return_exceptions=True)
    kinds = [type(each) for each in found]
    assert kinds.count(Overloaded) == 5
    assert kinds.count(DeadlineExceeded) == 3


async def test_no_more_wait_for_a_position_than_can_be_held(bus: Bus, service: QueryService) -> None:
    waiting = [ask(bus, at_least=LAST_SEQ + 1, timeout_s=1) for _ in range(70)]
    kinds = [type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)]
    assert (kinds.count(DeadlineExceeded), kinds.count(Overloaded)) == (64, 6)


async def test_the_copy_that_is_asked_is_removed_in_the_end(bus: Bus, database: Database) -> None:
    async with (
        QueryService(bus, NAMESPACE, lambda: database) as asked,
        asked._copies.use(database, 0) as path,
    ):
        assert path.exists()
        assert database.path != path
    assert not path.exists()


async def test_whoever_asks_does_not_learn_where_the_file_is(bus: Bus, service: QueryService) -> None:
    everything = await ask(bus, sql="SELECT path FROM duckdb_databases() WHERE path IS NOT NULL")
    settings = await ask(bus, sql="FROM duckdb_settings()")
    assert everything["rows"] == [["/db"]]
    assert tempfile.gettempdir() not in str(settings)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that other users can enter, as the system's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


async def test_twenty_bombs_at_once_stop_neither_questions_nor_the_projector(
    bus: Bus, tmp_path: Path, copies: Path
) -> None:
    world, children = World(tmp_path), psutil.Process().children(recursive=True)
    world.store(20)
    async with following(world) as (projection, _):
        await projection.opened.wait()
        async with QueryService(bus, NAMESPACE, lambda: projection.database, Limits(deadline_s=2)):
            bombs = asyncio.gather(*(ask(bus, sql=sql) for sql in BOMBS), return_exceptions=True)
            while world.later:
                world.store(20)
                await has_all(projection, world)
                assert not bombs.done()
            sane = await eventually(partial(_asked, bus, "SELECT max(seq) FROM frames", world.seqs[-1]))
            told = [each for each in await bombs if isinstance(each, Exception)]
    assert sane["rows"] == [[world.seqs[-1]]]
    assert len(BOMBS) == 20
    assert [type(each) for each in told].count(Overloaded) == 10
    assert [str(each) for each in told if not LIMITS_NAMED.search(str(each))] == []
    assert psutil.Process().children(recursive=True) == children
    assert list(copies.iterdir()) == []


async def _asked(bus: Bus, sql: str, at_least: int) -> dict[str, Any] | None:
    """An answer, or None if it has to be asked again."""
    try:
        return await ask(bus, sql=sql, at_least=at_least)
    except (Overloaded, DeadlineExceeded):
        return None


async def test_the_copies_of_who_was_killed_are_removed(
    bus: Bus, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, other = tmp_path / "agentflow-query-left", tmp_path / "something-else"
    for folder in (left, other):
        folder.mkdir()
        (folder / "db").touch()
    async with (
        QueryService(bus, NAMESPACE, lambda: database) as first,
        first._copies.use(database, 0) as path,
    ):
        assert not left.exists()
        async with QueryService(bus, "other", lambda: database):
            assert path.exists()
    assert list(tmp_path.iterdir()) == [other]


async def test_a_question_that_is_too_large_for_a_message_is_an_error(
    bus: Bus, service: QueryService
) -> None:
    with pytest.raises((InvalidRequest, OperatingError)):
        await ask(bus, sql="SELECT repeat('x', 2000000)")
    assert (await ask(bus, sql="SELECT 1"))["rows"] == [[1]]


def test_the_subject_is_the_one_documented() -> None:
    assert wire.service(NAMESPACE, wire.QUERY_SERVICE) == SUBJECT


async def test_where_no_copy_can_be_made_who_asks_is_told_why(
    bus: Bus, service: QueryService, copies: Path
) -> None:
    copies.rename(copies.with_suffix(".away"))
    try:
        with pytest.raises(OperatingError, match="No such file or directory"):
            await ask(bus, sql="SELECT 1")
    finally:
        copies.with_suffix(".away").rename(copies)
    assert (await ask(bus, sql="SELECT 1"))["rows"] == [[1]]
