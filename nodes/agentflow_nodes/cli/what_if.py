"""`agentflow what-if`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from rich.text import Text

from agentflow.checks import STRATEGIES, priority_of
from agentflow.domain.recording import Figures
from agentflow.domain.simulate import Change
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, duration, moment, plain, print_json, table
from agentflow_nodes.cli.past import Archive, Begin, End, NoFile, Source, open_past, parse_until
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.requests import parse_priority
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.past import Until
from agentflow_projections.whatif import WhatIf, what_if

_FACTOR_MAX: Final = 1_000.0
_WORKERS_MAX: Final = 1_000

T = TypeVar("T")


def what_if_command(  # noqa: PLR0913, PLR0917 - options
    begin: Begin = None,
    until: End = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help=f"Another strategy: {', '.join(STRATEGIES)}.")
    ] = "",
    workers: Annotated[
        int, typer.Option("--workers", metavar="+N|-N", help="So many workers more, or fewer.")
    ] = 0,
    priority: Annotated[
        list[str] | None,
        typer.Option(
            "--priority",
            metavar="WHAT=PRIORITY",
            help="Another priority; WHAT is a function, a task, a workflow or *; repeatable.",
            show_default=False,
        ),
    ] = None,
    durations: Annotated[
        list[str] | None,
        typer.Option(
            "--durations",
            metavar="[WHAT=]FACTOR",
            help="Runs take so many times as long; repeatable.",
            show_default=False,
        ),
    ] = None,
    file: NoFile = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a stretch of history happen again under another policy.

    Time is simulated. Three columns: what happened; what the simulation makes of it with nothing changed, which tells
    how far to trust it; and what it makes of it with the change. Nothing is written anywhere.

    For example:

        agentflow what-if --workers +2
        agentflow what-if --from -1h --strategy bin_packing
        agentflow what-if --priority report.build=urgent --durations report.build=0.5 --json
    """
    if strategy and strategy not in STRATEGIES:
        raise usage(f"--strategy: expected one of {', '.join(STRATEGIES)}; found {strategy!r}")
    if abs(workers) > _WORKERS_MAX:
        raise usage(f"--workers: expected -{_WORKERS_MAX} to +{_WORKERS_MAX}; found {workers}")
    change = Change(
        strategy=strategy,
        workers=workers,
        priorities=tuple(_pair("--priority", each, _priority) for each in priority or ()),
        durations=tuple(_pair("--durations", each, _factor, otherwise="*") for each in durations or ()),
    )
    stretch = parse_until("--from", begin), parse_until("--to", until)
    source = Source(target(nats, namespace), file, archive)
    main = _what_if(source, change, stretch, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


def _pair(option: str, text: str, parse: Callable[[str], T | None], otherwise: str = "") -> tuple[str, T]:
    """WHAT=VALUE, or VALUE alone for what is named `otherwise`. Raises CliError."""
    what, _, value = text.rpartition("=")
    found = parse(value)
    if found is None or not (what or otherwise):
        raise usage(f"{option}: expected a name, '=' and a value, for example app.build=2; found {text!r}")
    return what or otherwise, found


def _priority(text: str) -> int:
    return priority_of(parse_priority(text))


def _factor(text: str) -> float | None:
    try:
        factor = float(text)
    except ValueError:
        return None
    return factor if 0 <= factor <= _FACTOR_MAX else None


async def _what_if(source: Source, change: Change, stretch: tuple[Until, Until], *, as_json: bool) -> None:
    async with open_past(source, quiet=as_json) as past:
        with bar("Simulating") as tell:
            found = await what_if(past, change, begin=stretch[0], until=stretch[1], progress=tell)
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        _show(found)


def _show(found: WhatIf) -> None:
    out = console()
    head = f"from position {found.basis + 1} to {found.last_seq}, beginning {moment(found.begin_ms)}"
    out.print(Text(head, style=DIM), Text(), sep="\n")
    columns = ("happened", "simulated", "otherwise")
    made = table("", *columns, right=columns)
    sides = (found.happened, found.simulated, found.otherwise)
    for name, show in _LINES:
        made.add_row(name, *(show(each) for each in sides))
    for state in sorted({state for each in sides for state in each.ended}):
        made.add_row(state, *(str(each.ended.get(state, 0)) for each in sides))
    priorities = sorted({number for each in sides for number in each.wait_ms_by_priority}, reverse=True)
    for number in priorities if len(priorities) > 1 else []:
        shown = (duration(each.wait_ms_by_priority.get(number)) for each in sides)
        made.add_row(f"wait, priority {number}", *shown)
    out.print(made, Text(), Text("assumed:", style=DIM), sep="\n")
    for each in found.assumptions:
        out.print(plain(f"  {each}", DIM))
    if found.estimated:
        out.print(Text(f"  {found.estimated} runs are of a length that is not known", style="yellow"))


_LINES: Final[tuple[tuple[str, Callable[[Figures], Any]], ...]] = (
    ("took", lambda each: duration(each.took_ms)),
    ("wait, mean", lambda each: duration(each.wait_ms_mean)),
    ("wait, half of them below", lambda each: duration(each.wait_ms_p50)),
    ("wait, 95 % below", lambda each: duration(each.wait_ms_p95)),
    ("wait, longest", lambda each: duration(each.wait_ms_max)),
    ("slots in use", lambda each: f"{each.utilisation:.1%}"),
    ("still open", lambda each: str(each.open)),
)
