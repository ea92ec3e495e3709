"""Text that people write, YAML or JSON, as plain data that remembers its lines.

YAML is read from the parser's events, not with its own constructor, because that
- lets a key given twice win silently, and builds what repeated aliases stand for at any size;
- forgets lines, which errors for people need;
- follows YAML 1.1, where `no` is false, `010` is 8, `12:30` is 750 and `on` is a key named true.

Here plain scalars are null, true, false, decimal numbers or text, and keys are always text:
close to the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). Anchors,
aliases and merge keys (`<<`) work, within EXPANDED_MAX. Nothing recurses.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, TypeAlias, cast

import yaml
from msgspec import Struct

from agentflow.errors import InvalidRequest
from agentflow.limits import INTEGER_MAX

NESTING_MAX: Final = 64
"""Deepest nesting of lists and mappings in a file."""
EXPANDED_MAX: Final = 64 * 1024 * 1024
"""Largest size a file may reach by its aliases, at NODE_SIZE and its length for each value."""
NODE_SIZE: Final = 8
INTEGER_DIGITS_MAX: Final = 19

# What a mapping or list, and each key of a mapping, stands on: by identity of the container.
Lines: TypeAlias = dict[tuple[int, str | None], int]

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"-?(0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?")
_TEXT_TAGS: Final = frozenset({None, "!", "tag:yaml.org,2002:str"})
_CONTAINER_TAGS: Final = frozenset({None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    the contract has no room for (see `_judge`).
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
    return _judge(Source(name, data, {}))


def read_yaml(text: str, name: str) -> Source:
    """Read one YAML document.

    Raises InvalidRequest, with the line, for what is not YAML, a key given twice, tags, several
    documents, aliases that expand beyond EXPANDED_MAX, and for values that the contract has no
    room for (see `_judge`).
    """
    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 0
        what = f"{error.context or ''} {error.problem or ''}".strip()
        raise InvalidRequest(located(name, line, f"expected YAML: {what}")) from error
    except yaml.YAMLError as error:
        raise InvalidRequest(located(name, 0, f"expected YAML: {error}")) from error
    return _judge(Source(name, builder.root, builder.lines))


class _Open(Struct):
    """A list or mapping whose end has not been read yet."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    line: int
    size: int = NODE_SIZE
    key: str | None = None
    """The key whose value comes next."""
    merges: list[dict[str, Any]] = []


class _Builder:
    """Builds data from parser events, bottom up, on an explicit stack."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Any = None
        self.lines: Lines = {}
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._merged: list[dict[str, Any]] = []  # kept, for `lines` knows containers by their identity
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        """Go one event further."""
        mark = event.start_mark
        line = mark.line + 1 if mark else 0
        match event:
            case yaml.ScalarEvent():
                self._scalar(event, line)
            case yaml.AliasEvent():
                self._alias(event, line)
            case yaml.MappingStartEvent():
                self._open({}, event, line)
            case yaml.SequenceStartEvent():
                self._open([], event, line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._close()
            case yaml.DocumentStartEvent():
                self._document(line)
            case _:
                pass

    def _document(self, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            raise self._error(line, "expected one document, found a second one after '---'")

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        if event.tag not in _TEXT_TAGS:
            raise self._error(line, f"tag {event.tag!r} has no meaning here; leave it out")
        plain = event.implicit[0] and not event.style
        if self._awaits_key():
            self._key(event.value, line, merge=plain and event.value == "<<")
            return
        value = self._plain(event.value, line) if plain else event.value
        self._add(value, NODE_SIZE + len(event.value), event.anchor, line)

    def _plain(self, text: str, line: int) -> str | float | bool | None:
        """What an unquoted scalar means."""
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if _INTEGER.fullmatch(text):
            if len(text.lstrip("-")) > INTEGER_DIGITS_MAX:
                raise self._error(
                    line, f"number {text[:40]} is too large; put it in quotes to keep it as text"
                )
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _awaits_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None

    def _key(self, key: str, line: int, *, merge: bool) -> None:
        parent = self._stack[-1]
        if key in parent.value and not merge:
            first = self.lines[id(parent.value), key]
            raise self._error(line, f"key {key!r} is given twice, first on line {first}; keep one of them")
        parent.key = key
        parent.size += len(key)
        if not merge:
            self.lines[id(parent.value), key] = line

    def _alias(self, event: yaml.AliasEvent, line: int) -> None:
        if event.anchor not in self._anchors:
            raise self._error(line, f"alias *{event.anchor} stands before the end of its anchor, or has none")
        value, size = self._anchors[event.anchor]
        if self._awaits_key():
            raise self._error(line, "expected a key, found an alias")
        self._add(value, size, None, line)

    def _open(self, value: dict[str, Any] | list[Any], event: yaml.CollectionStartEvent, line: int) -> None:
        if event.tag not in _CONTAINER_TAGS:
            raise self._error(line, f"tag {event.tag!r} has no meaning here; leave it out")
        if self._awaits_key():
            raise self._error(line, "expected a key, found a list or mapping; put text with braces in quotes")
        if len(self._stack) == NESTING_MAX:
            raise self._error(line, f"expected at most {NESTING_MAX} levels of nesting, found more")
        self.lines[id(value), None] = line
        self._stack.append(_Open(value, event.anchor, line))

    def _close(self) -> None:
        done = self._stack.pop()
        for merged in done.merges:
            self._merge(merged, cast("dict[str, Any]", done.value))
        self._add(done.value, done.size, done.anchor, done.line)

    def _add(self, value: object, size: int, anchor: str | None, line: int) -> None:
        """Put a finished value where it belongs."""
        if anchor is not None:
            self._anchors[anchor] = (value, size)
        if not self._stack:
            self.root = value
            return
        parent = self._stack[-1]
        parent.size += size
        if parent.size > EXPANDED_MAX:
            raise self._error(line, f"aliases make this file larger than {EXPANDED_MAX >> 20} MiB")
        self._attach(parent, value, line)

    def _attach(self, parent: _Open, value: object, line: int) -> None:
        if isinstance(parent.value, list):
            parent.value.append(value)
            return
        key, parent.key = parent.key, None
        assert key is not None
        if (id(parent.value), key) in self.lines:
            parent.value[key] = value
        else:
            parent.merges.extend(self._mappings(value, line))

    def _mappings(self, value: object, line: int) -> Iterator[dict[str, Any]]:
        """What stands after `<<`: a mapping or a list of them."""
        for item in cast("list[object]", value) if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise self._error(line, "expected a mapping after '<<', found something else")
            self._merged.append(cast("dict[str, Any]", item))
            yield self._merged[-1]

    def _merge(self, merged: dict[str, Any], into: dict[str, Any]) -> None:
        """Add the keys that are not given already."""
        for key, value in merged.items():
            if key not in into:
                into[key] = value
                self.lines[id(into), key] = self.lines[id(merged), key]

    def _error(self, line: int, text: str) -> InvalidRequest:
        return InvalidRequest(located(self.name, line, text))


def _judge(source: Source) -> Source:
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
