"""Questions over NATS: `afq.<namespace>.query` answers any client in any language.

A request is a JSON object, see `Request`. The answer comes to the reply subject in one message
or more, each numbered by the header `Af-Part`. Those with `Af-Form: json` are objects with one
or more of these, those with `Af-Form: arrow` pieces of one Arrow IPC stream:

    columns, position   what the rows are, and how far the history reaches that was asked
    rows                some of the rows
    end                 the last: counts, and whether a limit cut the answer off
    error               the last: kind and message

An answer that is small enough is one message with all of it, so that `nats request` prints it.

SQL is anybody's, so a `Sandbox` runs it on a copy of the file. Ready-made questions are ours:
they are asked on the projector's own connection, and see what it has written a moment ago.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import msgspec
from msgspec import Meta, Struct

from agentflow import wire
from agentflow.bus import Bus, Subscription
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, Disconnected, InvalidRequest
from agentflow.logs import get_logger
from agentflow_projections.copies import Copies, reach_of, remove_orphans
from agentflow_projections.database import Database
from agentflow_projections.queries import named
from agentflow_projections.query import LATEST, Question, answer, parse_when, position_at, position_of
from agentflow_projections.sandbox import (
    CHUNK_BYTES,
    Deadline,
    DeadlineExceeded,
    Job,
    Limits,
    Overloaded,
    Sandbox,
)

_ASKED_MAX: Final = 64
"""So many questions are held at once, whatever they wait for."""
_POLL_S: Final = 0.01
_POLL_S_MAX: Final = 0.1

_log = get_logger(__name__)

T = TypeVar("T")


Position = Annotated[int, Meta(ge=0, le=LATEST)]


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked: `sql`, or the ready-made question `report`, or neither: how far the history reaches."""

    sql: str = ""
    report: str = ""
    params: dict[str, Any] = {}
    """Values for `$name`; bound, never written into the SQL."""
    as_of: Position | str | None = None
    """A position, or a time: 2026-11-21T17:00 (UTC), or -15m."""
    at_least: Position = 0
    """Wait until the history reaches this position."""
    format: Literal["json", "arrow"] = "json"
    limit: Position = 0
    """At most so many rows; 0: as many as the service allows."""
    timeout_s: Annotated[float, Meta(ge=0)] = 10.0
    """Give up after so long; the service allows no more than it is set to."""


class QueryService:
    """Answers questions about one namespace. An async context manager; entered means subscribed.

    `database` is the projector's, or None while it has none open.
    """

    def __init__(
        self, bus: Bus, namespace: str, database: Callable[[], Database | None], limits: Limits | None = None
    ) -> None:
        self.namespace: Final = namespace
        self.limits: Final = limits or Limits()
        self._bus = bus
        self._database = database
        self._sandbox = Sandbox(self.limits)
        self._copies = Copies()
        self._subscription: Subscription | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(remove_orphans)
        subject = wire.service(self.namespace, wire.QUERY_SERVICE)
        self._subscription = await self._bus.subscribe(subject, self._on_message, queue=wire.QUERY_SERVICE)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._subscription is not None:
            self._subscription.end()
        await end_tasks(*self._answering)
        self._copies.close()

    def _on_message(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        del subject, headers
        if not reply:
            return
        out = _Reply(self._bus, reply)
        answering = self._answer(data, out) if len(self._answering) < _ASKED_MAX else self._turn_away(out)
        task = asyncio.create_task(answering, name="query")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    @staticmethod
    async def _turn_away(out: _Reply) -> None:
        with suppress(Disconnected):
            await out.error("overloaded", f"{_ASKED_MAX} questions are being answered or wait")

    async def _answer(self, data: bytes, out: _Reply) -> None:
        try:
            await self._try(data, out)
        except Disconnected:  # whoever asked asks again
            pass
        except (AgentFlowError, OSError) as error:  # OSError: no process, no room for a copy
            with suppress(Disconnected):
                await out.error(_kind(error), str(error))
        except Exception:  # noqa: BLE001 - one question must not end the service
            _log.exception("a query failed", namespace=self.namespace)
            with suppress(Disconnected):
                await out.error("failed", "this is a bug: the service's log says more")

    async def _try(self, data: bytes, out: _Reply) -> None:
        request = _decoded(data)
        deadline = Deadline.after(min(request.timeout_s, self.limits.deadline_s))
        late = f"the history did not reach {request.at_least}"
        database = await deadline.wait_for(self._reaching(request.at_least), late)
        as_of = await asyncio.to_thread(_position, database, request.as_of)
        if request.sql:
            async with self._copies.use(database, max(request.at_least, as_of or 0)) as path:
                await self._ask(request, path, as_of, out, deadline)
        elif request.report:
            await self._report(request, database, as_of, out, deadline)
        else:
            await out.end({"position": as_of if as_of is not None else await reach_of(database), "end": {}})

    async def _reaching(self, at_least: int) -> Database:
        """The database, once it reaches a position."""
        pause_s = _POLL_S
        while True:
            database = self._database()
            if database is not None and (not at_least or await reach_of(database) >= at_least):
                return database
            await asyncio.sleep(pause_s)
            pause_s = min(_POLL_S_MAX, 2 * pause_s)

    async def _ask(
        self, request: Request, path: Path, as_of: int | None, out: _Reply, deadline: Deadline
    ) -> None:
        question = Question(request.sql, request.params, as_of)
        job = Job(str(path), question, request.format == "arrow", self._rows_max(request), self.limits)
        async with aclosing(self._sandbox.ask(job, deadline)) as frames:
            async for letter, content in frames:
                if letter == b"A":
                    await out.arrow(content)
                else:
                    await out.json(content)

    def _rows_max(self, request: Request) -> int:
        return min(request.limit or self.limits.rows_max, self.limits.rows_max)

    async def _report(
        self, request: Request, database: Database, as_of: int | None, out: _Reply, deadline: Deadline
    ) -> None:
        if request.format != "json":
            raise InvalidRequest("format: reports are answered in json; with sql there is arrow too")
        question = named(request.report).question(request.params, as_of)
        cursor = database.cursor()
        asking = asyncio.ensure_future(asyncio.to_thread(_all, cursor, question, self._rows_max(request)))
        try:
            document = await deadline.wait_for(_shielded(asking))
        except (DeadlineExceeded, asyncio.CancelledError):
            while not asking.done():
                cursor.interrupt()
                await asyncio.wait((asking,), timeout=_POLL_S)
            asking.exception()
            raise
        await out.whole(document)


async def _shielded(asking: asyncio.Future[T]) -> T:
    return await asyncio.shield(asking)


def _all(cursor: Any, question: Question, limit: int) -> dict[str, Any]:
    """All rows of a ready-made question, in a thread."""
    try:
        position = position_of(cursor)
        found = answer(cursor, question)
        rows: list[Any] = []
        for batch in found.rows():
            rows += batch
            if len(rows) > limit:
                break
    finally:
        cursor.close()
    end = {"rows": min(limit, len(rows)), "truncated": len(rows) > limit, "position": position}
    return {
        "columns": msgspec.to_builtins(found.columns),
        "position": position,
        "rows": rows[:limit],
        "end": end,
    }


def _decoded(data: bytes) -> Request:
    try:
        request = msgspec.json.decode(data, type=Request)
        msgspec.msgpack.encode(request.params)  # as they are handed on
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise InvalidRequest(f'expected a JSON object like {{"sql": "FROM tasks"}}: {error}') from error
    if request.sql and request.report:
        raise InvalidRequest("expected sql or report, found both")
    return request


def _kind(error: Exception) -> str:
    match error:
        case InvalidRequest():
            return "invalid"
        case Overloaded():
            return "overloaded"
        case DeadlineExceeded():
            return "deadline"
        case _:
            return "failed"


def _position(database: Database, as_of: int | str | None) -> int | None:
    if as_of is None or as_of == "":
        return None
    when = parse_when(str(as_of), datetime.now(UTC))
    if isinstance(when, int):
        return when
    cursor = database.cursor()
    try:
        return position_at(cursor, when)
    finally:
        cursor.close()


class _Reply:
    """Sends the messages of one answer; small pieces together."""

    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject = subject
        self._part = 0
        self._held: dict[str, msgspec.Raw] = {}
        self._held_bytes = 0

    async def json(self, content: bytes) -> None:
        """A JSON object from the sandbox: those that fit go as one message."""
        document = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        if self._held_bytes + len(content) > CHUNK_BYTES or self._held.keys() & document.keys():
            await self._flush()
        self._held |= document
        self._held_bytes += len(content)
        if "end" in document or "error" in document:
            await self._flush()

    async def arrow(self, content: bytes) -> None:
        """A piece of the Arrow stream."""
        await self._flush()
        for start in range(0, len(content), CHUNK_BYTES):
            await self._send(content[start : start + CHUNK_BYTES], "arrow")

    async def end(self, document: Mapping[str, Any]) -> None:
        """An answer in one message."""
        await self._send(msgspec.json.encode(document), "json")

    async def whole(self, document: Mapping[str, Any]) -> None:
        """An answer that is known whole, in pieces."""
        await self._part_of({name: document[name] for name in ("columns", "position")})
        pieces: list[msgspec.Raw] = []
        size = 0
        for row in document["rows"]:
            piece = msgspec.Raw(msgspec.json.encode(row))
            size += len(bytes(piece))
            pieces.append(piece)
            if size > CHUNK_BYTES:
                await self._part_of({"rows": pieces})
                pieces, size = [], 0
        await self._part_of({"rows": pieces})
        await self._part_of({"end": document["end"]})

    async def _part_of(self, document: Mapping[str, Any]) -> None:
        await self.json(msgspec.json.encode(document))

    async def error(self, kind: str, message: str) -> None:
        """Why there is no answer, or no more of it."""
        await self._flush()
        await self.end({"error": {"kind": kind, "message": message}})

    async def _flush(self) -> None:
        held, self._held, self._held_bytes = self._held, {}, 0
        if held:
            await self._send(msgspec.json.encode(held), "json")

    async def _send(self, data: bytes, form: str) -> None:
        headers = {wire.QUERY_PART: str(self._part), wire.QUERY_FORM: form}
        await self._bus.wait_writable()
        self._bus.publish(self._subject, data, headers)
        self._part += 1
