"""The command line without a server: help, errors, what is shown and how."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from agentflow.client.watching import LoggedEvent
from agentflow.errors import InvalidRequest
from agentflow.events import (
    KINDS,
    EventRejected,
    Needs,
    TaskAssigned,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
    WorkflowSubmitted,
)
from agentflow_nodes.apps import load_app
from agentflow_nodes.cli import COMMANDS, main
from agentflow_nodes.cli.board import PlainBoard
from agentflow_nodes.cli.errors import CliError
from agentflow_nodes.cli.events import is_about
from agentflow_nodes.cli.help import verbatim_blocks
from agentflow_nodes.cli.output import clean, duration, encode_json
from agentflow_nodes.cli.queue import measure
from agentflow_nodes.cli.requests import parse_priority
from agentflow_nodes.cli.schema import contract, contract_of
from agentflow_nodes.cli.summary import summary
from agentflow_nodes.cli.tasks import task_document, task_table, why_ready
from agentflow_nodes.cli.workflows import workflow_tree
from tests.servers import free_port
from tests.story import Story, chain

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command here; its status, stdout and stderr."""
    monkeypatch.delenv("AGENTFLOW_NATS_URL", raising=False)
    monkeypatch.delenv("AGENTFLOW_NAMESPACE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def shown(renderable: Any, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


# Help --------------------------------------------------------------------------------


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"  {command.name} " in out for command in COMMANDS)


def test_no_command_shows_the_help(run: Run) -> None:
    status, out, _ = run()
    assert status == 0
    assert "agentflow up" in out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_explains_itself_with_an_example(run: Run, command: Any) -> None:
    status, out, _ = run(command.name, "--help")
    assert status == 0
    assert f"\n      agentflow {command.name}" in out
    module = importlib.import_module(f"agentflow_nodes.cli.{command.module}")
    described = inspect.getdoc(getattr(module, f"{command.name.replace('-', '_')}_command"))
    assert described is not None
    assert described.splitlines()[0] == command.summary


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_speaks_json_and_takes_a_namespace(run: Run, command: Any) -> None:
    _, out, _ = run(command.name, "--help")
    assert "--json" in out
    if command.name not in {"schema", "tables"}:
        assert "--namespace NAME" in out
        assert "AGENTFLOW_NAMESPACE" in out
    if command.name not in {"schema", "tables", "up"}:
        assert "--nats URL" in out


def test_the_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert (status, out.split()[0]) == (0, "agentflow")


def test_help_loads_nothing_that_takes_long() -> None:
    script = """if True:
        import sys
        from agentflow_nodes.cli import build
        build(["--help"])
        heavy = {"agentflow", "nats", "rich", "structlog", "duckdb", "uvloop"} & sys.modules.keys()
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_indented_paragraphs_of_help_stay_as_they_are() -> None:
    assert verbatim_blocks("One.\n\n    agentflow up\n    agentflow run") == (
        "One.\n\n\b\n    agentflow up\n    agentflow run"
    )


# Errors ------------------------------------------------------------------------------

USAGE_ERRORS = [
    (["sumbit"], "Did you mean 'submit'?"),
    (["tasks", "--jsn"], "--json"),
    (["tasks", "--state", "done"], "--state: expected pending, ready"),
    (["tasks", "--limit", "x"], "--limit"),
    (["task"], "ID"),
    (["submit"], "found nothing"),
    (["submit", "--shell", "true", "--function", "f"], "found --shell and --function"),
    (["submit", "--function", "f", "--args", "{}"], "--args: expected an array as JSON"),
    (["submit", "--function", "f", "--kwargs", "nope"], "--kwargs: expected an object as JSON"),
    (["submit", "--shell", "true", "--priority", "1001"], "priority: expected 0 to 1000"),
    (["submit", "--shell", "true", "--env", "X"], "--env: expected NAME=VALUE"),
    (["submit", "no-such.yaml", "--nats", "nats://127.0.0.1:1"], "no-such.yaml"),
    (
        ["submit", "no-such.yaml", "--retries", "2"],
        "--retries: expected with a task, found with a workflow file",
    ),
    (["tasks", "--archive", "no-such-folder"], "--archive: there is no folder no-such-folder"),
    (
        ["replay", "--file", "."],
        "--file: expected a file, found the folder .; an archive is named with --archive",
    ),
    (["run", "no-such.yaml"], "no-such.yaml: cannot be read"),
    (["worker", "--label", "zone"], "--label: expected KEY=VALUE, found 'zone'"),
    (["worker", "--app", "no_such_module"], "found no module 'no_such_module'"),
    (["worker", "--name", "a.b"], "A-Z a-z 0-9"),
    (["master", "--strategy", "best"], "--strategy: expected one of least_loaded"),
    (["workers", "--nats", "http://x"], "--nats: expected a URL like nats://127.0.0.1:4222"),
    (["workers", "--namespace", "a b"], "--namespace: expected 1 to 64"),
    (["events", "--kind", "task.done"], "--kind: expected one of task.submitted"),
    (["schema", "task.done"], "found 'task.done'"),
    (["reprioritize", "t1", "soon"], "priority: expected 0 to 1000"),
]


@pytest.mark.parametrize(("arguments", "said"), USAGE_ERRORS, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_command_line_is_told_on_one_line(run: Run, arguments: Sequence[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_for_programs_an_error_is_a_document(run: Run) -> None:
    status, _, err = run("tasks", "--state", "done", "--json")
    assert status == 2
    assert json.loads(err)["status"] == 2


@pytest.mark.parametrize("command", [["tasks"], ["submit", "--shell", "true"], ["task", "t1"], ["events"]])
def test_without_a_server_it_says_so_at_once(run: Run, command: list[str]) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    status, _, err = run(*command, "--nats", url)
    assert status == 4
    assert f"cannot reach NATS at {url}: connection refused" in err
    assert "agentflow up" in err


def test_the_server_may_be_named_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTFLOW_NATS_URL", "nats://127.0.0.1:1")
    status, _, err = run("workers")
    assert status == 4
    assert "nats://127.0.0.1:1:" in err


def test_an_error_cannot_steer_the_terminal(run: Run) -> None:
    _, _, err = run("schema", "\x1b[31mred\x07")
    assert "\x1b" not in err
    assert "\x07" not in err


def test_priorities() -> None:
    assert [parse_priority(text) for text in ("urgent", "0", "1000")] == ["urgent", 0, 1000]
    with pytest.raises(CliError, match="found '-1'"):
        parse_priority("-1")


# What is shown -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\nb\tc", "a b c"),
        ("\r\x08\x00", "␍␈␀"),
        ("\x7f", "␡"),
        ("\x9b31m", "\N{REPLACEMENT CHARACTER}31m"),
        ("\u202eevil", "\N{REPLACEMENT CHARACTER}evil"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),
        ("\x1b", "␛"),
        ("日本 é 🎉", "日本 é 🎉"),
    ],
)
def test_text_of_others_is_made_harmless(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_lines_stay_where_they_are_wanted() -> None:
    assert clean("a\r\nb\tc\n", lines=True) == "a\nb   c\n"


def test_json_is_plain_ascii() -> None:
    assert encode_json({"a": "é\x1b\x9b\u202e"}) == '{"a":"\\u00e9\\u001b\\u009b\\u202e"}'


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (None, ""),
        (0, "0 ms"),
        (4.23, "4.2 ms"),
        (340, "340 ms"),
        (2_140, "2.1 s"),
        (185_000, "3 m 05 s"),
        (7_800_000, "2 h 10 m"),
        (273_600_000, "3 d 4 h"),
    ],
)
def test_durations(ms: float | None, expected: str) -> None:
    assert duration(ms) == expected


def failed_flow() -> Story:
    story = Story()
    worker = story.join()
    story.say("cli", chain())
    story.assign(worker, "flow/a", "flow/d")
    story.say("w1", TaskCompleted(id="flow/d", attempt=1, incarnation=worker, result=msgspec.Raw(b'"out"')))
    message = "status \x1b[31m1\x1b[0m [bold]not bold[/bold]"
    stderr = "gone [red]wrong[/red]\x1b[2J"
    story.say(
        "w1",
        TaskFailed(
            id="flow/a", attempt=1, incarnation=worker, error="exit", message=message, stderr=stderr, run_us=5
        ),
    )
    return story


def test_a_workflow_is_a_tree() -> None:
    story = failed_flow()
    text = shown(workflow_tree(story.history.workflows["flow"], story.history.now_ms))
    lines = text.splitlines()
    assert lines[0].startswith("✗ failed  Release  flow")
    assert "├── ✗ failed  a  Make it" in text
    assert "│   └── ↷ skipped  b  a ended failed" in text
    assert "└── ✓ completed  d" in text
    assert "[bold]not bold[/bold]" in text


def test_the_summary_names_what_failed_and_why() -> None:
    story = failed_flow()
    text = shown(summary(story.history.workflows["flow"], {"d": "out"}))
    assert "✗ a  exit: status 1 [bold]not bold[/bold]" in text
    assert "    gone [red]wrong[/red]\n" in text
    assert "result of d\n    out" in text
    assert text.rstrip().splitlines()[-1].startswith("✗ failed  Release")


def test_a_line_for_each_change_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    story = failed_flow()
    board = PlainBoard()
    row = story.history.workflows["flow"]
    board.show(row, story.history.now_ms)
    board.show(row, story.history.now_ms)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "✗ failed    a" in lines[0]


def test_a_narrow_table_keeps_ids_whole() -> None:
    story = Story()
    task_id = "018bcfe5-0000-7000-8000-000000000000"
    story.say("cli", TaskSubmitted(id=task_id, shell="true", title="A title that is rather long " * 4))
    text = shown(task_table(list(story.history.tasks.values()), story.history.now_ms), width=80)
    assert task_id in text
    assert len(text.splitlines()) == 2


def test_a_task_for_programs() -> None:
    story = failed_flow()
    document = task_document(story.task("flow/a"), story.history.now_ms)
    assert json.loads(encode_json(document))["attempts"][0]["position"] == [6, 0]
    assert document["state"] == "failed"
    assert document["workflow"] == "flow"


def test_the_queue_in_numbers() -> None:
    story = Story()
    worker = story.join(slots=3)
    story.say("cli", TaskSubmitted(id="t1", shell="true"), TaskSubmitted(id="t2", shell="true", priority=7))
    story.say("cli", TaskSubmitted(id="big", shell="true", needs=Needs(gpus=2)))
    story.assign(worker, "t1")
    waiting = measure(story.history.state)
    assert waiting.by_priority == {500: 1, 7: 1}
    assert (waiting.running, waiting.slots, waiting.workers) == (1, 3, 1)
    assert [(parked.demand.gpus, parked.count) for parked in waiting.parked] == [(2, 1)]
    assert why_ready(story.task("big"), story.history).startswith("it fits none of the workers")
    assert why_ready(story.task("t2"), story.history) == "the workers are busy"


@pytest.mark.parametrize(
    ("event", "wanted", "found"),
    [
        (TaskSubmitted(shell="true"), "at-5-0", True),
        (TaskSubmitted(id="t1", shell="true"), "t1", True),
        (TaskSubmitted(id="t1", shell="true"), "t2", False),
        (TaskAssigned(id="flow/a", attempt=1, incarnation=1), "flow", True),
        (TaskAssigned(id="flow/a", attempt=1, incarnation=1), "flow/a", True),
        (TaskAssigned(id="flow/a", attempt=1, incarnation=1), "flow/b", False),
        (WorkflowSubmitted(id="flow"), "flow/a", True),
        (EventRejected(seq=5, index=2, client="cli", reason="bad_type"), "at-5-2", True),
    ],
)
def test_events_about_a_task(event: Any, wanted: str, *, found: bool) -> None:
    assert is_about(LoggedEvent(5, 0, 0, event.kind, "cli", event), wanted) is found


# The contract ------------------------------------------------------------------------


def test_the_contract_describes_every_event() -> None:
    document = contract()
    assert document["events"].keys() == KINDS.keys()
    assert document["events"]["task.assigned"]["subject"].startswith("af.<namespace>.task.assigned.")
    assert document["events"]["leader.elected"]["subject"] == "af.<namespace>.leader.elected.epoch"
    assert document["events"]["lock.opened"]["subject"] == "af.<namespace>.lock.opened.bucket"
    assert document["events"]["lock.opened"]["since_level"] == 2
    assert document["limits"]["frame_bytes_max"] == 512 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_all_a_schema_refers_to_is_there(kind: str) -> None:
    document = contract_of(kind)
    refs = _refs(document)
    assert refs
    assert {ref.removeprefix("#/$defs/") for ref in refs} <= document["$defs"].keys()


def _refs(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(_refs, value.values()))
    return set().union(*map(_refs, value)) if isinstance(value, list) else set()


def test_the_schema_is_one_document(run: Run) -> None:
    status, out, _ = run("schema")
    assert status == 0
    assert json.loads(out)["level"] == 2


# Apps --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_an_app_may_be_a_file(folder: Path) -> None:
    write(folder / "release" / "beside_app.py", "VALUE = 3")
    write(folder / "release" / "tasks_app.py", "from beside_app import VALUE")
    module = load_app("release/tasks_app.py", folder)
    assert (module.__name__, module.VALUE) == ("tasks_app", 3)
    assert load_app("release/tasks_app.py", folder) is module


def test_an_app_may_be_a_module(folder: Path) -> None:
    write(folder / "shop_app" / "__init__.py", "")
    write(folder / "shop_app" / "tasks.py", "VALUE = 4")
    assert load_app("shop_app.tasks", folder).VALUE == 4


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("missing.py", "expected a Python file, found none at"),
        ("missing_app", "found no module 'missing_app'"),
        ("missing_app.tasks", "found no module 'missing_app'"),
        ("json.py", "a module called 'json' is loaded already"),
        ("broken_app.py", "SyntaxError"),
        ("raising_app.py", r"ZeroDivisionError: .*raising_app.py, line 2\)"),
        ("needing_app", "ModuleNotFoundError: No module named 'not_installed'"),
    ],
)
def test_an_app_that_cannot_be_loaded(folder: Path, spec: str, said: str) -> None:
    write(folder / "json.py", "")
    write(folder / "broken_app.py", "def")
    write(folder / "raising_app.py", "\n1 / 0")
    write(folder / "needing_app.py", "import not_installed")
    with pytest.raises(InvalidRequest, match=said):
        load_app(spec, folder)
