"""Workflow files: what a person writes, read into types, or refused with advice.

    app: release/tasks.py            # optional: where the functions are
    defaults:                        # optional: for every task that does not say otherwise
      retry: {max_attempts: 2}
    workflow:
      id: release-7                  # optional
      name: Release
      description: From source to archive
      tasks:
        - task_id: build
          title: Build the wheel
          priority: high             # urgent, high, medium, low or 0 to 1000
          function: release.build    # exactly one of function, shell and argv
          kwargs: {source: {$result: clone, at: /folder}}
        - task_id: clone
          shell: git clone "$FROM" work && pwd
          env: {FROM: https://example.org/widget.git}

`{"$result": "task"}` stands for another task's result, `at` for a part of it (a JSON pointer,
RFC 6901). It may stand anywhere inside args, kwargs, env and argv; a task that uses a result
depends on the task it comes from, whether `dependencies` names it or not.

A key with nothing after it counts as left out. Of `defaults`, env and cwd are for shell and
argv only: a function runs inside the worker, in the worker's environment.

Everything wrong with a file is raised as one InvalidRequest, a line for each problem, at most
PROBLEMS_MAX of them. How to write such messages: Elm's compiler ("Compiler Errors for Humans",
E. Czaplicki, 2015) and rustc's "did you mean".
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from agentflow.client.reading import PROBLEMS_MAX, read, references
from agentflow.client.sections import suggestion
from agentflow.client.shapes import (
    Argv,
    Function,
    Needs,
    Retry,
    Run,
    Shell,
    TaskFile,
    WorkflowFile,
)
from agentflow.client.sources import Source, located, read_json
from agentflow.errors import InvalidRequest

__all__ = [
    "FILE_BYTES_MAX",
    "PROBLEMS_MAX",
    "Argv",
    "Format",
    "Function",
    "Needs",
    "Retry",
    "Run",
    "Shell",
    "TaskFile",
    "WorkflowFile",
    "load_workflow",
    "parse_workflow",
    "references",
]

FILE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Largest workflow file."""

Format: TypeAlias = Literal["yaml", "json"]

_TOO_LARGE: Final = f"expected at most {FILE_BYTES_MAX >> 20} MiB, found more"


def load_workflow(path: str | Path) -> WorkflowFile:
    """Read a workflow file; `.json` is JSON, anything else YAML.

    An `app` that is a Python file is looked for beside the workflow file and comes back as an
    absolute path. Raises InvalidRequest for a file that cannot be read or is not sound.
    """
    path = Path(path)
    source_format: Format = "json" if path.suffix.lower() == ".json" else "yaml"
    workflow = parse_workflow(_read_text(path), str(path), source_format)
    if workflow.app is None or not workflow.app.endswith(".py"):
        return workflow
    app = (path.parent / workflow.app).resolve()
    if not app.is_file():
        message = f"app: expected a Python file or the name of a module, found no file {app}"
        raise InvalidRequest(located(str(path), 0, message))
    return msgspec.structs.replace(workflow, app=str(app))


def parse_workflow(text: str, name: str, source_format: Format = "yaml") -> WorkflowFile:
    """Read a workflow from the text of a file; `name` is what messages call it.

    Raises InvalidRequest saying for each problem where it is, what was expected, what was found
    and what to do.
    """
    if len(text) > FILE_BYTES_MAX:
        raise InvalidRequest(located(name, 0, _TOO_LARGE))
    return read(read_json(text, name) if source_format == "json" else _read_yaml(text, name))


def _read_yaml(text: str, name: str) -> Source:
    """YAML read; who never reads any does not wait for the import of its parser."""
    from agentflow.client.yaml_source import read_yaml  # noqa: PLC0415 - see above

    return read_yaml(text, name)


def _read_text(path: Path) -> str:
    """The text of a file of bounded size."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise InvalidRequest(located(str(path), 0, _TOO_LARGE))
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}{_beside(path)}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: expected UTF-8, found another encoding: {error}") from error


def _beside(path: Path) -> str:
    """Ask whether a file of a similar name was meant."""
    if path.exists() or not path.parent.is_dir():
        return ""
    return suggestion(path.name, sorted(other.name for other in path.parent.iterdir()))
