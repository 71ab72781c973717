"""What the sequences of a step are: how long, and which samples."""

from typing import Protocol

from .packing import Sample, Samples


class StepSampler(Protocol):
    """All of it is a pure function of the recipe and the step."""

    bytes_per_token: float | None
    """None where it is not known, or there is no text."""

    def length(self, step: int) -> int:
        """Tokens of each sequence of a step (from 0): the recipe's ``seq_length``, or that over a power of two, of which a step
        has as many times the sequences.
        """
        ...

    def sample(self, step: int, number: int) -> Sample:
        """Sequence ``number`` of a step."""
        ...


class FixedLengthSteps:
    """Steps that take samples in their order."""

    def __init__(self, samples: Samples, seq_length: int, sequences: int):
        self.samples, self.seq_length, self.sequences = samples, seq_length, sequences
        self.bytes_per_token = samples.bytes_per_token

    def length(self, step: int) -> int:
        return self.seq_length

    def sample(self, step: int, number: int) -> Sample:
        return self.samples.sample(step * self.sequences + number)
