"""Files that are written whole or not at all."""

from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole: a process that is killed here leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
