"""How help looks: plain text in sections, examples as they were written.

Rich's boxed help would take longer to load than everything else that help needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

_VERBATIM: Final = "\b\n"
_INDENT: Final = " " * 4
_SHORTER: Final = (
    (re.compile(r" <(?:int|float)(?: range)?>"), " N"),
    (re.compile(r" <str>"), " TEXT"),
    (re.compile(r" <path>"), " PATH"),
    (re.compile(r" <list\[str\]>"), ""),
    (re.compile(r"(?:; )?[0-9.]*(?:<=)?x[<>]=[0-9.]+"), ""),
    (re.compile(r"default: \((.*?)\)"), r"default: \1"),
    (re.compile(r"\[default: (?:0|0\.0|\[\]|\{\})\]"), ""),
    (re.compile(r"\[\]$"), ""),
)


def verbatim_blocks(text: str) -> str:
    """Mark indented paragraphs to be printed as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(_VERBATIM + part if part.startswith(_INDENT) else part for part in paragraphs)


class Command(TyperCommand):
    """A command whose help keeps examples, and puts the options all commands share last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["help"] = verbatim_blocks(kwargs.get("help") or "")
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options, section by section."""
        _write_sections(formatter, _sections(ctx, self.get_params(ctx)))


class Group(TyperGroup):
    """All commands, by what they are for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["help"] = verbatim_blocks(kwargs.get("help") or "")
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first: they are what people look for."""
        self.format_commands(ctx, formatter)
        _write_sections(formatter, _sections(ctx, self.get_params(ctx)))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Commands, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            summary = command.get_short_help_str(formatter.width)
            sections.setdefault(command.rich_help_panel, []).append((f"{name:<14}", summary))
        _write_sections(formatter, sections)


def _sections(ctx: Any, params: Iterable[Any]) -> dict[str, list[tuple[str, str]]]:
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in params:
        record = param.get_help_record(ctx)
        if record is None:
            continue
        record = _plainer(*record)
        section = "Arguments" if param.param_type_name == "argument" else "Options"
        sections.setdefault(getattr(param, "rich_help_panel", None) or section, []).append(record)
    return sections


def _plainer(option: str, text: str) -> tuple[str, str]:
    """Say what to write in place of a Python type, and leave out what goes without saying."""
    for pattern, shorter in _SHORTER:
        option, text = pattern.sub(shorter, option), pattern.sub(shorter, text)
    return option, text


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for name, rows in sections.items():
        if rows:
            with formatter.section(name):
                formatter.write_dl(rows)
