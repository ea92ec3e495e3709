"""Numbers from 1 to 3999 as Roman numerals."""

from __future__ import annotations

import re

MAX = 3999

_SYMBOLS = (
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)
_NUMERAL = re.compile(r"M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})")
_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def to_roman(number: int) -> str:
    """Write a number from 1 to MAX. Raises ValueError for any other."""
    if not 1 <= number <= MAX:
        message = f"expected 1 to {MAX}, found {number}"
        raise ValueError(message)
    digits: list[str] = []
    for value, symbol in _SYMBOLS:
        count, number = divmod(number, value)
        digits.append(symbol * count)
    return "".join(digits)


def from_roman(numeral: str) -> int:
    """Read a numeral in its usual form. Raises ValueError for anything else."""
    if not numeral or not _NUMERAL.fullmatch(numeral):
        message = f"expected a Roman numeral, found {numeral!r}"
        raise ValueError(message)
    values = [_VALUES[letter] for letter in numeral]
    following = [*values[1:], 0]
    return sum(-value if value < after else value for value, after in zip(values, following, strict=True))


def add(first: str, second: str) -> str:
    """Add two numerals. Raises ValueError if the sum cannot be written."""
    return to_roman(from_roman(first) + from_roman(second))
