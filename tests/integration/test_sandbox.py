"""What anybody's SQL may not do: read or write files, change anything, take all memory, run for ever."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import duckdb
import pytest

from agentflow.errors import InvalidRequest, OperatingError
from agentflow_projections.query import Question, answer
from agentflow_projections.sandbox import (
    NOBODY,
    DeadlineExceeded,
    Job,
    Limits,
    Overloaded,
    Sandbox,
    locked_down,
)
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
    "FROM duckdb_secrets()",
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
# They take a path for a text like any other, or their arguments are no names of files.
HARMLESS = {"json_each", "json_tree", "test_vector_types", "unnest"}
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
BOMBS = [
    "SELECT len(list_sort(range(100000000)))",
    "SELECT len(repeat('x', 1000000000))",
    "SELECT count(*) FROM range(1000000000000)",
    "SELECT sum(a.range * b.range) FROM range(10000000) AS a, range(10000000) AS b",
    "SELECT count(DISTINCT range) FROM range(1000000000)",
    "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    "SELECT list(range) FROM range(1000000000)",
    "FROM range(100000000) ORDER BY hash(range)",
    "SELECT string_agg(repeat('x', 1000000), '') FROM range(100000)",
]


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
    with duckdb.connect(str(history), read_only=True, config=locked_down(Limits())) as connection:
        yield connection


def rows_of(connection: Any, sql: str) -> list[list[Any]]:
    cursor = connection.cursor()
    try:
        return [row for batch in answer(cursor, Question(sql)).rows() for row in batch]
    finally:
        cursor.close()


async def run(history: Path, sql: str, limits: Limits | None = None) -> list[Any]:
    """The documents that the process answers."""
    sandbox = Sandbox(limits or Limits())
    job = Job(str(history), Question(sql), arrow=False, rows_max=1_000, limits=sandbox.limits)
    deadline = asyncio.get_running_loop().time() + sandbox.limits.deadline_s
    async with aclosing(sandbox.ask(job, deadline)) as frames:
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


def test_no_table_function_opens_a_file(locked: Any, secret: Path) -> None:
    """Every one that DuckDB has, with a path in place of each argument it may have."""
    known = {name for (name,) in rows_of(locked, _FUNCTIONS)}
    assert known >= READERS
    answered, refused = set(), set()
    for name in known:
        for argument in (f"'{secret}'", f"['{secret}']"):
            for count in (1, 2, 3):
                arguments = ", ".join([argument] * count)
                try:
                    found = rows_of(locked, f'FROM "{name}"({arguments})')
                except (InvalidRequest, OperatingError) as error:
                    if "disabled by configuration" in str(error):
                        refused.add(name)
                else:
                    answered.add(name)
                    assert CANARY not in str(found), name
    assert answered - HARMLESS == set()
    assert refused >= READERS


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


_CONFINED = """
import json, os, resource, sys
from agentflow_projections.sandbox import Limits, confine
confine(Limits())
try:
    with open(sys.argv[1], "w") as file:
        file.write("x")
except OSError as error:
    refused = error.strerror
print(json.dumps([os.getuid(), resource.getrlimit(resource.RLIMIT_AS)[1], refused]))
"""


async def test_the_process_has_no_rights_and_little_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CONFINED, f"{folder}/new"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
    user, memory, refused = json.loads(out)
    assert user == (NOBODY if os.getuid() == 0 else os.getuid())
    assert memory == Limits().address_space_mb * 1024 * 1024
    assert refused == os.strerror(errno.EFBIG)


@pytest.mark.parametrize("sql", BOMBS)
async def test_a_bomb_ends_in_time_and_takes_little(history: Path, sql: str) -> None:
    loop = asyncio.get_running_loop()
    limits = Limits(deadline_s=2)
    begun = loop.time()
    try:
        (*_, last) = await run(history, sql, limits)
        assert "memory" in last["error"]["message"].lower()
    except (DeadlineExceeded, OperatingError):
        pass
    assert loop.time() - begun < limits.deadline_s + 1
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < RSS_KB_MAX


async def test_who_waits_too_long_for_a_turn_is_told(history: Path) -> None:
    sandbox = Sandbox(Limits(at_once=1, waiting_max=1))
    deadline = asyncio.get_running_loop().time() + 2
    bomb = Job(str(history), Question(BOMBS[2]), arrow=False, rows_max=1, limits=sandbox.limits)

    async def ask() -> list[Any]:
        async with aclosing(sandbox.ask(bomb, deadline)) as frames:
            return [content async for _, content in frames]

    found = await asyncio.gather(*(ask() for _ in range(4)), return_exceptions=True)
    kinds = [type(each) for each in found]
    assert (kinds.count(DeadlineExceeded), kinds.count(Overloaded)) == (2, 2)
