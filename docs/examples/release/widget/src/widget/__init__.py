"""Arithmetic with Roman numerals."""

from widget.roman import add, from_roman, to_roman

__all__ = ["add", "from_roman", "to_roman"]
__version__ = "1.2.0"
