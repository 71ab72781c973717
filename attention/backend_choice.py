"""Which backend a call got, and why no faster one."""

from collections import Counter
from typing import NamedTuple


class BackendChoice(NamedTuple):
    """A kind of call, the backend that ``auto`` gave it, and what kept others from it."""

    operation: str
    """softmax or linear."""
    call: str
    """What of the call decides."""
    backend: str
    refusals: tuple[tuple[str, str], ...]
    """(backend, reason) for those that are faster where they can be had."""


choices: Counter[BackendChoice] = Counter()
"""How often each choice was made in this process."""
