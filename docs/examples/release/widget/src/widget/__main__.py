"""`python -m widget 1994`, `python -m widget XIV + XXVIII`, `python -m widget --version`."""

from __future__ import annotations

import sys

from widget import __version__, add, from_roman, to_roman

USAGE = "usage: widget NUMBER | NUMERAL | NUMERAL + NUMERAL | --version"


def answer(words: list[str]) -> str:
    """What to print for the words of a command line. Raises ValueError for those without a meaning."""
    match words:
        case ["--version"]:
            return __version__
        case [first, "+", second]:
            return add(first, second)
        case [number] if number.isdecimal():
            return to_roman(int(number))
        case [numeral]:
            return str(from_roman(numeral))
    raise ValueError(USAGE)


def main() -> int:
    """Answer the command line."""
    try:
        print(answer(sys.argv[1:]))  # noqa: T201 - this is what the program is for
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
