"""Ages and sizes as people write them."""

from __future__ import annotations

import re
from typing import Final

from agentflow_nodes.cli.errors import usage

_AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_BYTES: Final = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", 1)
    for unit, base in ((f"{letter}B", 1_000), (f"{letter}iB", 1_024))
}


def parse_age(option: str, text: str) -> float:
    """Seconds of an age like 90s, 15m, 12h, 7d, 2w. Raises CliError."""
    number, unit = _parts(option, text, "an age like 90s, 15m, 12h, 7d or 2w")
    if unit not in _SECONDS:
        raise usage(f"{option}: expected an age like 90s, 15m, 12h, 7d or 2w, found {text!r}")
    return number * _SECONDS[unit]


def parse_size(option: str, text: str) -> int:
    """Bytes of a size like 500MB or 10GiB. Raises CliError."""
    number, unit = _parts(option, text, "a size like 500MB or 10GiB")
    if unit not in _BYTES:
        raise usage(f"{option}: expected a size like 500MB or 10GiB, found {text!r}")
    return int(number * _BYTES[unit])


def _parts(option: str, text: str, expected: str) -> tuple[float, str]:
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise usage(f"{option}: expected {expected}, found {text!r}")
    return float(found[1]), found[2]


def size_text(count: float) -> str:
    """Bytes for people: 340 B, 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000:  # noqa: PLR2004 - to the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} TB"
