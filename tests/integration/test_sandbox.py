"""What anybody's SQL may not do: read or write files, change anything, take all memory, run for ever."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from agentflow.errors import InvalidRequest, OperatingError
from agentflow_projections import sandbox
from agentflow_projections.confinement import landlock_version
from agentflow_projections.query import Question, answer
from agentflow_projections.sandbox import (
    PROGRAM,
    Deadline,
    DeadlineExceeded,
    Job,
    Limits,
    Overloaded,
    Sandbox,
)
from agentflow_projections.sandboxed import locked_down
from tests.eventually import eventually
from tests.integration.test_queries import written
from tests.unit.histories import History

CANARY = "canary-4711"
RSS_KB_MAX = 1_258_291
"""1.2 GiB."""

# {file} is a CSV file with the canary in it, {new} a file that is not there.
REFUSED = [
    "FROM read_csv('{file}')",
    "FROM read_csv_auto('{file}')",
    "FROM read_text('{file}')",
    "FROM read_blob('{file}')",
    "FROM read_json('{file}')",
    "FROM read_parquet('{file}')",
    "FROM '{file}'",
    'FROM "{file}"',
    "FROM glob('/*')",
    "FROM sniff_csv('{file}')",
    "FROM parquet_metadata('{file}')",
    "FROM read_text(['{file}'])",
    "FROM query('FROM read_text(''{file}'')')",
    "FROM query_table('{file}')",
    "FROM query_table(['{file}'])",
    "WITH a AS (FROM read_text('{file}')) FROM a",
    "SELECT (SELECT content FROM read_text('{file}'))",
    "FROM (DESCRIBE FROM '{file}')",
    "DESCRIBE FROM '{file}'",
    "SUMMARIZE FROM '{file}'",
    "FROM read_csv('https://example.com/x.csv')",
    "FROM 's3://bucket/x.parquet'",
    "FROM read_duckdb('{file}')",
    "FROM '/proc/self/environ'",
    "FROM read_text('/proc/self/maps')",
    "FROM read_single_csv_file('{file}')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{file}'')'))",
    "FROM duckdb_extensions()",
    "FROM secret_rows",
    "SELECT getenv('HOME')",
    "ATTACH '{new}'",
    "ATTACH '{file}' AS other (READ_ONLY)",
    "ATTACH ':memory:' AS other",
    "DETACH db",
    "USE memory",
    "COPY (SELECT 1) TO '{new}'",
    "COPY frames TO '{new}' (FORMAT parquet)",
    "COPY frames FROM '{file}'",
    "COPY FROM DATABASE db TO memory",
    "EXPORT DATABASE '{new}'",
    "IMPORT DATABASE '{file}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{file}'",
    "FORCE INSTALL spatial FROM community",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET memory_limit = '100GB'",
    "SET threads = 64",
    "SET temp_directory = '/tmp'",
    "SET allowed_directories = ['/']",
    "SET python_enable_replacements = true",
    "SET VARIABLE as_of = 1",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '{new}'",
    "PRAGMA enable_logging",
    "CALL enable_logging(storage = 'file', storage_path = '{new}')",
    "FROM enable_logging(storage = 'file', storage_path = '{new}')",
    "FROM enable_profiling(format = 'json', save_location = '{new}.json')",
    "CALL pragma_version()",
    "CREATE TABLE x (i INTEGER)",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE VIEW x AS SELECT 1",
    "CREATE MACRO x() AS 1",
    "CREATE SECRET x (TYPE http)",
    "CREATE TYPE x AS ENUM ('a')",
    "DROP TABLE frames",
    "ALTER TABLE frames ADD COLUMN x INTEGER",
    "INSERT INTO frames SELECT * FROM frames",
    "UPDATE frames SET kind = 'x'",
    "DELETE FROM frames",
    "TRUNCATE frames",
    "MERGE INTO frames USING frames AS x ON false WHEN NOT MATCHED THEN INSERT VALUES (1)",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE frames",
    "SELECT 1 /* ; */; COPY (SELECT 1) TO '{new}'",
    "COMMENT ON TABLE frames IS 'x'",
    "",
    ";",
    "nonsense",
]
READERS = {
    "read_csv",
    "read_text",
    "read_blob",
    "read_json",
    "read_parquet",
    "glob",
    "sniff_csv",
    "parquet_metadata",
}
_NUMBERS = ",".join(map(str, range(100_000)))
BOMBS = [
    "SELECT len(list_sort(range(100000000)))",
    "SELECT len(repeat('x', 1000000000))",
    "SELECT count(*) FROM range(1000000000000)",
    "FROM range(1000000000000)",
    "SELECT sum(a.range * b.range) FROM range(10000000) AS a, range(10000000) AS b",
    "SELECT count(DISTINCT range) FROM range(1000000000)",
    "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "WITH RECURSIVE t AS (SELECT 'x' AS x UNION ALL SELECT x || x FROM t) SELECT max(len(x)) FROM t",
    "SELECT list(range) FROM range(1000000000)",
    "FROM range(100000000) ORDER BY hash(range)",
    "SELECT string_agg(repeat('x', 1000000), '') FROM range(100000)",
    "SELECT repeat('x', 400000) FROM range(1000000)",
    "SELECT count(*) FROM range(10000000) WHERE regexp_matches(repeat('a', 5000) || range, '(a|aa)+$')",
    "SELECT count(regexp_replace(repeat('a', 100000000) || range, '(a*)*b', 'x', 'g')) FROM range(1000)",
    "SELECT len(printf('%1000000000d', 1))",
    "SELECT len(lpad('x', 2000000000, 'y'))",
    "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
    "SELECT " + "[" * 100_000 + "1" + "]" * 100_000,
    "SELECT count(*) FROM range(1000000000) WHERE range NOT IN (" + _NUMBERS + ")",  # noqa: S608 - ours
    "SELECT 1" + " UNION ALL SELECT 1" * 40_000,
]
# What they may be told; the rest is an answer that says how far it goes.
LIMITS_NAMED = re.compile(
    r"within 2 s|may take \d+ (MiB of memory|s of CPU)|depth limit of \d+|takes more than \d+ bytes"
    r"|2 questions are being answered and 8 wait"
)


@pytest.fixture(scope="module")
def history() -> Iterator[Path]:
    """A copy of a history where nobody may read it; a folder of pytest's own is closed to all others."""
    with tempfile.TemporaryDirectory(prefix="afq-") as folder:
        Path(folder).chmod(0o755)
        yield written(Path(folder) / "db", History(3).run(100))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.csv"
    path.write_text(f"name\n{CANARY}\n")
    return path


@pytest.fixture
def locked(history: Path) -> Iterator[Any]:
    with locked_down(str(history), Limits()) as connection:
        yield connection


def rows_of(connection: Any, sql: str) -> list[list[Any]]:
    cursor = connection.cursor()
    try:
        return [row for batch in answer(cursor, Question(sql)).rows() for row in batch]
    finally:
        cursor.close()


async def run(history: Path, sql: str, limits: Limits | None = None) -> list[Any]:
    """The documents that the process answers."""
    asked = Sandbox(limits or Limits())
    job = Job(str(history), Question(sql), arrow=False, rows_max=1_000, limits=asked.limits)
    deadline = Deadline.after(asked.limits.deadline_s)
    async with aclosing(asked.ask(job, deadline)) as frames:
        return [json.loads(content) async for _, content in frames]


@pytest.mark.parametrize("sql", REFUSED)
def test_it_is_refused(locked: Any, secret: Path, tmp_path: Path, sql: str) -> None:
    new = tmp_path / "new"
    with pytest.raises(InvalidRequest):
        rows_of(locked, sql.format(file=secret, new=new))
    assert list(tmp_path.iterdir()) == [secret]


def test_without_the_locks_it_would_not_be(history: Path, secret: Path) -> None:
    with duckdb.connect(str(history), read_only=True) as connection:
        assert CANARY in str(rows_of(connection, f"FROM read_text('{secret}')"))
        assert CANARY in str(rows_of(connection, f"FROM '{secret}'"))


def test_no_table_function_opens_a_file(locked: Any, secret: Path, tmp_path: Path) -> None:
    """Every one that DuckDB has, with a path in place of each argument it may have.

    One that opens files answers differently, without the locks, when the file is not there.
    """
    missing = tmp_path / "nowhere" / secret.name
    with duckdb.connect() as free:
        known = [name for (name,) in rows_of(free, _FUNCTIONS)]
        openers = {name for name in known if _said(free, name, secret) != _said(free, name, missing)}
    assert openers >= READERS
    for name in known:
        said = _said(locked, name, secret)
        assert said == _said(locked, name, missing), name
        assert CANARY not in said
        assert ("disabled by configuration" in said) == (name in openers), name


def _said(connection: Any, function: str, path: Path) -> str:
    """What comes of calling a function with a path, rows and errors, whatever the path is called."""
    said: list[object] = []
    for argument in (f"'{path}'", f"['{path}']"):
        for count in (1, 2, 3):
            arguments = ", ".join([argument] * count)
            try:
                said.append(rows_of(connection, f'FROM "{function}"({arguments})'))
            except (InvalidRequest, OperatingError) as error:
                said.append(error)
    return str(said).replace(str(path.parent), "")


_FUNCTIONS = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = 'table'"


def test_no_table_function_without_arguments_tells_of_other_files(locked: Any, history: Path) -> None:
    for (name,) in rows_of(locked, _FUNCTIONS):
        try:
            found = str(rows_of(locked, f'FROM "{name}"()'))
        except (InvalidRequest, OperatingError):
            continue
        assert str(history.parent) not in found.replace(str(history), ""), name


def test_the_file_is_as_it_was(locked: Any, history: Path, secret: Path) -> None:
    before = history.read_bytes()
    for sql in REFUSED:
        with pytest.raises(InvalidRequest):
            rows_of(locked, sql.format(file=secret, new=history))
    assert history.read_bytes() == before


async def test_an_honest_question_is_answered(history: Path) -> None:
    first, *_, last = await run(history, "SELECT count(*) AS n FROM frames")
    assert first["columns"] == [{"name": "n", "type": "BIGINT"}]
    assert last["end"]["rows"] == 1


async def test_the_process_sees_nothing_of_ours(
    history: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTFLOW_SECRET", CANARY)
    (refused,) = await run(history, f"FROM read_text('{secret}')")
    assert refused["error"]["kind"] == "invalid"
    shown = json.dumps(await run(history, "FROM duckdb_settings()"))
    assert CANARY not in shown
    assert str(Path.home()) not in shown


# As whom, and by which way in: the rights of root, a namespace of one's own, or neither of them.
_CONFINED = """
import ctypes, errno, json, os, resource, socket, sys
from pathlib import Path
from agentflow_projections.confinement import confine, cut_off, filter_system_calls
user, alone, folder, outside = int(sys.argv[1]), sys.argv[2] == "alone", Path(sys.argv[3]), sys.argv[4]
if user:
    os.setgroups([]), os.setgid(user), os.setuid(user)
if alone:
    cut_off()
else:
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
    filter_system_calls()
confine(folder, address_space_mb=1024, cpu_s=5)

def refused(attempt, *arguments):
    try:
        return attempt(*arguments) and None
    except OSError as error:
        return errno.errorcode[error.errno]

print(json.dumps({
    "user": os.getuid(),
    "memory": resource.getrlimit(resource.RLIMIT_AS)[1] >> 20,
    "reads": Path("db").read_text(),
    "writes": refused(open, "db", "r+"),
    "creates": refused(open, "new", "w"),
    "elsewhere": refused(open, outside),
    "calls": refused(socket.socket),
    "calls_here": refused(socket.socket, socket.AF_UNIX),
    "pairs": refused(socket.socketpair),
    "forks": refused(os.fork),
    "runs": refused(os.execv, sys.executable, [sys.executable]),
    "kills": refused(os.kill, os.getppid(), 0),
}))
"""


@pytest.mark.parametrize(("user", "alone"), [(0, "alone"), (4711, "alone"), (4711, "not alone")])
async def test_the_process_can_do_nothing_but_read(user: int, alone: str) -> None:
    if os.getuid() != 0:
        user = 0  # it stays who it is
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "db").write_text("history")
        outside = Path(folder).with_suffix(".outside")
        outside.write_text(CANARY)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CONFINED, str(user), alone, folder, str(outside)),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        outside.unlink()
    found = json.loads(out)
    assert found.pop("user") != 0
    assert found.pop("reads") == "history"
    assert found.pop("memory") == Limits().address_space_mb
    kept_in = found.pop("elsewhere")
    assert kept_in or (alone == "not alone" and landlock_version() < 1)
    assert all(found.values()), found


_AS_ANYBODY = """
import os, sys
import agentflow_projections.sandboxed
os.setgroups([]), os.setgid(4711), os.setuid(4711)
"""


async def test_it_answers_also_who_is_not_root(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        monkeypatch.setattr(sandbox, "PROGRAM", _AS_ANYBODY + PROGRAM)
    (*_, last) = await run(history, "SELECT count(*) AS n FROM frames")
    assert last["end"]["rows"] == 1


async def test_bombs_end_in_time_take_little_and_are_told_why(history: Path) -> None:
    left = BOMBS.copy()

    async def explode() -> None:
        while left:
            await _require_told(history, left.pop())

    await asyncio.gather(*(explode() for _ in range(4)))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < RSS_KB_MAX


async def _require_told(history: Path, sql: str) -> None:
    loop = asyncio.get_running_loop()
    limits, begun = Limits(deadline_s=2), loop.time()
    try:
        (*_, last) = await run(history, sql, limits)
        said = "" if last.get("end", {}).get("truncated") else last["error"]["message"]
    except OperatingError as error:
        said = str(error)
    assert loop.time() - begun < limits.deadline_s + 1, sql[:80]
    assert not said or LIMITS_NAMED.search(said), (sql[:80], said)


_ASKER = """
import asyncio, sys
from contextlib import aclosing
from agentflow_projections.query import Question
from agentflow_projections.sandbox import Deadline, Job, Limits, Sandbox

async def ask():
    limits = Limits(deadline_s=60)
    job = Job(sys.argv[1], Question(sys.argv[2]), arrow=False, rows_max=1, limits=limits)
    async with aclosing(Sandbox(limits).ask(job, Deadline.after(60))) as frames:
        async for _ in frames:
            print("asked", flush=True)

asyncio.run(ask())
"""


async def test_the_process_dies_with_who_started_it(history: Path) -> None:
    asker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _ASKER, str(history), "SELECT count(*) FROM range(1000000000000)"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert asker.stdout is not None
    assert await asker.stdout.readline() == b"asked\n", "the columns are told before the rows are counted"
    (answering,) = psutil.Process(asker.pid).children()
    asker.kill()
    await asker.wait()
    await eventually(lambda: not answering.is_running() or answering.status() == psutil.STATUS_ZOMBIE)


async def test_who_waits_too_long_for_a_turn_is_told(history: Path) -> None:
    asked = Sandbox(Limits(at_once=1, waiting_max=1))
    deadline = Deadline.after(2)
    bomb = Job(str(history), Question(BOMBS[2]), arrow=False, rows_max=1, limits=asked.limits)

    async def ask() -> list[Any]:
        async with aclosing(asked.ask(bomb, deadline)) as frames:
            return [content async for _, content in frames]

    found = await asyncio.gather(*(ask() for _ in range(4)), return_exceptions=True)
    kinds = [type(each) for each in found]
    assert (kinds.count(DeadlineExceeded), kinds.count(Overloaded)) == (2, 2)
