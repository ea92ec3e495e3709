"""Questions that people have, ready to be asked: one SQL file each.

A file begins with what it answers, in a comment, and then names its parameters: `$name: what`
must be given, `$name = default: what` may be.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any, Final

import msgspec
from msgspec import Struct

import agentflow_projections.queries as here
from agentflow.errors import InvalidRequest
from agentflow_projections.query import LATEST, Question

_PARAMETER: Final = re.compile(r"^-- \$(\w+)(?: = (\S+))?: (.+)$")

_RANGES: Final = {"buckets": (1, 10_000), "limit": (1, 100_000), "since": (0, LATEST)}
"""What a number may be."""


class Parameter(Struct, frozen=True):
    """What a ready-made question must or may be told."""

    name: str
    meaning: str
    required: bool
    default: Any = None


class Ready(Struct, frozen=True):
    """A ready-made question."""

    name: str
    summary: str
    parameters: list[Parameter]
    sql: str

    def question(self, given: dict[str, Any], as_of: int | None = None) -> Question:
        """Ask it with these parameters. Raises InvalidRequest."""
        known = {each.name: each for each in self.parameters}
        for name in given:
            if name not in known:
                raise InvalidRequest(f"{self.name}: expected {_listed(known)}, found ${name}")
        missing = [name for name, each in known.items() if each.required and name not in given]
        if missing:
            raise InvalidRequest(
                f"{self.name}: expected a value for ${missing[0]}: {known[missing[0]].meaning}"
            )
        for name, value in given.items():
            _check(f"{self.name}: ${name}", known[name], value)
        return Question(
            self.sql, {name: given.get(name, each.default) for name, each in known.items()}, as_of
        )


def _check(what: str, parameter: Parameter, value: Any) -> None:
    """Who asks may be anybody: nothing may cost more than it is worth. Raises InvalidRequest."""
    if parameter.required:
        if not isinstance(value, str):
            raise InvalidRequest(f"{what}: expected a text, found {value!r}")
        return
    least, most = _RANGES[parameter.name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{what}: expected a number from {least} to {most}, found {value!r}")


def _listed(names: dict[str, Parameter]) -> str:
    return " ".join(f"${name}" for name in names) or "no parameters"


def ready_made() -> dict[str, Ready]:
    """All of them, by name."""
    files = (file for file in resources.files(here).iterdir() if file.name.endswith(".sql"))
    found = [_parsed(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8")) for file in files]
    return {each.name: each for each in sorted(found, key=lambda each: each.name)}


def named(name: str) -> Ready:
    """One of them. Raises InvalidRequest."""
    known = ready_made()
    if name not in known:
        raise InvalidRequest(f"there is no report {name!r}; there are {', '.join(known)}")
    return known[name]


def _parsed(name: str, sql: str) -> Ready:
    summary: list[str] = []
    parameters: list[Parameter] = []
    for line in sql.splitlines():
        if not line.startswith("-- "):
            break
        found = _PARAMETER.match(line)
        if found is None:
            summary.append(line.removeprefix("-- "))
        else:
            default = msgspec.json.decode(found[2]) if found[2] else None
            parameters.append(Parameter(found[1], found[3], found[2] is None, default))
    return Ready(name, " ".join(summary), parameters, sql)
