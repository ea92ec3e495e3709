"""`agentflow report`: questions that people have, ready to be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from agentflow_nodes.cli.drawing import Bar, gantt_svg, gantt_text, mermaid, plot_svg
from agentflow_nodes.cli.errors import not_found, operating, usage
from agentflow_nodes.cli.history import Wanted, open_history, position_of
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import console, plain, print_json, say, table
from agentflow_nodes.cli.past import Archive
from agentflow_nodes.cli.query import AsOf, AtLeast, File, Local, Wait, print_rows, show_rows
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.queries import Ready, named, ready_made
from agentflow_projections.query import Column, Row

_CURVES: Final = {
    "queue-depth": ("pending", "ready", "running"),
    "throughput": ("submitted", "completed", "failed"),
}
_BARS_MAX: Final = 5_000


class Drawn(msgspec.Struct, frozen=True):
    """How an answer is to be shown, beside as a table."""

    svg: Path | None
    mermaid: bool
    table: bool


def report_command(  # noqa: PLR0913, PLR0917 - options
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Which; without, all are listed.")] = "",
    about: Annotated[
        str, typer.Argument(metavar="[ID]", help="The task or workflow, for the reports task and workflow.")
    ] = "",
    since: Annotated[
        str,
        typer.Option(
            "--since",
            metavar="POSITION|TIME",
            help="Leave out what was before.",
            show_default="the beginning",
        ),
    ] = "",
    buckets: Annotated[
        int | None, typer.Option("--buckets", min=1, max=10_000, help="Points of a curve.", show_default="60")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, max=100_000, help="Rows of the report open.", show_default="100"),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            "--svg", metavar="FILE", help="Draw it: workflow, queue-depth, throughput.", show_default=False
        ),
    ] = None,
    as_mermaid: Annotated[
        bool, typer.Option("--mermaid", help="Print a workflow's graph as Mermaid.")
    ] = False,
    as_table: Annotated[
        bool, typer.Option("--table", help="Print a workflow as a table instead of bars.")
    ] = False,
    as_of: AsOf = "",
    at_least: AtLeast = 0,
    wait_s: Wait = 30.0,
    file: File = None,
    archive: Archive = None,
    local: Local = False,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a ready-made question: what waits, fails, takes long.

    For example:

        agentflow report
        agentflow report workflow release-7 --svg release-7.svg
        agentflow report waits --since -1h
        agentflow report queue-depth --as-of -1d --json
    """
    if not name:
        _list(as_json=as_json)
        return
    ready = named(name)
    drawn = Drawn(svg, as_mermaid, as_table)
    _check(ready, drawn)
    given = {"buckets": buckets, "limit": limit, "since": since or None, ready.name: about or None}
    told = {key: value for key, value in given.items() if value is not None}
    wanted = Wanted(target(nats, namespace), file, as_of, at_least, wait_s, local, archive=archive)
    run(_report(ready, told, wanted, drawn, as_json=as_json), logs=client_logs(debug=debug))


def _list(*, as_json: bool) -> None:
    known = ready_made().values()
    if as_json:
        print_json([{"name": each.name, "summary": each.summary, "sql": each.sql} for each in known])
        return
    made = table("report", "answers")
    for each in known:
        made.add_row(plain(each.name), plain(each.summary))
    console().print(made)


def _check(ready: Ready, drawn: Drawn) -> None:
    if drawn.svg is not None and ready.name not in {"workflow", *_CURVES}:
        raise usage(f"--svg: expected one of workflow, {', '.join(_CURVES)}, found {ready.name}")
    if drawn.mermaid and ready.name != "workflow":
        raise usage(f"--mermaid: expected the report workflow, found {ready.name}")


async def _report(ready: Ready, told: dict[str, Any], wanted: Wanted, drawn: Drawn, *, as_json: bool) -> None:
    async with open_history(wanted) as history:
        if "since" in told:
            told["since"] = await history.position(told["since"])
        as_of = await position_of(wanted, history)
        async with history.report(ready, told, as_of) as answer:
            columns, rows = answer.columns, [row async for batch in answer.rows() for row in batch]
    if not rows and ready.name in {"task", "workflow"}:
        raise not_found(f"there is no {ready.name} {told.get(ready.name, '')!r} in this history")
    if as_json:
        print_rows(columns, rows)
    else:
        _show(ready, f"{ready.name} {told.get(ready.name, '')}".strip(), columns, rows, drawn)


def _show(ready: Ready, title: str, columns: Sequence[Column], rows: Sequence[Row], drawn: Drawn) -> None:
    by_name = [dict(zip((column.name for column in columns), row, strict=True)) for row in rows]
    if drawn.svg is not None:
        _write(drawn.svg, _svg(ready, title, by_name))
    elif drawn.mermaid:
        edges = [(needed, row["name"]) for row in by_name for needed in row["depends_on"] or ()]
        print_text(mermaid([(row["name"], row["state"]) for row in by_name], edges))
    elif ready.name == "workflow" and not drawn.table:
        out = console()
        for line in gantt_text(bars_of(by_name), min(out.width, 120)):
            out.print(line, no_wrap=True, overflow="ellipsis")
    else:
        show_rows(columns, rows)


def print_text(text: str) -> None:
    """A picture in words, as it is."""
    console().print(plain(text, lines=True), soft_wrap=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise operating(f"cannot write {path}: {error}") from error
    say(f"drawn in {path}")


def _svg(ready: Ready, title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if ready.name == "workflow":
        return gantt_svg(bars_of(rows[:_BARS_MAX]), title)
    times = [_ms(row.get("from_time") or row["until_time"]) for row in rows]
    step = (times[-1] - times[0]) / max(1, len(times) - 1) if times else 0
    curves = {curve: [float(row[curve]) for row in rows] for curve in _CURVES[ready.name]}
    return plot_svg(curves, step * len(times), title)


def bars_of(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The rows of the report `workflow` as bars; what is open ends where the last that is known ends."""
    moments = [_ms(row[name]) for row in rows for name in _MOMENTS if row[name] is not None]
    begin, end = min(moments, default=0.0), max(moments, default=0.0)
    return [_bar(row, begin, end) for row in rows]


_MOMENTS: Final = ("submitted_at", "ready_at", "started_at", "ended_at")


def _bar(row: Mapping[str, Any], begin: float, end: float) -> Bar:
    ended = _ms(row["ended_at"]) if row["ended_at"] else end
    ready = _ms(row["ready_at"]) if row["ready_at"] else ended
    started = _ms(row["started_at"]) if row["started_at"] else ended
    # The start is told by the worker's clock, which may be another.
    started = min(max(started, ready), ended)
    return Bar(row["name"], row["state"], min(ready, ended) - begin, started - begin, ended - begin)


def _ms(moment: str) -> float:
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() * 1000
