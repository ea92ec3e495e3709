"""Rows kept column by column, and made Arrow tables of.

Python takes longer to make a row than to compute what is in it, so rows of which a hundred
are alike are never made: what is the same in all of them is kept once, and Arrow repeats it.
Numbers that differ are kept as Arrow has them.

What is left is converted value by value, and nobody else runs meanwhile: that is done a piece
at a time. A call of Arrow that lets others run may wait for its turn afterwards, so they are few.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, compress, pairwise
from typing import Any, Final, overload

import pyarrow as pa
import pyarrow.compute as pc

Row = tuple[Any, ...]
Column = list[Any]

PIECE: Final = 10_000
"""Values that are converted without a pause: less than a millisecond."""
_ARRAY_BYTES_MAX: Final = 2**31 - 1
"""Bytes of all values of one Arrow array."""
_COUNTED: Final = frozenset({range, array})
_BY_ROW: Final = _COUNTED | {list}
"""Kinds of parts that have a value for each row."""


class Columns(Sequence[Row]):
    """Rows of one table, in the order in which they were added. Read as a sequence of tuples."""

    __slots__ = ("_blocks", "_in_blocks", "_rows", "append", "extend")

    def __init__(self) -> None:
        self._blocks: list[tuple[int, bool, Sequence[Any]]] = []
        """Rows that follow one another: how many, whether all their columns are lists, and these."""
        self._in_blocks = 0
        self._rows: list[Row] = []
        """Rows that came after what the blocks hold."""
        self.append = self._rows.append
        self.extend = self._rows.extend

    def extend_columns(self, count: int, columns: Sequence[Any]) -> None:
        """Add so many rows by their columns.

        A list, a range that counts up by one, and an array of 64-bit numbers have a value for each row;
        anything else is the value of all rows.
        """
        self._settle()
        self._blocks.append((count, False, columns))
        self._in_blocks += count

    def _settle(self) -> None:
        rows = self._rows
        for start in range(0, len(rows), PIECE):
            piece = rows[start : start + PIECE]
            self._blocks.append((len(piece), True, [list(column) for column in zip(*piece, strict=True)]))
            self._in_blocks += len(piece)
        rows.clear()

    def columns(self) -> list[Column]:
        """The values by column; none if there are no rows."""
        self._settle()
        counts = [count for count, _, _ in self._blocks]
        by_column = zip(*(columns for _, _, columns in self._blocks), strict=True)
        return [list(chain.from_iterable(map(_written_out, parts, counts))) for parts in by_column]

    def arrow(self, schema: pa.Schema) -> pa.Table:
        """The rows as a table of Arrow's."""
        self._settle()
        counts, listed, blocks = zip(*self._blocks, strict=True)
        by_column = zip(*blocks, strict=True)
        return pa.Table.from_arrays(_Assembly(counts, listed).columns(schema, by_column), schema=schema)

    def take(self) -> Columns:
        """All rows; none are left here."""
        taken = Columns()
        taken._blocks, self._blocks = self._blocks, []
        taken._in_blocks, self._in_blocks = self._in_blocks, 0
        taken.extend(self._rows)
        self._rows.clear()
        return taken

    def __len__(self) -> int:
        return self._in_blocks + len(self._rows)

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


def arrow_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows of any kind as a table of Arrow's."""
    if isinstance(rows, Columns):
        return rows.arrow(schema)
    found = Columns()
    found.extend(rows)
    return found.arrow(schema)


def _written_out(part: Any, count: int) -> Sequence[Any]:
    return part if type(part) in _BY_ROW else [part] * count


class _Assembly:
    """Puts the columns of one table together, each of its parts in the blocks."""

    def __init__(self, counts: Sequence[int], listed: Sequence[bool]) -> None:
        self._counts: Final = counts
        self._listed: Final = listed
        self._given: Final = [not each for each in listed]
        """Blocks that came by column."""
        self._size: Final = sum(counts)

    def columns(self, schema: pa.Schema, by_column: Iterable[Sequence[Any]]) -> list[Any]:
        """All of them, as Arrow has them; numbers may be wider than the schema says."""
        found: list[Any] = []
        once: dict[int, pa.Array] = {}
        steps: dict[int, pa.Array] = {}
        for at, (kind, parts) in enumerate(zip(schema.types, by_column, strict=True)):
            kinds = set(map(type, compress(parts, self._given)))
            if list in kinds or not kinds:
                values = list(chain.from_iterable(map(_written_out, parts, self._counts)))
                found.append(pa.chunked_array(_converted(values, kind), kind))
                continue
            if kinds & _COUNTED:
                once[at] = self._once(list(map(_first, parts)), pa.int64())
                steps[at] = self._steps(parts)
            elif kinds != {type(None)} or not all(self._given):
                once[at] = self._once(parts, kind)
            found.append(None if at in once else pa.nulls(self._size, kind))
        for at, repeated in zip(once, self._repeated(list(once.values())), strict=True):
            found[at] = pc.call_function("add", [repeated, steps[at]]) if at in steps else repeated
        return found

    def _once(self, parts: Sequence[Any], kind: pa.DataType) -> pa.Array:
        """The values of listed blocks, and of each other block the one that all its rows have."""
        lists = [part if listed else (part,) for part, listed in zip(parts, self._listed, strict=True)]
        made = _converted(list(chain.from_iterable(lists)), kind)
        return made[0] if len(made) == 1 else pa.concat_arrays(made)

    def _steps(self, parts: Sequence[Any]) -> pa.Array:
        """How far numbers are from the first of a range, and from 0 in an array; what is alike is where it is."""
        far = array("q", range(max(self._counts)))
        steps: list[Any] = []
        for part, count in zip(parts, self._counts, strict=True):
            if type(part) is array:
                steps.append(part)
            else:
                steps.append(far[:count] if type(part) is range else bytes(count * far.itemsize))
        return self._in_arrow(b"".join(steps), pa.int64())

    def _repeated(self, columns: Sequence[pa.Array]) -> Sequence[pa.Array]:
        """Columns of what `_once` is made of, with a value for each row."""
        if not columns:
            return ()
        where, at = array("i"), 0
        for count, listed in zip(self._counts, self._listed, strict=True):
            where += array("i", range(at, at + count)) if listed else array("i", (at,)) * count
            at += count if listed else 1
        batch = pa.RecordBatch.from_arrays(columns, names=list(map(str, range(len(columns)))))
        taken: Sequence[pa.Array] = batch.take(self._in_arrow(where, pa.int32())).columns
        return taken

    def _in_arrow(self, values: Any, kind: pa.DataType) -> pa.Array:
        return pa.Array.from_buffers(kind, self._size, [None, pa.py_buffer(values)])


def _first(part: Any) -> Any:
    """What `_steps` counts from."""
    return part.start if type(part) is range else 0 if type(part) is array else part


def _converted(values: list[Any], kind: pa.DataType) -> list[pa.Array]:
    if kind == pa.binary():
        return _joined(values)
    return [pa.array(values[at : at + PIECE], kind) for at in range(0, len(values), PIECE)]


def _joined(values: Sequence[bytes]) -> list[pa.Array]:
    """Frames are large: others get a turn after each."""
    ends = list(accumulate(map(len, values), initial=0))
    if ends[-1] > _ARRAY_BYTES_MAX:
        half = len(values) // 2
        return [*_joined(values[:half]), *_joined(values[half:])]
    data = pa.allocate_buffer(ends[-1])
    into = memoryview(data).cast("B")
    for value, (start, end) in zip(values, pairwise(ends), strict=True):
        into[start:end] = value
    return [pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(array("i", ends)), data])]
