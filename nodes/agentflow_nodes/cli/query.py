"""`agentflow query`: any question in SQL."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct
from rich.text import Text

from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.history import Found, Wanted, open_history, position_of
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, STYLES, console, encode_json, plain, say, table
from agentflow_nodes.cli.past import Archive
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.query import Column, Question, Row

_SHOWN_MAX: Final = 1_000
_NUMBERS: Final = ("INT", "DOUBLE", "FLOAT", "DECIMAL")
_STATE_COLUMNS: Final = frozenset({"state", "outcome"})

File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="Ask a history's DuckDB file, or an exported one, instead of the log.",
        show_default=False,
    ),
]
AsOf = Annotated[
    str,
    typer.Option(
        "--as-of",
        metavar="POSITION|TIME",
        help="Answer as of a position, or a time: 2026-11-21T17:00 (UTC), or -15m (s, m, h, d ago).",
        show_default="now",
    ),
]
AtLeast = Annotated[
    int,
    typer.Option(
        "--at-least",
        metavar="POSITION",
        min=0,
        help="Wait until the history reaches this position.",
        show_default=False,
    ),
]
Local = Annotated[bool, typer.Option("--local", help="Read the log here, though a projector could be asked.")]
Wait = Annotated[float, typer.Option("--wait-s", min=0, help="Seconds to wait for --at-least.")]


def query_command(  # noqa: PLR0913, PLR0917 - options
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="One SELECT (or FROM, DESCRIBE, SUMMARIZE); -: from stdin.")
    ],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="A value for $NAME in the SQL; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_of: AsOf = "",
    at_least: AtLeast = 0,
    wait_s: Wait = 30.0,
    file: File = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    parquet: Annotated[
        Path | None,
        typer.Option(
            "--parquet", metavar="FILE", help="Write a Parquet file instead of printing.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=0, help="At most so many rows; 0: all.", show_default="1000 in a table, else all"
        ),
    ] = None,
    archive: Archive = None,
    local: Local = False,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask the history in SQL, as of now or any time.

    A projector answers, if one follows the namespace; its answers are limited. Without one, or with
    --local, the log is read into a DuckDB file of your own, further each time; what was trimmed from the log
    comes from the --archive. `agentflow tables` says what there is to ask. With --json each row is an object on a line of its own. A value given
    with --param is a number, true, false or null if it looks like one, else text.

    For example:

        agentflow query 'SELECT state, count(*) FROM tasks GROUP BY state'
        agentflow query 'FROM queue' --as-of -15m
        agentflow query 'FROM attempts WHERE task = $id' --param id=release-7 --json
    """
    if as_json + as_csv + (parquet is not None) > 1:
        raise usage("expected one of --json, --csv and --parquet, found several")
    if parquet is not None and limit is not None:
        raise usage("--limit: a Parquet file gets all rows; say LIMIT in the SQL")
    table_rows = 0 if as_json or as_csv or parquet is not None else _SHOWN_MAX + 1
    enough = (limit + 1 if table_rows and limit else limit) if limit is not None else table_rows
    where = target(nats, namespace)
    wanted = Wanted(where, file, as_of, at_least, wait_s, local, enough, parquet is not None, archive)
    text = sys.stdin.read() if sql == "-" else sql
    shown = Shown(as_json, as_csv, parquet, limit)
    run(_query(wanted, text, parse_parameters(parameter or []), shown), logs=client_logs(debug=debug))


class Shown(Struct, frozen=True):
    """How an answer is to be shown."""

    as_json: bool
    as_csv: bool
    parquet: Path | None
    limit: int | None


async def _query(wanted: Wanted, sql: str, parameters: dict[str, Any], shown: Shown) -> None:
    async with open_history(wanted) as history:
        question = Question(sql, parameters, await position_of(wanted, history))
        async with history.ask(question) as answer:
            await _show(answer, shown)


async def _show(answer: Found, shown: Shown) -> None:
    if shown.parquet is not None:
        written = await answer.write_parquet(shown.parquet)
        say(f"{written} rows in {shown.parquet}")
    elif shown.as_json or shown.as_csv:
        if shown.as_csv:
            print_csv([[column.name for column in answer.columns]])
        async for batch in _first(answer, shown.limit or 0):
            print_rows(answer.columns, batch) if shown.as_json else print_csv(batch)
    else:
        most = _SHOWN_MAX if shown.limit is None else shown.limit
        rows = [row async for batch in _first(answer, most and most + 1) for row in batch]
        show_rows(answer.columns, rows, most)


async def _first(answer: Found, limit: int) -> AsyncIterator[list[Row]]:
    left = limit
    async for batch in answer.rows():
        yield batch[:left] if limit else batch
        left -= len(batch)
        if limit and left <= 0:
            return


def parse_parameters(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, several times, with values as JSON has them, else as text. Raises CliError."""
    found: dict[str, Any] = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not name.isidentifier() or not separator:
            raise usage(f"--param: expected NAME=VALUE, found {each!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if value is None or isinstance(value, int | float | bool) else text


def print_rows(columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Each row as an object, on a line of its own."""
    names = _distinct([column.name for column in columns])
    for row in rows:
        sys.stdout.write(encode_json(dict(zip(names, row, strict=True))) + "\n")


def _distinct(names: Sequence[str]) -> list[str]:
    """An object has each name once; the second of two becomes `name_2`."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        found.append(name if name not in found else next(each for each in numbered if each not in names))
    return found


def print_csv(rows: Iterable[Row]) -> None:
    """Rows as CSV; what is unknown is left empty."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for row in rows:
        writer.writerow([_text(value) if value is not None else None for value in row])


def show_rows(columns: Sequence[Column], rows: Iterable[Row], limit: int = 0) -> None:
    """A table for people, `limit` rows long at most; 0: all."""
    shown = table(*(plain(column.name).plain for column in columns))
    for made, column in zip(shown.columns, columns, strict=True):
        made.justify = "right" if column.type.endswith(_NUMBERS) or "INT" in column.type else "left"
    count = 0
    for count, row in enumerate(rows, 1):
        if limit and count > limit:
            break
        shown.add_row(*(_cell(column, value) for column, value in zip(columns, row, strict=True)))
    console().print(shown)
    if limit and count > limit:
        say(f"only the first {limit} rows are shown; --limit says how many", DIM)
    elif not count:
        say("no rows", DIM)


def _cell(column: Column, value: Any) -> Text:
    if value is None:
        return Text("")
    style = STYLES.get(str(value), "") if column.name in _STATE_COLUMNS else ""
    return plain(_text(value), style)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return encode_json(value) if isinstance(value, dict | list) else str(value)
