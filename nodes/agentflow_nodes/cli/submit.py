"""`agentflow submit`: handing over a task or a workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Group

import agentflow
from agentflow.client.outcome import Outcome
from agentflow.events import Needs, Retry, TaskSubmitted
from agentflow_nodes.cli.errors import CliError, Exit, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats, parse_labels
from agentflow_nodes.cli.output import console, print_json, print_lines, say
from agentflow_nodes.cli.past import load
from agentflow_nodes.cli.requests import parse_priority
from agentflow_nodes.cli.session import Target, client_logs, open_client, run, target
from agentflow_nodes.cli.summary import FAILURES_MAX, failure
from agentflow_nodes.cli.tasks import complete
from agentflow_projections.past import LoggedPast

_WHAT = "What to run"
_HOW = "How"
_NEEDS = "What it needs"
_WITH_FILE: Final = {"words", "task_id", "wait", "nats", "namespace", "as_json", "debug"}
"""Options that go with a workflow file."""


def submit_command(  # noqa: PLR0913, PLR0917 - options
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE | -- PROGRAM ARG", help="A workflow file, or a program.", show_default=False
        ),
    ] = None,
    shell: Annotated[
        str, typer.Option("--shell", metavar="SCRIPT", help="A script for /bin/sh -e.", rich_help_panel=_WHAT)
    ] = "",
    function: Annotated[
        str,
        typer.Option(
            "--function", metavar="NAME", help="A function of a worker's app.", rich_help_panel=_WHAT
        ),
    ] = "",
    args: Annotated[
        str, typer.Option("--args", metavar="JSON", help="Its arguments, an array.", rich_help_panel=_WHAT)
    ] = "[]",
    kwargs: Annotated[
        str, typer.Option("--kwargs", metavar="JSON", help="Its keyword arguments.", rich_help_panel=_WHAT)
    ] = "{}",
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="Environment of a script or program; repeatable.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    cwd: Annotated[
        str,
        typer.Option(
            "--cwd", metavar="FOLDER", help="Where a script or program runs.", rich_help_panel=_WHAT
        ),
    ] = "",
    task_id: Annotated[
        str,
        typer.Option(
            "--id", help="Its id; the same id twice is one task, or one workflow.", rich_help_panel=_HOW
        ),
    ] = "",
    title: Annotated[str, typer.Option("--title", help="What people call it.", rich_help_panel=_HOW)] = "",
    priority: Annotated[
        str, typer.Option("--priority", help="urgent, high, medium, low, or 0 to 1000.", rich_help_panel=_HOW)
    ] = "medium",
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.0, help="Longest run; 0: no limit.", rich_help_panel=_HOW
        ),
    ] = 0.0,
    queue_timeout_s: Annotated[
        float,
        typer.Option(
            "--queue-timeout",
            metavar="SECONDS",
            min=0.0,
            help="Longest wait; 0: no limit.",
            rich_help_panel=_HOW,
        ),
    ] = 0.0,
    retries: Annotated[
        int,
        typer.Option(
            "--retries", min=0, max=999, help="Further attempts after a failed one.", rich_help_panel=_HOW
        ),
    ] = 0,
    lock: Annotated[
        str,
        typer.Option(
            "--lock", metavar="NAME", help="A lock that is held while it runs.", rich_help_panel=_HOW
        ),
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for its end and print the result.", rich_help_panel=_HOW)
    ] = False,
    cpu: Annotated[float, typer.Option("--needs-cpu", min=0.0, help="Cores.", rich_help_panel=_NEEDS)] = 0.0,
    memory_mb: Annotated[
        int, typer.Option("--needs-memory-mb", min=0, help="Memory, MiB.", rich_help_panel=_NEEDS)
    ] = 0,
    gpus: Annotated[int, typer.Option("--needs-gpus", min=0, help="GPUs.", rich_help_panel=_NEEDS)] = 0,
    group: Annotated[
        str, typer.Option("--needs-group", help="A worker of this group.", rich_help_panel=_NEEDS)
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--needs-label",
            metavar="KEY=VALUE",
            help="A worker with this label; repeatable.",
            show_default=False,
            rich_help_panel=_NEEDS,
        ),
    ] = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hand over a task or a workflow.

    Prints its id once it is safely in the log. With --wait it waits for the end, prints the
    result (of a workflow: a JSON object of its tasks' results) and exits with 0 if it
    completed, 1 if it did not, 5 if it was rejected.

    For example:

        agentflow submit --shell 'echo hello' --wait
        agentflow submit --priority high --timeout 60 -- convert in.png out.jpg
        agentflow submit --function shop.tasks.charge --args '["order-1"]' --retries 4
        agentflow submit release.yaml --id release-8 --wait
    """
    where = target(nats, namespace)
    given = words or []
    if _is_file(given, shell, function):
        _check_options_of_file(context)
        workflow = agentflow.load_workflow(given[0])
        main = _submit_workflow(where, workflow, task_id, wait=wait, as_json=as_json)
        run(main, logs=client_logs(debug=debug))
        return
    needs = Needs(cpu=cpu, memory_mb=memory_mb, gpus=gpus, group=group, labels=parse_labels(label or []))
    event = TaskSubmitted(
        **_what(shell, function, given, args, kwargs),
        id=task_id,
        title=title,
        env=_parse_env(env or []),
        cwd=cwd,
        priority=parse_priority(priority),
        timeout_s=timeout_s,
        queue_timeout_s=queue_timeout_s,
        retry=Retry(max_attempts=retries + 1) if retries else None,
        needs=needs if needs != Needs() else None,
        lock=lock,
    )
    run(_submit_task(where, event, wait=wait, as_json=as_json), logs=client_logs(debug=debug))


def _is_file(words: list[str], shell: str, function: str) -> bool:
    """Whether the words name a workflow file, rather than a program."""
    if len(words) != 1 or shell or function:
        return False
    return Path(words[0]).suffix.lower() in {".yaml", ".yml", ".json"}


def _check_options_of_file(context: typer.Context) -> None:
    """Raise CliError for options that a workflow's file has to say for each task."""
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if source is not None and source.name == "COMMANDLINE" and param.name not in _WITH_FILE:
            raise usage(
                f"{param.opts[0]}: expected with a task, found with a workflow file; say it in the file, of its tasks"
            )


def _what(shell: str, function: str, words: list[str], args: str, kwargs: str) -> dict[str, Any]:
    given = [
        name for name, value in (("--shell", shell), ("--function", function), ("a program", words)) if value
    ]
    if len(given) != 1:
        found = " and ".join(given) or "nothing"
        raise usage(
            f"expected one of --shell, --function, a workflow file, or '-- program args'; found {found}"
        )
    if function:
        return {
            "function": function,
            "args": _parse_json("--args", args, list),
            "kwargs": _parse_json("--kwargs", kwargs, dict),
        }
    return {"shell": shell} if shell else {"argv": words}


def _parse_json(option: str, text: str, wanted: type) -> Any:
    expected = "an array" if wanted is list else "an object"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise usage(f"{option}: expected {expected} as JSON, found {text!r}: {error}") from error
    if not isinstance(value, wanted):
        raise usage(f"{option}: expected {expected} as JSON, found {text!r}")
    return value


def _parse_env(given: list[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for name, separator, _ in pairs:
        if not name or not separator:
            raise usage(f"--env: expected NAME=VALUE, found {name!r}")
    return {name: value for name, _, value in pairs}


async def _submit_task(where: Target, event: TaskSubmitted, *, wait: bool, as_json: bool) -> None:
    async with open_client(where) as client:
        handle = await client.submit_task(event)
        await _told(client, handle, "task", wait=wait, as_json=as_json)


async def _submit_workflow(
    where: Target, workflow: agentflow.WorkflowFile, workflow_id: str, *, wait: bool, as_json: bool
) -> None:
    if workflow_id:
        workflow = msgspec.structs.replace(workflow, id=workflow_id)
    async with open_client(where) as client:
        handle = await client.submit_workflow(workflow)
        await _told(client, handle, "workflow", wait=wait, as_json=as_json)


async def _told(
    client: agentflow.Client, handle: agentflow.Handle[Any], kind: str, *, wait: bool, as_json: bool
) -> None:
    """Print the id, or wait and print the result."""
    if not wait:
        if as_json:
            print_json({"id": handle.id, "kind": kind})
        else:
            print_lines(handle.id)
        return
    say(f"{kind} {handle.id}", "bright_black")
    outcome = await handle.outcome()
    result = await _result(handle, outcome)
    if as_json:
        print_json(_document(outcome, kind, result))
    elif outcome.state == "completed":
        print_lines(result if isinstance(result, str) else _pretty(result))
    elif outcome.state == "failed" and outcome.seq:
        await _show_output(client, outcome)
    _exit_by(outcome, quiet=as_json)


async def _show_output(client: agentflow.Client, outcome: Outcome) -> None:
    """Show what a failed task, or those of a failed workflow, wrote before."""
    past = await LoggedPast.of(client.log, client.objects)
    history = await load(past, keep=lambda key: key == outcome.id)
    workflow = history.workflows.get(outcome.id)
    rows = list(workflow.tasks.values()) if workflow is not None else [history.tasks[outcome.id]]
    failed = [row for row in rows if row.state == "failed"][:FAILURES_MAX]
    for row in failed:
        await complete(past, row)
        console(stderr=True).print(Group(*failure(row)))


async def _result(handle: agentflow.Handle[Any], outcome: Outcome) -> Any:
    if outcome.state != "completed":
        return None
    return await handle.result() if isinstance(handle, agentflow.WorkflowHandle) else outcome.value()


def _pretty(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _document(outcome: Outcome, kind: str, result: Any) -> dict[str, Any]:
    document = {"id": outcome.id, "kind": kind, "state": outcome.state, "result": result}
    return {**document, "error": outcome.error, "message": outcome.message}


def _exit_by(outcome: Outcome, *, quiet: bool) -> None:
    if outcome.state == "completed":
        return
    code = Exit.REJECTED if outcome.state == "rejected" else Exit.FAILED
    if quiet:
        raise typer.Exit(code)
    kind = "" if outcome.error == "error" else outcome.error
    details = ": ".join(part for part in (kind, outcome.message) if part)
    raise CliError(f"{outcome.id} {outcome.state}{': ' + details if details else ''}", code)
