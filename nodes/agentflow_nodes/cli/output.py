"""Showing things: to people in calm tables, to programs as JSON.

Titles, errors and output of tasks come from anybody. A terminal obeys what it is shown, so
nothing of it reaches one before `clean` took out what is no text; and it is always handed to
rich as `Text`, never as markup.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC and other strings: titles, links, clipboard
    r"|[ -/]*[0-~])"
)
# C0, DEL, C1, bidirectional overrides, line and paragraph separators, lone surrogates.
_CONTROLS: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_PICTURES: Final = 0x2400
_DELETE: Final = 0x7F
_PIPE_WIDTH: Final = 10_000
"""Nothing is cut for want of columns where there are none."""

STYLES: Final = {
    "pending": "bright_black",
    "ready": "yellow",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "skipped": "bright_black",
    "cancelled": "magenta",
    "active": "green",
    "busy": "cyan",
    "draining": "yellow",
    "stalled": "magenta",
    "offline": "red",
    "lost": "red",
    "left": "bright_black",
}
MARKS: Final = {
    "pending": "·",
    "ready": "○",
    "running": "●",
    "completed": "✓",
    "failed": "✗",
    "skipped": "↷",
    "cancelled": "⊘",
}
DIM: Final = "bright_black"


def clean(text: str, *, lines: bool = False) -> str:
    """Untrusted text with all that could steer a terminal taken out or made visible.

    With `lines` line ends stay and tabs become spaces; without, it comes out as one line.
    """
    text = _ESCAPES.sub("", text)
    if lines:
        text = text.replace("\r\n", "\n").expandtabs(4)
        return "\n".join(_CONTROLS.sub(_visible, line) for line in text.split("\n"))
    return _CONTROLS.sub(_visible, text.replace("\n", " ").replace("\t", " "))


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < ord(" "):
        return chr(_PICTURES + code)
    return "␡" if code == _DELETE else "\N{REPLACEMENT CHARACTER}"


def plain(text: str, style: str = "", *, lines: bool = False) -> Text:
    """Untrusted text for rich."""
    if lines:
        return Text(clean(text, lines=True), style=style)
    return Text(clean(text), style=style, no_wrap=True, overflow="ellipsis")


def state_text(state: str, *, mark: bool = True) -> Text:
    """A state, in its colour and with its mark."""
    shown = f"{MARKS[state]} {state}" if mark and state in MARKS else state
    return Text(shown, style=STYLES.get(state, ""))


@lru_cache(maxsize=2)
def console(*, stderr: bool = False) -> Console:
    """The terminal, or whatever stands in for it."""
    from rich.console import Console  # noqa: PLC0415 - JSON needs none

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An unruled table with these column heads; those in `right` hold numbers."""
    from rich.table import Table  # noqa: PLC0415 - JSON needs none

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=DIM)
    for column in columns:
        # Of a table too wide, these are cut first.
        shrinks = column in {"title", "error", "offers", "runs"}
        made.add_column(
            column, justify="right" if column in right else "left", no_wrap=not shrinks, overflow="ellipsis"
        )
    return made


def say(text: str, style: str = "") -> None:
    """A line for the person at the terminal, beside the output proper."""
    console(stderr=True).print(plain(text, style, lines=True), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document, on one line."""
    sys.stdout.write(encode_json(value) + "\n")
    sys.stdout.flush()


def encode_json(value: Any) -> str:
    """JSON on one line, in ASCII: no terminal takes it for anything else."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def print_lines(text: str) -> None:
    """Untrusted text as it is, line by line, when people read it; to a pipe unchanged."""
    if console().is_terminal:
        console().print(plain(text, lines=True), soft_wrap=True)
    else:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")


_MS_PER_S: Final = 1000.0
_S_PER_MINUTE: Final = 60
_S_PER_HOUR: Final = 3600
_S_PER_DAY: Final = 86_400
_FINE_MS: Final = 10


def duration(ms: float | None) -> str:
    """How long something took: 4.2 ms, 340 ms, 2.1 s, 3 m 05 s, 2 h 10 m, 3 d 4 h."""
    if ms is None:
        return ""
    if ms < _MS_PER_S:
        return f"{ms:.1f} ms" if 0 < ms < _FINE_MS else f"{ms:.0f} ms"
    seconds = ms / _MS_PER_S
    if seconds < _S_PER_MINUTE:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < _S_PER_HOUR:
        return f"{whole // 60} m {whole % 60:02} s"
    if whole < _S_PER_DAY:
        return f"{whole // _S_PER_HOUR} h {whole % _S_PER_HOUR // 60:02} m"
    return f"{whole // _S_PER_DAY} d {whole % _S_PER_DAY // _S_PER_HOUR} h"


def moment(ms: int) -> str:
    """A time of day here, with the date if that is not today."""
    if not ms:
        return ""
    then = datetime.fromtimestamp(ms / _MS_PER_S).astimezone()
    now = datetime.now().astimezone()
    return then.strftime("%H:%M:%S" if then.date() == now.date() else "%Y-%m-%d %H:%M:%S")
