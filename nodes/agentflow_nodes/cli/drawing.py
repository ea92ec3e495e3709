"""Pictures of history: bars over time and curves, as text, SVG and Mermaid.

Names come from anybody: as text they pass `clean`, in SVG and Mermaid they are escaped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from msgspec import Struct
from rich.text import Text

from agentflow_nodes.cli.output import MARKS, STYLES, clean, duration

_COLOURS: Final = {
    "pending": "#b8b8b8",
    "ready": "#d8a800",
    "running": "#2090c0",
    "completed": "#3a9a3a",
    "failed": "#c83030",
    "skipped": "#909090",
    "cancelled": "#a050a0",
}
_CURVES: Final = ("#2090c0", "#d8a800", "#3a9a3a", "#c83030", "#a050a0")
_FONT: Final = 'font-family="sans-serif" font-size="12"'
_WIDTH: Final = 900
_LEFT: Final = 220
_ROW: Final = 22
_HEIGHT: Final = 320
_LABEL_MAX: Final = 30
_TICKS: Final = 5

Scale = Callable[[float], float]


class Bar(Struct, frozen=True):
    """A task on a line of time; milliseconds since the beginning of what is shown."""

    name: str
    state: str
    ready_ms: float
    """From here it waited for a worker."""
    start_ms: float
    end_ms: float


def gantt_text(bars: Sequence[Bar], width: int) -> list[Text]:
    """A line for each bar, `width` characters in all: dots while it waited, blocks while it ran."""
    total = max((bar.end_ms for bar in bars), default=0) or 1
    label = min(_LABEL_MAX, max((len(clean(bar.name)) for bar in bars), default=0))
    room = max(10, width - label - 24)
    lines = []
    for bar in bars:
        ready, start, end = (round(each / total * room) for each in (bar.ready_ms, bar.start_ms, bar.end_ms))
        shown = " " * ready + "·" * (start - ready) + "█" * max(1, end - start)
        line = Text(
            f"{MARKS.get(bar.state, ' ')} {clean(bar.name)[:label]:<{label}}  ", STYLES.get(bar.state, "")
        )
        line.append(f"{shown[: room + 1]:<{room + 1}}", STYLES.get(bar.state, ""))
        lines.append(line.append(f"  {duration(bar.end_ms - bar.start_ms)}", "bright_black"))
    return lines


def gantt_svg(bars: Sequence[Bar], title: str) -> str:
    """The same as a picture: pale while it waited, in its state's colour while it ran."""
    total = max((bar.end_ms for bar in bars), default=0) or 1
    height = _ROW * len(bars) + 60

    def x(ms: float) -> float:
        return _LEFT + ms / total * (_WIDTH - _LEFT - 20)

    parts = [_head(height, title), *_time_axis(x, total, 40, height - 20)]
    for row, bar in enumerate(bars):
        y, colour = 45 + row * _ROW, _COLOURS.get(bar.state, "#606060")
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{_xml(bar.name[:_LABEL_MAX])}</text>',
            _rectangle(x(bar.ready_ms), y + 6, x(bar.start_ms) - x(bar.ready_ms), 6, "#dddddd"),
            _rectangle(x(bar.start_ms), y, max(1.0, x(bar.end_ms) - x(bar.start_ms)), _ROW - 6, colour),
        ]
    return "\n".join([*parts, "</svg>\n"])


def plot_svg(curves: Mapping[str, Sequence[float]], total_ms: float, title: str) -> str:
    """Curves over the same equal stretches of time."""
    top = max((value for values in curves.values() for value in values), default=0) or 1
    bottom = _HEIGHT - 40

    def x(ms: float) -> float:
        return 70 + ms / (total_ms or 1) * (_WIDTH - 90)

    def y(value: float) -> float:
        return bottom - value / top * (bottom - 60)

    parts = [_head(_HEIGHT, title), *_time_axis(x, total_ms, 60, bottom)]
    for tick in range(_TICKS):
        value = top * tick / (_TICKS - 1)
        parts.append(f'<text x="62" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    for (name, values), colour, place in zip(curves.items(), itertools.cycle(_CURVES), itertools.count()):
        step = total_ms / max(1, len(values))
        points = " ".join(f"{x((n + 0.5) * step):.1f},{y(value):.1f}" for n, value in enumerate(values))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{80 + place * 130}" y="46" fill="{colour}">{_xml(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _head(height: int, title: str) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {_FONT}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="10" y="22" font-size="15">{_xml(title)}</text>'
    )


def _time_axis(x: Scale, total_ms: float, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in range(_TICKS):
        ms = total_ms * tick / (_TICKS - 1)
        place = f"{x(ms):.1f}"
        parts += [
            f'<line x1="{place}" y1="{top}" x2="{place}" y2="{bottom}" stroke="#e4e4e4"/>',
            f'<text x="{place}" y="{bottom + 15}" text-anchor="middle">{duration(ms) or "0"}</text>',
        ]
    return parts


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, width):.1f}" height="{height}" fill="{colour}"/>'


def _xml(text: str) -> str:
    return escape(clean(text), {'"': "&quot;"})


def mermaid(nodes: Sequence[tuple[str, str]], edges: Sequence[tuple[str, str]]) -> str:
    """A graph of names with their states; an edge leads from what is needed to what needs it."""
    numbers = {name: f"n{number}" for number, (name, _) in enumerate(nodes)}
    lines = ["flowchart LR"]
    lines += [f'    {numbers[name]}["{_label(name)}<br>{state}"]:::{state}' for name, state in nodes]
    lines += [f"    {numbers[needed]} --> {numbers[name]}" for needed, name in edges]
    used = sorted({state for _, state in nodes} & _COLOURS.keys())
    lines += [f"    classDef {state} fill:{_COLOURS[state]},color:#fff" for state in used]
    return "\n".join(lines)


def _label(name: str) -> str:
    return "".join(each if each.isalnum() or each in " _-./" else f"#{ord(each)};" for each in clean(name))
