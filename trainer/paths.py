"""Paths as people write them: ``~/runs/a`` and ``$SCRATCH/a``."""

import os
import re

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>\w+)|\{(?P<braced>\w+)\}|(?P<other>\{))")


def expand_path(path: str) -> str:
    """Return a path with ``$NAME``, ``${NAME}`` and a ``~`` at its beginning replaced.

    ``$$`` stands for a dollar sign, and ``./~`` for a folder of that name.

    Raises:
        ValueError: naming the variable that is not set, or what else keeps this from being a path.
    """
    expanded = os.path.expanduser(_VARIABLE.sub(_value_of, path))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{user[1:]} is no user of this machine; write ./{user} for such a folder")
    try:
        has_null = b"\0" in os.fsencode(expanded)
    except UnicodeEncodeError:
        has_null = True
    if has_null:
        raise ValueError("has characters that no path can have")
    return expanded


def escape_path(path: str) -> str:
    """Return what :func:`expand_path` turns into this path, which is expanded already."""
    return path.replace("$", "$$")


def _value_of(variable: re.Match) -> str:
    if variable["dollar"]:
        return "$"
    if variable["other"]:
        raise ValueError("only $NAME and ${NAME} are replaced, and $$ by a dollar sign")
    name = variable["name"] or variable["braced"]
    value = os.environ.get(name)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise ValueError(
            f"the environment variable {name} {state}; set it, or write $$ for a dollar sign"
        )
    return value
