"""Files that are written whole or not at all."""

import contextlib
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole: a process that is killed here leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
