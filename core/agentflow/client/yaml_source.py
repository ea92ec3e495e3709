"""YAML as plain data that remembers its lines.

YAML is read from the parser's events, not with its own constructor, because that
- lets a key given twice win silently, and builds what repeated aliases stand for at any size;
- forgets lines, which errors for people need;
- follows YAML 1.1, where `no` is false, `010` is 8, `12:30` is 750 and `on` is a key named true.

Here plain scalars are null, true, false, decimal numbers or text, and keys are always text:
close to the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). Anchors,
aliases and merge keys (`<<`) work, within EXPANDED_MAX. Nothing recurses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, cast

import yaml
from msgspec import Struct

from agentflow.client.sources import NESTING_MAX, Lines, Source, judged, located
from agentflow.errors import InvalidRequest

EXPANDED_MAX: Final = 64 * 1024 * 1024
"""Largest size a file may reach by its aliases, at NODE_SIZE and its length for each value."""
NODE_SIZE: Final = 8
INTEGER_DIGITS_MAX: Final = 19

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"-?(0|[1-9][0-9]*)?\.[0-9]+([eE][-+]?[0-9]+)?")
_TEXT_TAGS: Final = frozenset({None, "!", "tag:yaml.org,2002:str"})
_CONTAINER_TAGS: Final = frozenset({None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str, name: str) -> Source:
    """Read one YAML document.

    Raises InvalidRequest, with the line, for what is not YAML, a key given twice, tags, several
    documents, aliases that expand beyond EXPANDED_MAX, and for values that the contract has no
    room for (see `judged`).
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
    return judged(Source(name, builder.root, builder.lines))


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
