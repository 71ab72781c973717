"""Where in the code something happens."""

import sys
from functools import cache
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parents[2]
_REHEARSAL = tuple(
    str(_PACKAGE / "launch" / part) for part in ("rehearsal", "workers/rehearse.py", "process.py")
)
_OTHERS = ("megatron", "deepspeed", "fla", "triton")
"""Packages whose code is shown beside longspan's own."""


def place(depth: int = 3) -> str:
    """Return the innermost calls of longspan, Megatron-core and the like, the last one first.

    torch's own are left out.
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < depth:
        if file := _short(frame.f_code.co_filename):
            found.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "autograd"


@cache
def _short(file: str) -> str | None:
    """Return how a file is shown, or None if it is not."""
    _, _, installed = file.rpartition("/site-packages/")
    if installed != file:
        return installed if installed.startswith(_OTHERS) else None
    path = Path(file)
    if file.startswith(_REHEARSAL) or not path.is_relative_to(_PACKAGE):
        return None
    return str(path.relative_to(_PACKAGE))
