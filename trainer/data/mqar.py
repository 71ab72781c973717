"""Multi-query associative recall: a task that tells how much a mixer can remember, made as it is asked for.

Zoology (arXiv 2312.04927, sec. 3 and appendix E.1) and Based (arXiv 2402.18668). An example is one document::

    k1 v1 k2 v2 ... kN vN  |  . . k2 . . . k1 . . . ...

The ``pairs`` come first; then each key is asked for once, at the start of one of the ``(length - 2 pairs) / 2`` places of two
tokens, and the label there is its value. No other label counts. All else are fillers.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..recipe.schema import MQARConfig, Recipe
from .packing import Sample
from .steps import FixedLengthSteps

TRAINING, HELD_OUT, EVALUATION = 1, 2, 3
"""Streams of examples. Each is seeded with its own number first, so that no two share an example but by chance."""
_CHUNK = 64  # examples that are made at once: one at a time they would take longer than the model
_LAW = 1  # raised with every change of which examples a seed gives


class Examples(NamedTuple):
    """Some examples of one length and number of pairs. int64 ``[count, length]``, and ``[count, pairs]``."""

    tokens: np.ndarray
    asked: np.ndarray
    """Where each key is asked for."""
    answers: np.ndarray
    """The value of each."""


def examples(
    task: MQARConfig, count: int, length: int, pairs: int, random: np.random.Generator
) -> Examples:
    """``count`` examples, with as many ``pairs`` each.

    They must fit: ``length`` is even, ``4 * pairs <= length`` and ``pairs <= task.keys``.
    """
    keys = 1 + _without_replacement(np.ones(task.keys), count, pairs, random)
    answers = (
        task.vocab_size
        - task.values
        + _without_replacement(np.ones(task.values), count, pairs, random)
    )
    places = np.arange(1.0, (length - 2 * pairs) // 2 + 1)
    asked = 2 * pairs + 2 * _without_replacement(places ** (task.power_a - 1), count, pairs, random)
    tokens = np.zeros((count, length), np.int64)
    if task.random_fillers:
        tokens = random.integers(task.vocab_size, size=(count, length))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = answers
    np.put_along_axis(tokens, asked, keys, axis=1)
    return Examples(tokens, asked, answers)


def stream(*seeds: int) -> np.random.Generator:
    """The random numbers of one part of a stream; ``seeds`` begin with the stream's number."""
    return np.random.Generator(np.random.PCG64(seeds))


def _without_replacement(
    weights: np.ndarray, count: int, taken: int, random: np.random.Generator
) -> np.ndarray:
    """``[count, taken]``: numbers of items, drawn one after the other with chances that go with their ``weights``.

    The first arrivals where each item takes a time from the exponential distribution of rate ``weights``: the logarithm of
    that is the Gumbel top-k trick (arXiv 1903.06059).
    """
    times = random.standard_exponential((count, len(weights))) / weights
    first = np.argpartition(times, taken - 1, axis=1)[:, :taken]
    order = np.argsort(np.take_along_axis(times, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)


class MQARSamples:
    """Endless fresh examples, each with a number of pairs drawn evenly from those of the task.

    Args:
        seeds: of :func:`stream`.
        samples_per_epoch: how many an evaluation takes; None for training, which never sees an example again.
    """

    bytes_per_token = None

    def __init__(
        self,
        task: MQARConfig,
        seq_length: int,
        seeds: tuple[int, ...],
        samples_per_epoch: int | None = None,
    ):
        self.task, self.seq_length, self.seeds, self.samples_per_epoch = (
            task,
            seq_length,
            seeds,
            samples_per_epoch,
        )
        self._documents = np.zeros(seq_length, np.int32)
        self._chunk = lru_cache(maxsize=2)(self._make)

    def sample(self, number: int) -> Sample:
        """Sample ``number``: a pure function of the seeds and the number."""
        chunk, row = divmod(number, _CHUNK)
        tokens, labels, weights = self._chunk(chunk)
        return Sample(tokens[row], labels[row], weights[row], self._documents, padding=0)

    def _make(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = stream(*self.seeds, chunk)
        pairs_of_row = random.choice(self.task.pairs, _CHUNK)
        tokens, labels, weights = (
            np.zeros((_CHUNK, self.seq_length), dtype) for dtype in (np.int64, np.int64, np.float32)
        )
        for pairs in sorted(set(self.task.pairs)):
            rows = np.flatnonzero(pairs_of_row == pairs)
            made = examples(self.task, len(rows), self.seq_length, pairs, random)
            tokens[rows] = made.tokens
            labels[rows[:, None], made.asked] = made.answers
            weights[rows[:, None], made.asked] = 1.0
        return tokens, labels, weights


@dataclass(frozen=True)
class MQARData:
    """The data of a recipe with ``data.mqar``: see :class:`~longspan.trainer.data.prepare.PreparedData`."""

    task: MQARConfig

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the task and the law by which it is made."""
        described = json.dumps([_LAW, _CHUNK, self.task.model_dump(mode="json")], sort_keys=True)
        return {"mqar": hashlib.sha256(described.encode()).hexdigest()}

    def samples(self, recipe: Recipe, vocab_size: int) -> tuple[FixedLengthSteps, MQARSamples]:
        length, seed = recipe.training.seq_length, recipe.training.seed
        held_out = MQARSamples(self.task, length, (HELD_OUT, seed), self.task.held_out)
        training = MQARSamples(self.task, length, (TRAINING, seed))
        return FixedLengthSteps(training, length, recipe.training.global_batch_size), held_out
