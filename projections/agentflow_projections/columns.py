"""Rows kept column by column: what comes a frame at a time is added a column at a time.

Python takes longer to make a row than to compute what is in it, so rows of which a hundred
are alike are never made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

Row = tuple[Any, ...]
Column = list[Any]


class Columns(Sequence[Row]):
    """Rows of one table, in the order in which they were added. Read as a sequence of tuples."""

    __slots__ = ("_columns", "_rows", "append", "extend")

    def __init__(self) -> None:
        self._columns: list[Column] = []
        self._rows: list[Row] = []
        """Rows that came after what the columns hold."""
        self.append = self._rows.append
        self.extend = self._rows.extend

    def extend_columns(self, columns: Sequence[Sequence[Any]]) -> None:
        """Add rows by their columns, which are all of one length."""
        own = self.columns()
        if not own:
            self._columns = [list(column) for column in columns]
            return
        for before, column in zip(own, columns, strict=True):
            before.extend(column)

    def columns(self) -> list[Column]:
        """The values by column; none if there are no rows."""
        if self._rows:
            added = zip(*self._rows, strict=True)
            if self._columns:
                for before, column in zip(self._columns, added, strict=True):
                    before.extend(column)
            else:
                self._columns = [list(column) for column in added]
            self._rows.clear()
        return self._columns

    def take(self) -> Columns:
        """All rows; none are left here."""
        taken = Columns()
        taken._columns, self._columns = self.columns(), []
        return taken

    def __len__(self) -> int:
        return (len(self._columns[0]) if self._columns else 0) + len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(zip(*self.columns(), strict=True))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Columns) and self.columns() == other.columns()

    __hash__ = None  # type: ignore[assignment] # rows are added: it cannot be a key
