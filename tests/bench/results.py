"""What every bench does with its figures: measure those that are named, show them beside their targets.

The last line that a bench prints is one JSON object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

from rich.console import Console
from rich.table import Table

from tests.bench.conditions import Value, conditions_table

Targets: TypeAlias = Mapping[str, tuple[str, float | None, bool]]
"""By key: what a person reads, the target, and whether more is better."""
_DIGITS: Final = 4


async def measure_named(
    figures: Mapping[str, Callable[[], Awaitable[Mapping[str, Any]]]], names: list[str], progress: Console
) -> dict[str, Any]:
    """Measure the named figures, or all. Raises SystemExit for a name there is not."""
    unknown = set(names) - set(figures)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(figures)}")
    found: dict[str, Any] = {}
    for name in names or figures:
        progress.print(f"measuring {name} …", style="dim")
        found.update(await figures[name]())
    return found


def figures_table(title: str, targets: Targets, found: Mapping[str, Any]) -> Table:
    """The figures beside their targets."""
    shown = Table("figure", "key", "measured", "target", title=title)
    for key, (text, target, more) in targets.items():
        if key not in found:
            continue
        good = target is None or (found[key] >= target if more else found[key] <= target)
        wanted = "" if target is None else f"{'≥' if more else '≤'} {target:,g}"
        shown.add_row(text, key, f"[{'green' if good else 'red'}]{found[key]:,.4g}[/]", wanted)
    return shown


def show(before: dict[str, Value], *tables: Table, width: int = 120) -> None:
    """Print the conditions and the tables."""
    shown = Console(width=width)
    for table in (conditions_table(before), *tables):
        shown.print(table)


def print_last_line(found: Mapping[str, Any], before: Mapping[str, Value], **more: float) -> None:
    """Print the JSON object: the figures that are numbers, and under what load they were measured."""
    rounded = {key: round(value, _DIGITS) for key, value in found.items() if isinstance(value, int | float)}
    machine = {"cores": os.cpu_count(), "load_before": before.get("load average")}
    print(json.dumps({**rounded, **more, **machine}))
