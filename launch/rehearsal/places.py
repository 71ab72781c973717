"""Where in the code something happens."""

import sys
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parents[2]
_SELF = str(Path(__file__).parent)


def place(depth: int = 3) -> str:
    """Return the innermost calls of longspan, Megatron-core and the like, the last one first.

    torch's own frames are left out.
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < depth:
        code = frame.f_code
        file = code.co_filename
        is_shown = not (file.startswith((_SELF, "<")) or "/torch/" in file or "/lib/python" in file)
        is_shown |= "/site-packages/" in file and "/torch/" not in file
        if is_shown:
            found.append(f"{_short(file)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "autograd"


def _short(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(_PACKAGE) and "site-packages" not in path.parts[len(_PACKAGE.parts) :]:
        return str(path.relative_to(_PACKAGE))
    return file.rpartition("/site-packages/")[2]
