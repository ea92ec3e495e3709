"""`agentflow diff`."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import typer
from rich.text import Text

from agentflow_nodes.cli.errors import not_found
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import DIM, console, duration, plain, print_json, state_text, table
from agentflow_nodes.cli.past import Archive, NoFile, Source, load, open_past
from agentflow_nodes.cli.session import client_logs, now_ms, run, target
from agentflow_projections.compare import Comparison, Pair, Side, compare
from agentflow_projections.history import History
from agentflow_projections.history_rows import WorkflowRow

_NOTICED_MS: Final = 100
"""A task that took so much longer or less is marked."""
_NOTICED_SHARE: Final = 0.2


def diff_command(  # noqa: PLR0913, PLR0917 - options
    first: Annotated[str, typer.Argument(metavar="RUN", help="A workflow's id.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another's.", show_default=False)],
    file: NoFile = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two runs of a workflow, task by task.

    Shown are state, attempts, wait, run time and worker of tasks of the same name. A star marks
    those on the critical path: each was the last that the next one had to wait for.

    For example:

        agentflow diff release-7 release-8
        agentflow diff release-7 release-8 --json | jq .second.critical_path
        agentflow diff release-7 release-8 --file incident.parquet
    """
    source = Source(target(nats, namespace), file, archive)
    main = _diff(source, (first, second), as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _diff(source: Source, runs: tuple[str, str], *, as_json: bool) -> None:
    async with open_past(source, quiet=as_json) as past:
        history = await load(past, keep=runs.__contains__)
    first, second = (_workflow(history, each) for each in runs)
    compared = compare(first, second, now_ms(history) if source.file is None else history.now_ms)
    if as_json:
        print_json(msgspec.to_builtins(compared))
    else:
        _show(compared)


def _workflow(history: History, wanted: str) -> WorkflowRow:
    row = history.workflows.get(wanted)
    if row is None:
        what = "a task, no workflow" if wanted in history.tasks else "no workflow of this namespace"
        raise not_found(f"{wanted!r} is {what}; 'agentflow tasks' lists what there is")
    return row


def _show(compared: Comparison) -> None:
    out = console()
    runs = table(
        "run",
        "name",
        "state",
        "took",
        "waited",
        "ran",
        "attempts",
        right=("took", "waited", "ran", "attempts"),
    )
    for each in (compared.first, compared.second):
        runs.add_row(
            plain(each.id),
            plain(each.name),
            state_text(each.state),
            duration(each.took_ms),
            duration(each.waited_ms),
            duration(each.ran_ms),
            str(each.attempts),
        )
    out.print(runs, Text(), sep="\n")
    tasks = table("task", "state", "attempts", "wait", "run", "worker", "difference", right=("difference",))
    for pair in compared.tasks:
        tasks.add_row(*_row(pair))
    out.print(tasks)
    for each in (compared.first, compared.second):
        if each.critical_path:
            out.print(plain(f"critical path of {each.id}: {' → '.join(each.critical_path)}", DIM))


def _row(pair: Pair) -> list[Text]:
    sides = (pair.first, pair.second)
    critical = any(side is not None and side.critical for side in sides)
    return [
        plain(f"{pair.task}{' *' if critical else ''}"),
        _two([state_text(side.state) if side else Text("—") for side in sides]),
        _two([Text(str(side.attempts)) if side else Text("—") for side in sides]),
        _two([Text(duration(side.wait_ms) or "—") if side else Text("—") for side in sides]),
        _two([Text(duration(side.run_ms) or "—") if side else Text("—") for side in sides]),
        _two([plain(side.worker or "—") if side else Text("—") for side in sides]),
        _difference(pair),
    ]


def _two(texts: list[Text]) -> Text:
    """Both values, or one if they are the same."""
    first, second = texts
    return first if first.plain == second.plain else Text.assemble(first, (" → ", DIM), second)


def _difference(pair: Pair) -> Text:
    more = pair.longer_ms
    if pair.first is None or pair.second is None or abs(more) < 1:
        return Text("")
    noticed = abs(more) >= _NOTICED_MS and abs(more) >= _NOTICED_SHARE * _took_ms(pair.first)
    style = ("red" if more > 0 else "green") if noticed else DIM
    return Text(f"{'+' if more > 0 else '-'}{duration(abs(more))}", style=style)


def _took_ms(side: Side) -> float:
    return (side.wait_ms or 0) + (side.run_ms or 0.0)
