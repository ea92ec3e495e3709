"""`agentflow task` and `agentflow tasks`."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agentflow import ids
from agentflow.domain.life import FINAL, State, WorkflowState
from agentflow.events import TaskCompleted, TaskFailed
from agentflow.frames import judge
from agentflow_nodes.cli.errors import not_found, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import (
    DIM,
    console,
    duration,
    moment,
    plain,
    print_json,
    say,
    state_text,
    table,
)
from agentflow_nodes.cli.past import Archive, load, open_logged
from agentflow_nodes.cli.session import Target, client_logs, now_ms, run, target
from agentflow_projections.history import History, Latest
from agentflow_projections.history_begun import fill
from agentflow_projections.history_rows import Attempt, TaskRow
from agentflow_projections.past import LoggedPast

_LIMIT: Final = 50
_RESULT_SHOWN_MAX: Final = 4_000


def task_command(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="The task's id.", show_default=False)],
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show one task: its state, attempts, output and result.

    A task of a workflow is called <workflow id>/<task_id>.

    For example:

        agentflow task 0197a3c4-6d1e-7cc2-9d3f-0f3c5a2b1e77
        agentflow task release-7/build --json | jq .result
    """
    main = _task(target(nats, namespace), wanted, archive, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _task(where: Target, wanted: str, archive: str | None, *, as_json: bool) -> None:
    wanted_key = ids.workflow_of(wanted) or wanted
    async with open_logged(where, archive, quiet=as_json) as past:
        history = await load(past, keep=lambda key: key == wanted_key)
        row = history.tasks.get(wanted)
        if row is None:
            raise not_found(_unknown(history, wanted))
        await fill(past, [row])
        await complete(past, row)
    if as_json:
        print_json({**task_document(row, now_ms(history)), "known_from": past.known_from})
    else:
        console().print(_described(row, history))


def _unknown(history: History, wanted: str) -> str:
    if wanted in history.workflows:
        return f"{wanted!r} is a workflow: see 'agentflow workflow {wanted}'"
    workflow = history.workflows.get(ids.workflow_of(wanted) or "")
    if workflow is not None:
        some = ", ".join(islice(workflow.tasks, 8))
        return f"workflow {workflow.id!r} has no task {wanted.partition('/')[2]!r}; it has {some}"
    for refused in history.refused:
        if ids.derived(refused.seq, refused.index) == wanted:
            return f"{wanted!r} was rejected: {refused.reason}: {refused.detail}"
    return ended_before(history, wanted) or f"no task is called {wanted!r}; 'agentflow tasks' lists them"


def ended_before(history: History, wanted: str) -> str | None:
    """Of a task or workflow that ended before what the history knows: what is known, and who knows more."""
    key = wanted if history.state.closed.get(wanted) is not None else ids.workflow_of(wanted) or ""
    closed = history.state.closed.get(key)
    if closed is None:
        return None
    kind = "workflow" if isinstance(closed.state, WorkflowState) else "task"
    return (
        f"{key!r} is {closed.state} since position {closed.seq}.{closed.index}, which was trimmed: --archive DIR"
        f" has it, and a projector that followed then ('agentflow report {kind} {key}')"
    )


async def complete(past: LoggedPast, row: TaskRow) -> None:
    """Read the whole outputs and the result, which the history keeps in part."""
    messages = await past.read(attempt.seq for attempt in row.attempts if attempt.seq)
    for attempt in row.attempts:
        message = messages.get(attempt.seq)
        if message is None:
            continue
        event = judge(message.subject, message.data, message.headers).items[attempt.index]
        if isinstance(event, TaskCompleted | TaskFailed) and event.id == row.id:
            attempt.stdout, attempt.stderr = event.stdout, event.stderr
        if isinstance(event, TaskCompleted) and isinstance(event.result, msgspec.Raw):
            row.result = event.result
        if isinstance(event, TaskCompleted):
            row.object = event.object


def tasks_command(  # noqa: PLR0913, PLR0917 - options
    state: Annotated[
        list[str] | None,
        typer.Option("--state", help=f"Only these: {', '.join(State)}; repeatable.", show_default=False),
    ] = None,
    workflow: Annotated[
        str, typer.Option("--workflow", metavar="ID", help="Only tasks of this workflow.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help="The latest so many; 0: all.")] = _LIMIT,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List tasks, the latest last.

    For example:

        agentflow tasks
        agentflow tasks --state failed --state running --limit 0
        agentflow tasks --json | jq -r 'select(.state == "failed") | .id'
    """
    states = frozenset(state or ())
    unknown = states - set(State)
    if unknown:
        raise usage(f"--state: expected {', '.join(State)}; found {', '.join(sorted(unknown))!r}")
    where = target(nats, namespace)
    wanted = Wanted(states, workflow, limit)
    run(_tasks(where, wanted, archive, as_json=as_json), logs=client_logs(debug=debug))


class Wanted(msgspec.Struct, frozen=True):
    """Which tasks are to be listed."""

    states: frozenset[str]
    workflow: str
    limit: int
    """The latest so many; 0: all."""

    def among(self, history: History) -> list[TaskRow]:
        """Those that are."""
        return [
            row
            for row in history.tasks.values()
            if (not self.states or row.state in self.states)
            and (not self.workflow or row.workflow == self.workflow)
        ]


async def _tasks(where: Target, wanted: Wanted, archive: str | None, *, as_json: bool) -> None:
    async with open_logged(where, archive, quiet=as_json) as past:
        keep = (lambda key: key == wanted.workflow) if wanted.workflow else None
        latest = Latest(wanted.states, wanted.limit) if wanted.limit else None
        history = await load(past, keep=keep, latest=latest)
        found = wanted.among(history)
        shown = found[-wanted.limit :]
        await fill(past, shown)
    if as_json:
        for row in shown:
            print_json({**task_document(row, now_ms(history)), "known_from": past.known_from})
        return
    if not shown:
        none = "No tasks yet: 'agentflow submit' hands one over."
        say("No such tasks." if history.state.accepted else none, DIM)
        return
    console().print(task_table(shown, now_ms(history)))
    count = len(found) + history.forgotten
    if len(shown) < count:
        say(f"the latest {len(shown)} of {count}; --limit shows more", DIM)


def task_table(rows: list[TaskRow], now_ms: int, *, inside: bool = False) -> Table:
    """Tasks, one a line; `inside` a workflow by their task_id."""
    made = table("task", "state", "tries", "wait", "run", "worker", "title", right=("tries", "wait", "run"))
    for row in rows:
        made.add_row(
            plain(row.task_id if inside else row.id),
            state_text(row.state),
            attempts_text(row),
            duration(row.wait_ms(now_ms)),
            duration(row.run_ms(now_ms)),
            plain(row.worker),
            plain(row.title or shown_work(row), "" if row.title else DIM),
        )
    return made


def attempts_text(row: TaskRow) -> str:
    """Attempts so far, and how many failures are allowed."""
    count = row.tries
    return f"{count}/{row.attempts_max}" if row.attempts_max > 1 else str(count or "")


def shown_error(row: TaskRow) -> str:
    """Why a task failed; that it is an error goes without saying."""
    return row.error.removeprefix("error: ").replace(f"{row.workflow}/", "" if row.workflow else "/")


def shown_work(row: TaskRow) -> str:
    """What a task runs, on one line."""
    text = row.runs.splitlines()[0] if row.runs else ""
    more = " …" if text != row.runs else ""
    return f"{text}{more}" if row.runs_kind != "function" else f"{text}()"


# One task ----------------------------------------------------------------------------


def _described(row: TaskRow, history: History) -> RenderableType:
    parts: list[RenderableType] = [_headline(row), Padding(_facts(row, history), (0, 0, 0, 2), expand=False)]
    if row.attempts:
        parts += [Text(), Padding(_attempt_table(row, now_ms(history)), (0, 0, 0, 2), expand=False)]
    last = row.attempts[-1] if row.attempts else None
    if last is not None:
        for name, text in (("stdout", last.stdout), ("stderr", last.stderr), ("traceback", last.traceback)):
            parts += output_block(name, text)
    if row.state is State.COMPLETED:
        parts += output_block("result", _result_text(row))
    return Group(*parts)


def _headline(row: TaskRow) -> Text:
    line = Text.assemble(state_text(row.state), "  ", plain(row.id, "bold"))
    if row.title:
        line.append_text(plain(f"  {row.title}"))
    return line


def _facts(row: TaskRow, history: History) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=DIM)
    grid.add_column(overflow="fold")
    now = now_ms(history)
    for name, value in (
        ("runs", f"{row.runs_kind} {shown_work(row)}"),
        ("error", shown_error(row)),
        ("cancel", (row.cancel_reason or "requested") if row.cancel_requested or row.cancel_reason else ""),
        ("why not yet", _why_waiting(row, history)),
        ("depends on", ", ".join(row.dependencies)),
        ("priority", str(row.priority)),
        ("submitted", f"{moment(row.submitted_ms)} by {row.client}, at {row.seq}.{row.index}".lstrip()),
        ("waited", duration(row.wait_ms(now))),
        ("ran", duration(row.run_ms(now))),
    ):
        if value:
            grid.add_row(name, plain(value))
    return grid


def _why_waiting(row: TaskRow, history: History) -> str:
    if row.state is State.PENDING and row.due_ms:
        return f"tried again in {duration(max(0, row.due_ms - now_ms(history)))}"
    if row.state is State.PENDING:
        open_ones = [each for each in row.dependencies if not _is_final(history, row, each)]
        return f"waits for {', '.join(open_ones)}"
    if row.state is State.READY and row.live is not None:
        return why_ready(row, history)
    return ""


def _is_final(history: History, row: TaskRow, dependency: str) -> bool:
    return history.tasks[ids.in_workflow(row.workflow, dependency)].state in FINAL


def why_ready(row: TaskRow, history: History) -> str:
    """Why a ready task is not running."""
    from agentflow.domain.policies import eligible  # noqa: PLC0415 - beside its only use

    assert row.live is not None
    workers = [worker for worker in history.state.workers.values() if not worker.draining]
    if not workers:
        return "no worker is there"
    if not any(eligible(row.live.terms.demand, worker) for worker in workers):
        return "it fits none of the workers: see 'agentflow workers'"
    return "the workers are busy"


def _attempt_table(row: TaskRow, now_ms: int) -> Table:
    made = table("attempt", "outcome", "worker", "began", "took", "error", right=("attempt", "took"))
    for attempt in row.attempts:
        made.add_row(
            str(attempt.number),
            state_text(attempt.outcome or "running"),
            plain(attempt.worker),
            moment(attempt.begun_ms),
            duration(attempt.took_ms(now_ms)),
            plain(": ".join(part for part in (attempt.error, attempt.message) if part)),
        )
    return made


def output_block(name: str, text: str) -> list[RenderableType]:
    """A piece of output under its name; nothing if there is none."""
    if not text.strip():
        return []
    return [
        Text(),
        Text(f"  {name}", style=DIM),
        Padding(plain(text.rstrip("\n"), lines=True), (0, 0, 0, 4), expand=False),
    ]


def _result_text(row: TaskRow) -> str:
    if row.object is not None:
        return f"{row.object.size} bytes in the object store, {row.object.name}"
    if row.result is None:
        return ""
    value = msgspec.json.decode(row.result)
    text = value if isinstance(value, str) else msgspec.json.format(bytes(row.result), indent=2).decode()
    if value is None:
        return ""
    more = len(text) - _RESULT_SHOWN_MAX
    return text if more <= 0 else f"{text[:_RESULT_SHOWN_MAX]}\n… {more} characters more; --json shows all"


# For programs ------------------------------------------------------------------------


def task_document(row: TaskRow, now_ms: int) -> dict[str, Any]:
    """A task as JSON."""
    return {
        "id": row.id,
        "task_id": row.task_id,
        "workflow": row.workflow or None,
        "title": row.title,
        "state": str(row.state),
        "runs": {"kind": row.runs_kind, "what": row.runs},
        "priority": row.priority,
        "dependencies": row.dependencies,
        "client": row.client,
        "position": [row.seq, row.index],
        "submitted_ms": row.submitted_ms or None,
        "ready_ms": row.ready_ms or None,
        "ended_ms": row.ended_ms or None,
        "wait_ms": row.wait_ms(now_ms),
        "run_ms": row.run_ms(now_ms),
        "worker": row.worker or None,
        "error": row.error,
        "cancel_requested": row.cancel_requested,
        "cancel_reason": row.cancel_reason,
        "result": msgspec.json.decode(row.result) if row.result is not None else None,
        "object": msgspec.to_builtins(row.object),
        "tries": row.tries,
        "attempts": [_attempt_document(attempt) for attempt in row.attempts],
    }


def _attempt_document(attempt: Attempt) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(attempt)
    position = [document.pop("seq"), document.pop("index")]
    return {**document, "position": position if attempt.seq else None}
