"""The command line as people and programs use it: real processes, a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

APP = """
import time
import agentflow

@agentflow.task
async def add(a: int, b: int) -> int:
    return a + b

@agentflow.task
def boom() -> None:
    raise ValueError("no \\x1b[31mway")
"""

FLOW = """
app: shop.py
workflow:
  id: {id}
  name: Chain
  tasks:
    - {{task_id: one, function: shop.add, args: [1, 2]}}
    - {{task_id: two, shell: "{script}", dependencies: [one]}}
    - {{task_id: three, argv: [echo, "sum:", {{$result: one}}], dependencies: [two]}}
"""

pytestmark = pytest.mark.timeout(120)

READY_S_MAX = 30.0
STOP_S_MAX = 20.0


class Up:
    """`agentflow up` as a process, and commands that talk to it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(APP)
        arguments = ["up", "--port", "0", "--app", "shop.py", "--slots", "2", "--json", *options]
        self.process = subprocess.Popen(
            command(*arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.ready = self._wait_ready()
        self.url: str = self.ready["url"]

    def _wait_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(READY_S_MAX, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.process.stderr.read() if self.process.stderr else ""
        ready: dict[str, Any] = json.loads(line)
        return ready

    def run(self, *arguments: str, status: int = 0) -> str:
        """A command's stdout."""
        done = self.call(*arguments)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "AGENTFLOW_NATS_URL": self.url}
        return subprocess.run(
            command(*arguments), cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status))

    def lines(self, *arguments: str) -> list[Any]:
        return [json.loads(line) for line in self.run(*arguments, "--json").splitlines()]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=STOP_S_MAX)
        return self.process.returncode


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentflow_nodes", *arguments]


def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Wait for something that happens in other processes."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    started = Up(tmp_path_factory.mktemp("up"))
    yield started
    assert started.stop() == 0


@pytest.fixture
def own_up(tmp_path: Path) -> Iterator[Up]:
    started = Up(tmp_path)
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.communicate()


# Submitting --------------------------------------------------------------------------


def test_a_script_and_what_it_printed(up: Up) -> None:
    assert up.run("submit", "--shell", "echo hello", "--wait") == "hello\n"


def test_a_program_with_arguments(up: Up) -> None:
    assert up.run("submit", "--wait", "--", "printf", "%s-%s", "a b", "c") == "a b-c\n"


def test_a_function_and_its_result(up: Up) -> None:
    told = up.json("submit", "--function", "shop.add", "--args", "[1]", "--kwargs", '{"b": 2}', "--wait")
    assert (told["state"], told["result"]) == ("completed", 3)


def test_a_failure_shows_its_output_and_sets_the_status(up: Up) -> None:
    done = up.call("submit", "--shell", "echo too bad >&2; exit 7", "--wait")
    assert done.returncode == 1
    assert "too bad" in done.stderr
    assert "exit status 7" in done.stderr


def test_the_same_id_with_another_body_is_rejected(up: Up) -> None:
    up.run("submit", "--shell", "true", "--id", "once", "--wait")
    up.run("submit", "--shell", "true", "--id", "once", "--wait")
    up.run("submit", "--shell", "false", "--id", "once", "--wait", status=5)


def test_a_workflow_from_a_file(up: Up) -> None:
    (up.folder / "flow.yaml").write_text(FLOW.format(id="flow-1", script="echo middle"))
    told = up.json("submit", "flow.yaml", "--wait")
    assert told["result"] == {"one": 3, "two": "middle", "three": "sum: 3"}
    tree = up.run("workflow", "flow-1")
    assert "completed  Chain  flow-1" in tree.replace("✓ ", "")
    document = up.json("workflow", "flow-1")
    assert document["counts"] == {"completed": 3}
    assert up.json("submit", "flow.yaml", "--id", "flow-2") == {"id": "flow-2", "kind": "workflow"}


# Looking -----------------------------------------------------------------------------


def test_one_task(up: Up) -> None:
    up.call("submit", "--function", "shop.boom", "--id", "bad", "--title", "[bold]Bad", "--wait")
    text = up.run("task", "bad")
    assert "✗ failed  bad  [bold]Bad" in text
    assert "ValueError: no way" in text
    document = up.json("task", "bad")
    assert document["state"] == "failed"
    assert "Traceback" in document["attempts"][0]["traceback"]


def test_lists_of_tasks_and_workers(up: Up) -> None:
    up.run("submit", "--shell", "true", "--id", "listed", "--wait")
    assert any(row["id"] == "listed" for row in up.lines("tasks", "--state", "completed", "--limit", "0"))
    assert "worker-1" in up.run("workers")
    (worker,) = up.lines("workers")
    assert (worker["state"], worker["slots"], "shop.add" in worker["functions"]) == ("active", 2, True)


def test_what_is_not_there(up: Up) -> None:
    up.run("task", "nobody", status=3)
    up.run("workflow", "nobody", status=3)
    up.run("cancel", "nobody", status=3)
    done = up.call("tasks", "--namespace", "elsewhere")
    assert done.returncode == 3
    assert "there is no namespace 'elsewhere'" in done.stderr


def test_the_events_of_a_task_in_order(up: Up) -> None:
    up.run("submit", "--shell", "true", "--id", "told", "--wait")
    events = up.lines("events", "--task", "told")
    kinds = [each["kind"] for each in events]
    assert kinds == ["task.submitted", "task.assigned", "task.completed"]
    assert [
        each["kind"] for each in up.lines("events", "--task", "told", "--kind", "task.completed")
    ] == kinds[2:]
    first = up.lines("events", "--after", "0", "--limit", "1")[0]
    assert (first["seq"], first["index"]) == (1, 0)


def test_following_events(up: Up) -> None:
    environment = {**os.environ, "AGENTFLOW_NATS_URL": up.url}
    arguments = command(
        "events", "--follow", "--after", "0", "--kind", "task.*", "--task", "followed", "--json"
    )
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as following:
        up.run("submit", "--shell", "true", "--id", "followed", "--wait")
        assert following.stdout is not None
        kinds = [json.loads(following.stdout.readline())["kind"] for _ in range(3)]
        following.send_signal(signal.SIGINT)
        assert following.wait(STOP_S_MAX) == 130
    assert kinds == ["task.submitted", "task.assigned", "task.completed"]


# Changing ----------------------------------------------------------------------------


def test_cancelling_what_runs_and_what_waits(up: Up) -> None:
    up.run("submit", "--shell", "sleep 60", "--id", "runs")
    up.run("submit", "--shell", "true", "--needs-gpus", "9", "--id", "waits")
    until(lambda: up.json("task", "runs")["state"] == "running")
    queue = up.json("queue")
    assert (queue["ready"], queue["running"]) == (1, 1)
    assert queue["parked"] == [{"count": 1, "needs": "9 gpu"}]
    assert "it fits none of the workers" in up.run("task", "waits")
    assert up.json("reprioritize", "waits", "urgent") == {"id": "waits", "priority": "urgent"}
    until(lambda: up.json("task", "waits")["priority"] == 1000)
    up.run("reprioritize", "runs", "urgent", status=5)
    for task in ("runs", "waits"):
        assert up.json("cancel", task, "--wait", "--reason", "enough")["state"] == "cancelled"
    up.run("cancel", "runs", status=5)
    assert up.json("task", "runs")["cancel_reason"] == "enough"


# Nodes -------------------------------------------------------------------------------


def children(up: Up) -> dict[str, list[str]]:
    """The nodes that `agentflow up` started, and what they were told."""
    commands = [child.cmdline() for child in psutil.Process(up.process.pid).children()]
    return {words[3]: words[4:] for words in commands if words[1:3] == ["-m", "agentflow_nodes"]}


def test_up_is_ready_soon_and_its_data_survives(own_up: Up, tmp_path: Path) -> None:
    assert own_up.ready["seconds"] < READY_S_MAX
    own_up.run("submit", "--shell", "echo kept", "--id", "kept", "--wait")
    assert "--history" in children(own_up)["master"]
    assert own_up.stop(signal.SIGINT) == 0
    again = Up(tmp_path, "--no-projector")
    try:
        assert "--history" not in children(again)["master"]
        assert again.json("task", "kept")["result"] == "kept"
        assert again.run("submit", "--shell", "echo kept", "--id", "kept", "--wait") == "kept\n"
        assert len(again.lines("events", "--task", "kept", "--kind", "task.assigned")) == 1
    finally:
        again.stop()


def test_a_worker_that_dies_is_started_again(own_up: Up) -> None:
    (worker,) = own_up.lines("workers")
    os.kill(worker["pid"], signal.SIGKILL)
    own_up.run("submit", "--shell", "true", "--wait")
    (after,) = own_up.lines("workers")
    assert after["name"] == worker["name"]
    assert after["pid"] != worker["pid"]


def start_slow(up: Up, folder: Path) -> None:
    """Let a task run that ends once the file "go" is there."""
    script = "touch began; while [ ! -e go ]; do sleep 0.05; done; echo done > ended"
    up.run("submit", "--shell", script, "--cwd", str(folder), "--id", "slow")
    until((folder / "began").exists)


def test_stopping_lets_running_tasks_end(own_up: Up, tmp_path: Path) -> None:
    start_slow(own_up, tmp_path)
    own_up.process.send_signal(signal.SIGTERM)
    assert own_up.process.stderr is not None
    assert own_up.process.stderr.readline().startswith("Stopping")
    (tmp_path / "go").touch()
    assert own_up.process.wait(STOP_S_MAX) == 0
    assert (tmp_path / "ended").read_text() == "done\n"


def test_a_second_ctrl_c_ends_it_at_once(own_up: Up) -> None:
    own_up.run("submit", "--shell", "sleep 60", "--id", "long")
    until(lambda: own_up.json("task", "long")["state"] == "running")
    children = psutil.Process(own_up.process.pid).children(recursive=True)
    own_up.process.send_signal(signal.SIGINT)
    assert own_up.process.stderr is not None
    assert "Ctrl-C again" in own_up.process.stderr.readline()
    later = time.monotonic() + 0.4  # sooner it would be taken for an echo of the first
    until(lambda: time.monotonic() > later)
    assert own_up.stop(signal.SIGINT) == 130
    _, alive = psutil.wait_procs(children, STOP_S_MAX)
    assert not alive


def test_a_signal_delivered_twice_is_one(own_up: Up, tmp_path: Path) -> None:
    start_slow(own_up, tmp_path)
    own_up.process.send_signal(signal.SIGTERM)
    own_up.process.send_signal(signal.SIGINT)
    assert own_up.process.stderr is not None
    assert own_up.process.stderr.readline().startswith("Stopping")
    (tmp_path / "go").touch()
    assert own_up.process.wait(STOP_S_MAX) == 0
    assert (tmp_path / "ended").read_text() == "done\n"


def test_nothing_outlives_up_when_it_is_killed(own_up: Up) -> None:
    own_up.run("submit", "--shell", "sleep 60", "--id", "long")
    until(lambda: own_up.json("task", "long")["state"] == "running")
    children = psutil.Process(own_up.process.pid).children(recursive=True)
    assert len(children) >= 3
    own_up.process.kill()
    _, alive = psutil.wait_procs(children, 60)
    assert not alive


def test_an_app_that_cannot_be_loaded_stops_up(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    arguments = command("up", "--port", "0", "--app", "bad.py")
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr
    assert "bad.py, line 1" in done.stderr


def test_a_folder_in_use_is_named(own_up: Up, tmp_path: Path) -> None:
    arguments = command("up", "--port", "0")
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert f"in use by process {own_up.process.pid}" in done.stderr


# Running a file ----------------------------------------------------------------------


def run_file(folder: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "shop.py").write_text(APP)
    (folder / "flow.yaml").write_text(FLOW.format(id="flow-1", script=script))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AGENTFLOW_")}
    arguments = command("run", "flow.yaml", *options)
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_running_a_file_needs_nothing_else(tmp_path: Path) -> None:
    done = run_file(tmp_path, "echo middle")
    assert done.returncode == 0, done.stderr
    assert "✓ completed three" in done.stdout
    assert "result of three\n    sum: 3" in done.stdout
    assert "3 completed" in done.stdout.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"shop.py", "flow.yaml", "__pycache__"}


def test_running_a_file_that_fails(tmp_path: Path) -> None:
    done = run_file(tmp_path, "echo too bad >&2; exit 3")
    assert done.returncode == 1
    assert "✗ two  exit: exit status 3" in done.stdout
    assert "    too bad" in done.stdout
    assert "1 completed, 1 failed, 1 skipped" in done.stdout.splitlines()[-1]


def test_running_a_file_for_a_program(tmp_path: Path) -> None:
    done = run_file(tmp_path, "echo middle", "--json", "--data-dir", "data")
    document = json.loads(done.stdout)
    assert document["counts"] == {"completed": 3}
    assert document["results"] == {"three": "sum: 3"}
    assert (tmp_path / "data" / "jetstream").is_dir()


def test_running_a_file_on_a_cluster_that_is_there(up: Up) -> None:
    (up.folder / "other.yaml").write_text(FLOW.format(id="flow-2", script="echo middle"))
    assert "3 completed" in up.run("run", "other.yaml")
    again = up.run("run", "other.yaml")
    assert "flow-2 ran before" in again
