"""What all data looks like to a run: sequences, and which of them each step takes."""

from typing import NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    """One sequence. All arrays are ``[seq_length]``."""

    tokens: np.ndarray
    """int64 token ids."""
    labels: np.ndarray
    """int64: the token to predict at each position; in text, the next one of the same document."""
    weights: np.ndarray
    """float32: 1 where the label counts. In text, 0 on a document's last token and on padding."""
    documents: np.ndarray
    """int32, non-decreasing: attention stays within equal ids. Padding has the id of the document
    before it.
    """
    padding: int
    """Tokens that only fill the gap up to a document's aligned start or to the sequence's end."""


class Samples(Protocol):
    """An endless source of sequences: text, or a task whose examples are generated on demand."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per token; None if it is not known, or if there is no text."""
        ...

    def sample(self, number: int) -> Sample:
        """Return sample ``number``, from 0 without end: a pure function of the recipe."""
        ...


class StepSampler(Protocol):
    """The training sequences of each step: a pure function of the recipe and the step."""

    @property
    def bytes_per_token(self) -> float | None:
        """As for :class:`Samples`."""
        ...

    def length(self, step: int) -> int:
        """Return the tokens of each sequence of a step (from 0).

        This is the recipe's ``seq_length``, or that divided by a power of two. A step of shorter
        sequences has more of them, so that every step has the same number of tokens.
        """
        ...

    def sample(self, step: int, number: int) -> Sample:
        """Return sequence ``number`` of a step."""
        ...


class HeldOutSamples(NamedTuple):
    """The sequences of an evaluation: the first ``num_samples`` of ``samples``."""

    samples: Samples
    num_samples: int

    @property
    def bytes_per_token(self) -> float | None:
        """As for :class:`Samples`."""
        return self.samples.bytes_per_token


class Splits(NamedTuple):
    """What a recipe trains on, and what it is evaluated on (None if nothing is held out)."""

    training: StepSampler
    held_out: HeldOutSamples | None


class FixedLengthSteps:
    """Steps of ``sequences_per_step`` sequences of one length, taken in their order."""

    def __init__(self, samples: Samples, seq_length: int, sequences_per_step: int):
        self.samples = samples
        self.seq_length = seq_length
        self.sequences_per_step = sequences_per_step
        self.bytes_per_token = samples.bytes_per_token

    def length(self, step: int) -> int:
        return self.seq_length

    def sample(self, step: int, number: int) -> Sample:
        return self.samples.sample(step * self.sequences_per_step + number)


def seeded_generator(*seeds: int) -> np.random.Generator:
    """Return a generator whose numbers are a pure function of the ``seeds``, on every machine."""
    return np.random.Generator(np.random.PCG64(seeds))
