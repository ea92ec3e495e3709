"""The command line: `agentflow`.

Every command lives in a module of its group, loaded only when it is called: help has to be
quick, and half of the commands need a NATS client, an event loop and tables to start up.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import typer

from agentflow_nodes.cli.errors import Exit, classify
from agentflow_nodes.cli.help import Command, Group

_DISTRIBUTION: Final = "agentflow-nats"
_COMPLETION: Final = "_AGENTFLOW_COMPLETE"
_BROKEN_PIPE: Final = 141

RUN: Final = "Run"
ASK: Final = "Look"
CHANGE: Final = "Change"


class _Entry(NamedTuple):
    """Where a command is, and how the list of commands describes it."""

    name: str
    module: str
    panel: str
    summary: str


COMMANDS: Final = (
    _Entry("up", "up", RUN, "Start NATS, a master, workers and a history on this machine."),
    _Entry("run", "run", RUN, "Run a workflow file and show how it goes."),
    _Entry("master", "master", RUN, "Start a master: it leads the namespace, or stands by."),
    _Entry("worker", "worker", RUN, "Start a worker: it runs tasks."),
    _Entry("projector", "projector", RUN, "Start a projector: it keeps the history in a DuckDB file."),
    _Entry("archive", "archive", RUN, "Keep the log in Parquet files by day, and the live log short."),
    _Entry("submit", "submit", CHANGE, "Hand over a task or a workflow."),
    _Entry("lock", "locks", RUN, "Run a command while holding a lock."),
    _Entry("cancel", "requests", CHANGE, "Ask for a task or workflow to be stopped."),
    _Entry("reprioritize", "requests", CHANGE, "Give a waiting task another priority."),
    _Entry("drain", "drain", CHANGE, "Ask a worker to take nothing new, finish what it runs, and end."),
    _Entry(
        "quarantine", "quarantine", CHANGE, "Show tasks given up for killing workers; hand them over again."
    ),
    _Entry("backup", "backup", CHANGE, "Write logs and objects into a folder, while the cluster works."),
    _Entry("restore", "restore", CHANGE, "Bring logs and objects back into a cluster that has none."),
    _Entry("task", "tasks", ASK, "Show one task: its state, attempts, output and result."),
    _Entry("tasks", "tasks", ASK, "List tasks, the latest last."),
    _Entry("workflow", "workflows", ASK, "Show one workflow as a tree of its tasks."),
    _Entry("workers", "workers", ASK, "List the workers: slots, load, what they have done."),
    _Entry("locks", "locks", ASK, "List the locks: who holds them, who waits, who held them."),
    _Entry("masters", "masters", ASK, "List the masters: who leads what, and how far each has read."),
    _Entry("queue", "queue", ASK, "Show what waits, how long, and what fits no worker."),
    _Entry("why", "why", ASK, "Explain why a task waits, and why what happened to it happened."),
    _Entry("what-if", "what_if", ASK, "Let a stretch of history happen again under another policy."),
    _Entry("diff", "diff", ASK, "Compare two runs of a workflow, task by task."),
    _Entry("export", "export", ASK, "Write a stretch of history to one file, to be read without a server."),
    _Entry("replay", "replay", ASK, "Make the state anew from the log, and compare a projection with it."),
    _Entry("events", "events", ASK, "Show the events of the log, or follow them."),
    _Entry("query", "query", ASK, "Ask the history in SQL, as of now or any time."),
    _Entry("report", "report", ASK, "Answer a ready-made question: what waits, fails, takes long."),
    _Entry("tables", "tables", ASK, "Show the tables one can ask, and what their columns mean."),
    _Entry("schema", "schema", ASK, "Print the contract: every event as JSON Schema."),
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    try:
        status = build(options)(args=given, prog_name="agentflow", standalone_mode=False)
    except typer.Exit as done:
        status = done.exit_code
    except typer.TyperException as error:
        status = _report(_usage_text(error), Exit.USAGE, as_json="--json" in options)
    except BrokenPipeError:
        status = _leave_pipe()
    except (Exception, KeyboardInterrupt, typer.Abort) as error:
        if "--debug" in options and not isinstance(error, KeyboardInterrupt):
            raise
        status = _report_error(error, as_json="--json" in options)
    sys.exit(status if isinstance(status, int) else Exit.OK)


def build(arguments: Sequence[str]) -> Callable[..., Any]:
    """The typer command, with those modules loaded that these arguments need."""
    app = typer.Typer(
        name="agentflow",
        help=_HELP,
        cls=Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_top)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for command in COMMANDS:
        if command.name == wanted or _COMPLETION in os.environ:
            module = importlib.import_module(f"agentflow_nodes.cli.{command.module}")
            call = getattr(module, f"{command.name.replace('-', '_')}_command")
            app.command(command.name, cls=Command, rich_help_panel=command.panel)(call)
        else:
            app.command(command.name, help=command.summary, rich_help_panel=command.panel)(_not_loaded)
    return typer.main.get_command(app)


_HELP: Final = """\
Tasks and workflows on a pool of workers, with an event log on NATS as the only truth.

Two commands to begin with, the second one in another terminal:

    agentflow up
    agentflow submit --shell 'echo hello' --wait
"""


def _not_loaded() -> None:
    raise AssertionError("the command called is always loaded")


def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"agentflow {importlib.metadata.version(_DISTRIBUTION)}")  # noqa: T201 - the answer
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())  # noqa: T201 - the answer
        raise typer.Exit


def _usage_text(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "agentflow"
    return f"{error.format_message().rstrip('.')}; see '{command} --help'"


def _report_error(error: BaseException, *, as_json: bool) -> int:
    found = classify(error)
    if found is None:
        kind = type(error).__name__
        text = f"this is a bug in agentflow: {kind}: {error}; please report it with the output of --debug"
        found = text, Exit.OPERATING
    return _report(*found, as_json=as_json)


def _report(message: str, status: Exit, *, as_json: bool) -> int:
    """Say what is wrong, on stderr: a line for people, a document for programs."""
    from agentflow_nodes.cli.output import clean, encode_json, say  # noqa: PLC0415 - rich takes long to load

    if as_json:
        sys.stderr.write(encode_json({"error": message, "status": int(status)}) + "\n")
    elif status is Exit.INTERRUPTED:
        say(message)
    else:
        say(f"error: {clean(message, lines=True)}", "red")
    return int(status)


def _leave_pipe() -> int:
    """Whoever read our output has gone; Python must not complain about that at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _BROKEN_PIPE
