"""`agentflow replay`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.text import Text

from agentflow_nodes.cli.errors import Exit, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, moment, plain, print_json, table
from agentflow_nodes.cli.past import MOMENT, MOMENT_HELP, Archive, NoFile, Source, open_past, parse_until
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.past import Until
from agentflow_projections.replay import Ask, Replayed, Verified, replay, verify

if TYPE_CHECKING:
    from agentflow_nodes.cli.history import History


def replay_command(  # noqa: PLR0913, PLR0917 - options
    until: Annotated[
        str | None,
        typer.Option("--until", metavar=MOMENT, help=f"Up to {MOMENT_HELP}.", show_default="the end"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare a projection with the log, row by row.")
    ] = False,
    projection: Annotated[
        Path | None,
        typer.Option(
            "--projection",
            metavar="FILE",
            help="A DuckDB file to compare; nobody may be writing to it.",
            show_default="what answers 'agentflow query': a running projector's, or one of your own",
        ),
    ] = None,
    file: NoFile = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the state anew from the log, and compare a projection with it.

    Printed are what was read, what the state holds, and its hash, which is the same for every
    fold of the same log. With --verify all rows are made anew too and compared by hashes; if
    any differs, the first position that does is named, and the exit status is 1.

    For example:

        agentflow replay
        agentflow replay --until -1h --json | jq -r .hash
        agentflow replay --verify --projection history/default.duckdb
        agentflow replay --file incident.parquet
    """
    source, end = Source(target(nats, namespace), file, archive), parse_until("--until", until)
    if projection is not None and not projection.is_file():
        raise usage(f"--projection: there is no file {projection}")
    if verify or projection is not None:
        same = run(_verify(source, end, projection, as_json=as_json), logs=client_logs(debug=debug))
        raise typer.Exit(Exit.OK if same else Exit.FAILED)
    run(_replay(source, end, as_json=as_json), logs=client_logs(debug=debug))


async def _replay(source: Source, until: Until, *, as_json: bool) -> None:
    async with open_past(source, quiet=as_json) as past:
        with bar("Replaying") as tell:
            replayed = await replay(past, until=until, progress=tell)
    if as_json:
        print_json(msgspec.to_builtins(replayed) | {"events_per_s": round(replayed.events_per_s)})
    else:
        _show(replayed)


def _show(replayed: Replayed) -> None:
    out = console()
    head = f"namespace {replayed.namespace}, position {replayed.first_seq} to {replayed.seq}"
    out.print(plain(head).append(f", {moment(replayed.time_ms)}", style=DIM))
    rate = f"{replayed.messages} messages, {replayed.events} events in {replayed.seconds:.2f} s"
    out.print(Text(f"{rate}: {replayed.events_per_s:,.0f} events/s"))
    out.print(Text(", ".join(f"{count} {kind}" for kind, count in replayed.verdicts.items()), style=DIM))
    made = table("the state holds", "", right=("",))
    for name, count in replayed.state.items():
        made.add_row(name, f"{count:,}")
    out.print(Text(), made, Text(), Text(f"hash {replayed.hash}"), sep="\n")


async def _verify(source: Source, until: Until, projection: Path | None, *, as_json: bool) -> bool:
    from agentflow_nodes.cli.history import Wanted, open_history  # noqa: PLC0415 - it loads DuckDB

    # The projection first: the log only ever reaches further.
    wanted = Wanted(source.where, projection, archive=source.archive)
    async with open_history(wanted) as history, open_past(source, quiet=as_json) as past:
        with bar("Replaying") as tell:
            verified = await verify(past, _asking(history), until=until, progress=tell)
    if as_json:
        print_json(msgspec.to_builtins(verified) | {"same": verified.same})
    else:
        _show_verified(verified)
    return verified.same


def _asking(history: History) -> Ask:
    from agentflow_projections.query import Question  # noqa: PLC0415 - it loads DuckDB

    async def ask(query: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        async with history.ask(Question(query, parameters)) as answer:
            return [row async for batch in answer.rows() for row in batch]

    return ask


def _show_verified(verified: Verified) -> None:
    out = console()
    found = {each.table: each for each in verified.differences}
    made = table(
        "table", "rows in the log", "in the projection", "", right=("rows in the log", "in the projection")
    )
    for name in sorted({*verified.tables, *found}):
        expected = verified.tables.get(name, 0)
        other = found.get(name)
        mark = Text("differs", style="red") if other is not None else Text("same", style="green")
        made.add_row(name, f"{expected:,}", f"{other.found_rows if other is not None else expected:,}", mark)
    out.print(made, Text(), sep="\n")
    if verified.differs_at is not None:
        text = f"the projection differs from the log, first at position {verified.differs_at}: delete it, it is made anew"
        out.print(Text(text, style="red"))
    elif verified.chain is False:
        text = "the rows are the same, but not the hash chain over the log: is it another log, or was it altered?"
        out.print(Text(text, style="red"))
    else:
        out.print(Text(f"the same up to position {verified.seq}", style="green"))
