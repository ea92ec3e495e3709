"""Where a command's questions about history are answered: a file, or the log projected into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from msgspec import Struct
from msgspec.structs import replace

from agentflow.bus import Bus
from agentflow.errors import Disconnected, InvalidRequest, OperatingError
from agentflow_nodes.cli.errors import operating, usage
from agentflow_nodes.cli.past import tell_beginning
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import CLIENT_NAME, Target, open_stores, require_server
from agentflow_projections.asking import Part, ask_service
from agentflow_projections.cache import Refreshed, cache_folder, refresh
from agentflow_projections.queries import Ready
from agentflow_projections.query import Answer, Column, Question, Reader, Row, parse_when, write_parquet_of
from agentflow_projections.sandbox import DeadlineExceeded
from agentflow_projections.service import Request

_PARQUET: Final = b"PAR1"
_PROBE_S: Final = 2.0


class Wanted(Struct, frozen=True):
    """Which history is asked, and as of when."""

    where: Target
    file: Path | None = None
    as_of: str = ""
    at_least: int = 0
    wait_s: float = 30.0
    local: bool = False
    """Read the log here, though a projector could be asked."""
    limit: int = 0
    """So many rows are enough; 0: all."""
    parquet: bool = False
    """The answer goes to a Parquet file: types are to be kept."""
    archive: str | None = None
    """Where what was trimmed from the log is kept."""


class Found(Protocol):
    """An answer."""

    @property
    def columns(self) -> Sequence[Column]:
        """Its columns."""
        ...

    def rows(self) -> AsyncIterator[list[Row]]:
        """Its rows, in batches; once."""
        ...

    async def write_parquet(self, path: Path) -> int:
        """Write them to a file instead; how many they are."""
        ...


class History(Protocol):
    """What answers questions."""

    async def position(self, when: str) -> int:
        """The position that a text names: itself, or the last one at a time. Raises InvalidRequest."""
        ...

    def ask(self, question: Question) -> AbstractAsyncContextManager[Found]:
        """The answer to a question of anybody's."""
        ...

    def report(
        self, ready: Ready, told: dict[str, Any], as_of: int | None
    ) -> AbstractAsyncContextManager[Found]:
        """The answer to a ready-made one."""
        ...


class _FileHistory:
    """A file that nobody writes to."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        with reader.ask(Question("SELECT first_seq FROM checkpoint")) as answer:
            self._known_from: int = next(answer.rows())[0][0]

    async def position(self, when: str) -> int:
        moment = parse_when(when, datetime.now(UTC))
        found = moment if isinstance(moment, int) else self._reader.position_at(moment)
        if self._known_from > 1 and found < self._known_from - 1:
            raise InvalidRequest(f"this history begins with position {self._known_from}, found {when!r}")
        return found

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncGenerator[Found]:
        with self._reader.ask(question) as answer:
            yield _FileFound(answer)

    def report(
        self, ready: Ready, told: dict[str, Any], as_of: int | None
    ) -> AbstractAsyncContextManager[Found]:
        return self.ask(ready.question(told, as_of))


class _FileFound:
    """An answer that DuckDB computes in this process."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.columns = answer.columns

    async def rows(self) -> AsyncIterator[list[Row]]:
        for batch in self._answer.rows():
            yield batch

    async def write_parquet(self, path: Path) -> int:
        return self._answer.write_parquet(path)


class _ServiceHistory:
    """A projector that is asked over NATS."""

    def __init__(self, bus: Bus, wanted: Wanted) -> None:
        self._bus = bus
        self._wanted = wanted

    async def position(self, when: str) -> int:
        async for part in self._parts(Request(as_of=when)):
            assert isinstance(part, dict)
            return int(part["position"])
        raise AssertionError("an answer has a part")

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncGenerator[Found]:
        form: Literal["json", "arrow"] = "arrow" if self._wanted.parquet else "json"
        request = Request(
            sql=question.sql,
            params=dict(question.parameters),
            as_of=question.as_of,
            format=form,
            limit=self._wanted.limit,
        )
        async with aclosing(self._parts(request)) as parts:
            yield await _begun(parts, self._wanted.limit)

    @asynccontextmanager
    async def report(self, ready: Ready, told: dict[str, Any], as_of: int | None) -> AsyncGenerator[Found]:
        request = Request(report=ready.name, params=told, as_of=as_of)
        async with aclosing(self._parts(request)) as parts:
            yield await _begun(parts)

    def _parts(self, request: Request) -> AsyncGenerator[Part, None]:
        asked = replace(request, at_least=self._wanted.at_least)
        return ask_service(self._bus, self._wanted.where.namespace, asked)


async def _begun(parts: AsyncGenerator[Part, None], limit: int = 0) -> Found:
    first = await anext(parts)
    assert isinstance(first, dict)
    return _ServiceFound(first, parts, limit)


class _ServiceFound:
    """An answer that comes in parts."""

    def __init__(self, first: dict[str, Any], parts: AsyncGenerator[Part, None], limit: int) -> None:
        self.columns = [Column(each["name"], each["type"]) for each in first["columns"]]
        self._first = first
        self._parts = parts
        self._limit = limit
        """So many rows were asked for; 0: all."""

    async def _all(self) -> AsyncIterator[Part]:
        yield self._first
        async for part in self._parts:
            yield part

    async def rows(self) -> AsyncIterator[list[Row]]:
        async for part in self._all():
            if isinstance(part, dict):
                yield part.get("rows", [])
                self._require_whole(part)

    async def write_parquet(self, path: Path) -> int:
        data = bytearray()
        async for part in self._all():
            if isinstance(part, bytes):
                data += part
            else:
                self._require_whole(part)
        return write_parquet_of(bytes(data), path)

    def _require_whole(self, part: dict[str, Any]) -> None:
        end = part.get("end", {})
        if end.get("truncated") and end["rows"] != self._limit:
            raise operating(
                f"the projector cut the answer off after {end['rows']} rows:"
                " ask for less, or read the log yourself with --local"
            )


@asynccontextmanager
async def open_history(wanted: Wanted) -> AsyncGenerator[History]:
    """The file named; the projector that answers; or this log's own file, brought up to the log's end."""
    if wanted.file is not None:
        async with _open_file(wanted.file) as reader:
            yield _FileHistory(reader)
        return
    await require_server(wanted.where)
    async with Bus(wanted.where.urls, name=f"agentflow {CLIENT_NAME}") as bus:
        if not wanted.local and await _is_served(bus, wanted.where.namespace):
            await _wait_for(bus, wanted)
            yield _ServiceHistory(bus, wanted)
            return
    kept = await _refreshed(wanted)
    tell_beginning(kept.known_from)
    with Reader(kept.path) as reader:
        yield _FileHistory(reader)


async def _refreshed(wanted: Wanted) -> Refreshed:
    async with open_stores(wanted.where) as (log, objects):
        with bar("Reading the log") as tell:
            return await refresh(
                log,
                objects,
                cache_folder(),
                archive=wanted.archive,
                at_least=wanted.at_least,
                wait_s=wanted.wait_s,
                progress=tell,
            )


@asynccontextmanager
async def _open_file(path: Path) -> AsyncGenerator[Reader]:
    """A history's DuckDB file, or what `agentflow export` wrote. Raises CliError, InvalidRequest."""
    if not _is_exported(path):
        with Reader(path) as reader:
            yield reader
        return
    from agentflow_projections.export import as_database  # noqa: PLC0415 - seldom needed

    async with as_database(path) as database:
        with Reader.of(database) as reader:
            yield reader


def _is_exported(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_PARQUET)) == _PARQUET
    except OSError as error:
        raise usage(f"--file: cannot read {path}: {error.strerror}") from error


async def _wait_for(bus: Bus, wanted: Wanted) -> None:
    """Wait until the projector reaches the position asked for. Raises DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wanted.wait_s
    while wanted.at_least:
        left_s = max(0.0, deadline - loop.time())
        request = Request(at_least=wanted.at_least, timeout_s=min(left_s, _PROBE_S))
        try:
            async with aclosing(ask_service(bus, wanted.where.namespace, request)) as parts:
                await anext(parts)
                return
        except DeadlineExceeded:
            if left_s <= _PROBE_S:
                raise


async def _is_served(bus: Bus, namespace: str) -> bool:
    """Whether a projector answers; one that is there and cannot answer yet does."""
    try:
        async with aclosing(ask_service(bus, namespace, Request(timeout_s=_PROBE_S))) as parts:
            await anext(parts)
    except Disconnected:
        return False
    except OperatingError:
        return True
    return True


async def position_of(wanted: Wanted, history: History) -> int | None:
    """The position that --as-of names; None: now. Raises InvalidRequest."""
    return await history.position(wanted.as_of) if wanted.as_of else None
