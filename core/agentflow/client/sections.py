"""Mappings of a file read into structs, and what is wrong with them said to people.

The checking is msgspec's; here its findings are put into plain words, with the line, the value
found and advice: the key or id that was probably meant, quotes, brackets.

How such messages are written: E. Czaplicki, "Compiler Errors for Humans" (elm-lang.org, 2015).
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast, get_args

import msgspec
from msgspec import Struct

from agentflow.client.sources import Source, located
from agentflow.errors import InvalidRequest

T = TypeVar("T", bound=Struct)

_PLAIN_WORDS: Final = {
    "object": "a mapping",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}
_QUOTED: Final = re.compile(r"`([a-z |]+)`")
_STEP: Final = re.compile(r"\.?([A-Za-z_]\w*)|\[(\d+)\]")
_SHOW: Final = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 60


class Problem(Exception):
    """Something is wrong on a line; 0 if the line is not known."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


class Section(Struct, frozen=True):
    """One mapping of a file, under the name that messages call it by."""

    source: Source
    data: dict[str, Any]
    name: str

    def problem(self, key: str | None, text: str) -> Problem:
        """Make a problem of a key of this section, or of the section itself."""
        place = ": ".join(part for part in (self.name, key) if part)
        return Problem(self.source.line(self.data, key), f"{place}: {text}" if place else text)

    def child(self, key: str) -> Section:
        """Look at a mapping inside this one."""
        return Section(self.source, self.data[key], f"{self.name}: {key}" if self.name else key)


def shaped(section: Section, kind: type[T], meant: Mapping[str, str] | None = None) -> T:
    """Read a section into a struct.

    A key with nothing after it counts as left out. `meant` says which key people probably mean
    by one they know from elsewhere. Raises Problem.
    """
    for key, inner in _nested(kind).items():
        if isinstance(section.data.get(key), dict):
            shaped(section.child(key), inner, meant)
    _require_known(section, kind.__struct_fields__, meant or {})
    return converted(section, section.data, kind)


def converted(section: Section, data: Mapping[str, Any], kind: type[T]) -> T:
    """Convert what was read in a section, perhaps with defaults put below it. Raises Problem."""
    try:
        return msgspec.convert(_given(data, kind), kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise _misshaped(section, text, path.rstrip("`")) from error


def shown(value: object) -> str:
    """Show a value found, shortened."""
    return "nothing" if value is None else _SHOW.repr(value)


def suggestion(found: str, known: Iterable[str]) -> str:
    """Ask whether something similar was meant; empty if nothing is similar."""
    import difflib  # noqa: PLC0415 - only when something is wrong already

    close = difflib.get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def report(source: Source, problems: Sequence[Problem]) -> InvalidRequest:
    """Make one error of all problems, a line each."""
    return InvalidRequest("\n".join(located(source.name, problem.line, problem.text) for problem in problems))


@functools.cache
def _nested(kind: type[Struct]) -> dict[str, type[Struct]]:
    """The fields of a struct that are structs themselves, or nothing."""
    result: dict[str, type[Struct]] = {}
    for field in msgspec.structs.fields(kind):
        for choice in (field.type, *get_args(field.type)):
            if isinstance(choice, type) and issubclass(choice, Struct):
                result[field.name] = choice
    return result


def _given(data: Mapping[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """Leave out the keys with nothing after them."""
    nested = _nested(kind)
    return {
        key: _given(cast("dict[str, Any]", value), nested[key])
        if key in nested and isinstance(value, dict)
        else value
        for key, value in data.items()
        if value is not None
    }


def _require_known(section: Section, known: Sequence[str], meant: Mapping[str, str]) -> None:
    """Raise for the first key that nobody knows."""
    key = next((key for key in section.data if key not in known), None)
    if key is None:
        return
    hint = f"; did you mean {meant[key]!r}?" if meant.get(key) in known else suggestion(key, known)
    place = f"{section.name}: " if section.name else ""
    text = f"{place}unknown key {key!r}{hint or '; expected one of ' + ', '.join(known)}"
    raise Problem(section.source.line(section.data, key), text)


def _misshaped(section: Section, text: str, path: str) -> Problem:
    """Say what the conversion found wrong, with the value it stumbled over."""
    steps = _STEP.findall(path)
    key = steps[0][0] if steps else None
    found: Any = section.data
    for name, index in steps:
        found = found[int(index)] if index else cast("dict[str, Any]", found).get(name)
    expected = _in_plain_words(text)
    name = path.lstrip(".") or None
    problem = section.problem(name, f"{expected}, found {shown(found)}{_advice(expected, found)}")
    return Problem(section.source.line(section.data, key), problem.text)


def _in_plain_words(text: str) -> str:
    """Put a message of msgspec into plain words: "Expected `str`, got `int`" is "expected text"."""
    text = text.partition(", got")[0]
    return "e" + _QUOTED.sub(lambda match: _plain_types(match[1]), text)[1:]


def _plain_types(types: str) -> str:
    """Name the types of "int | str | null" in plain words."""
    return " or ".join(_PLAIN_WORDS.get(name, name) for name in types.split(" | ") if name != "null")


def _advice(expected: str, found: object) -> str:
    """What to write instead, where that is clear."""
    if expected == "expected text" and isinstance(found, int | float):
        return "; put it in quotes"
    if expected == "expected a list" and isinstance(found, str):
        return f"; write [{found}]"
    return ""
