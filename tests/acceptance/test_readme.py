"""The README is run: its programs, its commands, its workflow file, against one cluster."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from agentflow_nodes.cli import COMMANDS
from agentflow_nodes.cli.errors import Exit
from tests.servers import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = (ROOT / "README.md").read_text()
_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NAMED: Final = re.compile(r"# (\w+\.\w+)\n")
_CLIENT: Final = re.compile(r"agentflow\.Client\(")
_READY_S: Final = 20.0
_COMMAND_S: Final = 30.0
AGENTFLOW: Final = Path(sys.executable).with_name("agentflow")

pytestmark = pytest.mark.timeout(120)


class Block(NamedTuple):
    """A fenced block; `name` is the file it shows, if it shows one."""

    language: str
    text: str
    name: str = ""


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


def _blocks() -> list[Block]:
    found = []
    for language, text in _BLOCK.findall(README):
        named = _NAMED.match(text)
        found.append(Block(language, text, named[1] if named else ""))
    return found


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks() if block.language == "sh" for line in block.text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("agentflow ")]


class Tour:
    """The folder with the README's files, and the cluster they run on."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    async def run(self, *command: str | Path) -> Done:
        """Run a program to its end."""
        environment = _environment({"AGENTFLOW_NATS_URL": self.url})
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(_COMMAND_S):
            stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return Done(process.returncode, stdout.decode(), stderr.decode())


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTFLOW_")}
    return {**kept, **more, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}


@pytest.fixture
async def tour(tmp_path: Path) -> AsyncIterator[Tour]:
    """The README's files, and `agentflow up` as the README starts it."""
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    for block in _blocks():
        if block.name:
            (tmp_path / block.name).write_text(_CLIENT.sub(f'agentflow.Client("{url}", ', block.text))
    (up,) = [command for command in _commands() if command[1] == "up"]
    process = await asyncio.create_subprocess_exec(
        AGENTFLOW,
        *up[1:],
        *("--port", str(port), "--json"),
        cwd=tmp_path,
        env=_environment({}),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_READY_S):
            told = json.loads(await process.stdout.readline())
        assert told["ready"] is True
        yield Tour(tmp_path, url)
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_READY_S):
            await process.wait()


async def test_the_programs_print_what_the_readme_says(tour: Tour) -> None:
    blocks = _blocks()
    programs = [
        (place, block) for place, block in enumerate(blocks) if block.language == "python" and block.name
    ]
    assert [block.name for _, block in programs] == ["tour.py", "client.py", "flow.py", "lock.py", "watch.py"]
    for place, block in programs[1:]:
        done = await tour.run(sys.executable, block.name)
        assert done.status == 0, done.stderr
        printed = blocks[place + 1]
        if printed.language == "text":
            assert done.stdout == printed.text, block.name


async def test_the_commands_work_in_the_order_shown(tour: Tour) -> None:
    commands = [command for command in _commands() if command[1] != "up"]
    assert len(commands) > len(COMMANDS) // 2
    for command in commands:
        done = await tour.run(AGENTFLOW, *command[1:])
        assert done.status == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"


def test_every_command_is_in_its_table_with_what_help_says_of_it() -> None:
    rows: list[tuple[str, str]] = re.findall(r"^\| `agentflow ([\w-]+)` \| (.*) \|$", README, re.MULTILINE)
    assert sorted(rows) == sorted((command.name, command.summary) for command in COMMANDS)


def test_every_exit_status_is_in_its_table() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", README, re.MULTILINE)
    assert [int(status) for status, _ in rows] == [int(status) for status in Exit]


def test_every_recipe_named_exists() -> None:
    named = set(re.findall(r"uv run just ([a-z0-9-]+)", README))
    recipes = set(
        re.findall(r"^([a-z0-9-]+)(?: \*arguments)?:", (ROOT / "justfile").read_text(), re.MULTILINE)
    )
    assert named <= recipes
    parts = {"checks", "proof", "campaign-and-tests", "fmt-check", "lint", "types", "mypy", "pyright"}
    assert named >= recipes - parts - {"default", "test"}


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    tests = re.search(r"^pip install uv && (uv run just)$", README, re.MULTILINE)
    assert tests is not None
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(f"\n{tests[1]}")
