"""Text that people write as plain data that remembers its lines, and JSON read so.

YAML is read in `yaml_source`, which is imported only where there is YAML to read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, TypeAlias, cast

from msgspec import Struct

from agentflow.errors import InvalidRequest
from agentflow.limits import INTEGER_MAX

NESTING_MAX: Final = 64
"""Deepest nesting of lists and mappings in a file."""

# What a mapping or list, and each key of a mapping, stands on: by identity of the container.
Lines: TypeAlias = dict[tuple[int, str | None], int]


class Source(Struct, frozen=True):
    """A file's data: None, bool, int, float, str, and lists and mappings of them."""

    name: str
    data: Any
    lines: Lines

    def line(self, container: object, key: str | None = None) -> int:
        """The line a list or mapping of `data`, or one of its keys, stands on; 0 if not known."""
        line = self.lines.get((id(container), key), 0)
        return line or self.lines.get((id(container), None), 0)

    def error(self, line: int, text: str) -> InvalidRequest:
        """What is wrong, with the place in front."""
        return InvalidRequest(located(self.name, line, text))


def located(name: str, line: int, text: str) -> str:
    """`text` with the place it is about in front, as compilers write it."""
    return f"{name}:{line}: {text}" if line else f"{name}: {text}"


def read_json(text: str, name: str) -> Source:
    """Read JSON. Lines are not known, except in the error about what is not JSON.

    Raises InvalidRequest for what is not JSON, for a key given twice, and for values that
    the contract has no room for (see `judged`).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InvalidRequest(located(name, 0, f"key {twice!r} is given twice; keep one of them"))
        return result

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InvalidRequest(located(name, error.lineno, f"expected JSON: {error.msg}")) from error
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(located(name, 0, f"nested too deeply, or a number too long: {error}")) from error
    return judged(Source(name, data, {}))


def judged(source: Source) -> Source:
    """The source, if all its values can go to the log: else raises InvalidRequest.

    Text has no NUL and no lone surrogate, numbers are finite and fit into 64 bits, nesting ends
    at NESTING_MAX levels.
    """
    stack: list[tuple[Any, int, int]] = [(source.data, 0, 0)]
    while stack:
        value, depth, line = stack.pop()
        if isinstance(value, dict | list):
            if depth == NESTING_MAX:
                raise source.error(line, f"expected at most {NESTING_MAX} levels of nesting, found more")
            stack.extend(_inside(source, cast("dict[str, Any] | list[Any]", value), depth + 1))
        elif fault := _fault(value):
            raise source.error(line, fault)
    return source


def _inside(
    source: Source, container: dict[str, Any] | list[Any], depth: int
) -> Iterator[tuple[Any, int, int]]:
    """Keys and values of a container, each with its depth and line."""
    if isinstance(container, list):
        yield from ((item, depth, source.line(container)) for item in container)
        return
    for key, item in container.items():
        line = source.line(container, key)
        yield key, depth, line
        yield item, depth, line


def _fault(value: object) -> str | None:
    """What the contract has against a scalar."""
    if isinstance(value, str):
        return None if _is_sound(value) else f"text {value[:40]!r} has a NUL or half a surrogate pair in it"
    if isinstance(value, float) and value - value != 0.0:
        return f"expected a finite number, found {value}"
    if isinstance(value, int) and not -INTEGER_MAX <= value <= INTEGER_MAX:
        return f"number {str(value)[:40]} is too large; write it as text, in quotes"
    return None


def _is_sound(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
