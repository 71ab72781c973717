"""What a check of a recipe finds."""

from collections.abc import Iterator
from typing import NamedTuple


class Problem(NamedTuple):
    """Something wrong with a recipe."""

    key: str
    """Dotted, as ``training.steps``."""
    reason: str
    """What is wrong and how to fix it; read after the key."""


Problems = Iterator[Problem]
