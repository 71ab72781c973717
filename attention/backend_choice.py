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

    @property
    def is_slow(self) -> bool:
        """Whether torch computes by its formulas what kernels refused."""
        return self.backend == "torch" and bool(self.refusals)

    @property
    def reasons(self) -> str:
        """What kept faster backends from it, in a line; empty if nothing did."""
        return "; ".join(f"{name} {reason}" for name, reason in self.refusals)


choices: Counter[BackendChoice] = Counter()
"""How often each choice was made in this process."""
