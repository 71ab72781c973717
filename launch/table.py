"""Plain tables on a terminal."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[\d,.]+(e[+-]\d+)?( ?(%|ms|GiB|MiB))?")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers stand to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        sized = zip(row, widths, strict=True)
        cells = [
            cell.rjust(width) if _NUMBER.fullmatch(cell) else cell.ljust(width)
            for cell, width in sized
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
