"""What ``longspan bench parallel`` measures, and on what it depends."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelSettings:
    """What a measurement depends on, besides the machine."""

    ranks: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int


@dataclass
class ParallelTiming:
    """One operation under one schedule; seconds of forward and backward, of every repeat."""

    operation: str
    schedule: str
    alone: list[float]
    """One rank with all of the sequence."""
    together: list[float]
    """The slowest of all ranks."""
    messages: list[float]
    """What that rank spent in collectives, waiting for others included."""
    error: float
    """Of the output and gradients, relative to those of the single rank."""

    @property
    def speedup(self) -> float:
        """How many times as fast as one rank."""
        return statistics.median(self.alone) / statistics.median(self.together)
