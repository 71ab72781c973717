"""Tables of text on a terminal."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

_NUMBER = re.compile(r"[\d,.]+(e[+-]\d+)?( ?(%|ms|GiB|MiB))?")


class Column(NamedTuple):
    """How the cells of a column stand."""

    align: Literal["left", "right", "number"] = "number"
    """``number``: numbers, with or without a unit, stand to the right, other cells to the left."""
    width: int = 0
    """Of at least this many characters."""


def table(rows: Sequence[Sequence[str]], columns: Sequence[Column] = ()) -> str:
    """Return lines of text whose columns are as wide as their widest cell.

    Args:
        rows: cells. A row with fewer cells than the first ends in a text that runs over the columns
            after it.
        columns: of the first columns; those after them are ``Column()``.
    """
    columns = [*columns, *[Column()] * (len(rows[0]) - len(columns))]
    widths = [column.width for column in columns]
    for row in rows:
        for number, cell in enumerate(_cells_of(row, len(columns))):
            widths[number] = max(widths[number], len(cell))

    lines = []
    for row in rows:
        cells = _cells_of(row, len(columns))
        texts = [
            cell.rjust(width) if _stands_right(cell, column) else cell.ljust(width)
            for cell, column, width in zip(cells, columns, widths, strict=False)
        ]
        texts += row[len(cells) :]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


def _cells_of(row: Sequence[str], num_columns: int) -> Sequence[str]:
    """Return the cells that stand in a column: not the text at the end of a shorter row."""
    return row if len(row) == num_columns else row[:-1]


def _stands_right(cell: str, column: Column) -> bool:
    if column.align == "number":
        return _NUMBER.fullmatch(cell) is not None
    return column.align == "right"
