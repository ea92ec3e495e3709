"""`agentflow why`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from agentflow.domain.explain import Ahead, Candidate, Cause, Placement, Waiting
from agentflow.domain.story import Moment
from agentflow_nodes.cli.errors import CliError, not_found, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import (
    DIM,
    console,
    duration,
    moment,
    plain,
    print_json,
    state_text,
    table,
)
from agentflow_nodes.cli.past import MOMENT, MOMENT_HELP, Archive, NoFile, Source, open_past, parse_until
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.past import Until
from agentflow_projections.why import Answer, why


def why_command(  # noqa: PLR0913, PLR0917 - options
    wanted: Annotated[str, typer.Argument(metavar="TASK", help="The task's id.", show_default=False)],
    at: Annotated[
        str | None,
        typer.Option("--at", metavar=MOMENT, help=f"As it was then: {MOMENT_HELP}.", show_default="now"),
    ] = None,
    file: NoFile = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain why a task waits, and why what happened to it happened.

    Everything is had from the log: each decision names what the leader knew, so that its plan
    can be made again. For each attempt it is told why it went to that worker, and what kept the
    others from it.

    For example:

        agentflow why release-7/build
        agentflow why release-7/build --at -10m
        agentflow why release-7/build --json | jq .waiting.cause
    """
    source = Source(target(nats, namespace), file, archive)
    main = _why(source, wanted, parse_until("--at", at), as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _why(source: Source, wanted: str, until: Until, *, as_json: bool) -> None:
    is_now = until == Until() and source.file is None
    async with open_past(source, quiet=as_json) as past:
        with bar("Reading the log") as tell:
            now_ms = time.time_ns() // 1_000_000 if is_now else None
            answer = await why(past, wanted, until=until, now_ms=now_ms, progress=tell)
    if not answer.moments and not answer.state:
        raise _nothing(answer)
    if as_json:
        print_json(document(answer))
    else:
        console().print(described(answer))


def _nothing(answer: Answer) -> CliError:
    wanted = answer.task
    if answer.workflow:
        some = ", ".join(answer.workflow[:8])
        return usage(f"{wanted!r} is a workflow; name one of its tasks: {some}")
    if answer.known != "unknown":
        return not_found(
            f"{wanted!r} is {answer.known}, but no task of which this history tells;"
            f" a task of a workflow is called {wanted}/TASK"
        )
    return not_found(
        f"no task is called {wanted!r} up to position {answer.seq}; 'agentflow tasks' lists them"
    )


def document(answer: Answer) -> dict[str, Any]:
    """An explanation as JSON."""
    found: dict[str, Any] = msgspec.to_builtins(answer)
    del found["known"], found["workflow"]
    return found


def described(answer: Answer) -> RenderableType:
    """An explanation for people."""
    head = plain(f"{answer.task}  ")
    head.append_text(state_text(answer.state))
    head.append(f"  as of position {answer.seq}, {moment(answer.time_ms)}", style=DIM)
    parts: list[RenderableType] = [head]
    waiting = answer.waiting
    if waiting is not None and waiting.cause is not Cause.NONE:
        parts.append(_waiting(waiting, answer.time_ms))
    parts += [Text(), *_moments(answer.moments)]
    return Group(*parts)


def _waiting(waiting: Waiting, now_ms: int) -> RenderableType:
    lines: list[RenderableType] = [
        Text.assemble(("waits: ", "yellow"), plain(waiting.cause, "bold"), ": ", plain(waiting.text))
    ]
    if waiting.since_ms:
        lines.append(Text(f"ready for {duration(max(0, now_ms - waiting.since_ms))}", style=DIM))
    if waiting.until_ms:
        lines.append(Text(f"until {moment(waiting.until_ms)}", style=DIM))
    if waiting.ahead is not None:
        lines.append(Text(_ahead(waiting.ahead), style=DIM))
    if waiting.candidates:
        lines.append(_candidates(waiting.candidates))
    return Padding(Group(*lines), (0, 0, 0, 2), expand=False)


def _ahead(ahead: Ahead) -> str:
    if not ahead.count:
        return "first in the queue"
    reasons = [
        f"{count} {why_first}"
        for count, why_first in (
            (ahead.priority, "of a higher priority"),
            (ahead.ageing, "of a lower priority that have waited longer"),
            (ahead.earlier, "of the same priority that were there before"),
        )
        if count
    ]
    return (
        f"{ahead.count} before it in the queue: {', '.join(reasons)}; {ahead.alike} of them ask for the same"
    )


def _candidates(candidates: list[Candidate]) -> RenderableType:
    made = table("worker", "slots", "held", "load", "why not", right=("slots", "held", "load"))
    for each in candidates:
        refused = "; ".join(each.refused)
        shown = plain(refused, DIM) if refused else Text("could take it", style="green")
        made.add_row(plain(each.worker), str(each.slots), str(each.held), f"{each.load:.2f}", shown)
    return made


def _moments(moments: list[Moment]) -> Iterator[RenderableType]:
    for each in moments:
        line = Text(f"{moment(each.time_ms)}  {each.seq}.{each.index:<4}", style=DIM)
        line.append_text(Text(f"{each.state:<10}", style=""))
        line.append_text(plain(each.text, "" if each.verdict == "applied" else DIM))
        yield line
        if each.placement is not None:
            yield Padding(_placement(each, each.placement), (0, 0, 0, 4), expand=False)


def _placement(each: Moment, placement: Placement) -> RenderableType:
    assert each.decision is not None
    text = f"{placement.text}; planned on position {each.decision.basis}, {_ahead(placement.ahead)}"
    return Group(plain(text, DIM), _candidates(placement.candidates))
