"""Multi-query associative recall: a task that shows how much a mixer can remember.

Its examples are generated on demand. Zoology (arXiv 2312.04927, sec. 3 and appendix E.1) and Based
(arXiv 2402.18668). An example is one document::

    k1 v1 k2 v2 ... kN vN  |  . . k2 . . . k1 . . . ...

The ``pairs`` of a key and a value come first. Then each key is asked for once, at the first token
of one of the ``(length - 2 pairs) / 2`` places of two tokens, and the label there is its value. No
other label counts, and all other tokens are fillers.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..recipe.schema import MQARConfig, Recipe
from .samples import FixedLengthSteps, HeldOutSamples, Sample, Splits, seeded_generator

# Streams of examples. The seeds of each begin with its number, so that no two streams share an
# example, unless by chance.
TRAINING_STREAM = 1
HELD_OUT_STREAM = 2
EVALUATION_STREAM = 3

_CHUNK = 64  # examples made at once: one at a time, they would take longer than the model
_VERSION = 1  # raised with every change of which examples a seed gives


class RecallExamples(NamedTuple):
    """Examples of one length with one number of pairs. All arrays are int64."""

    tokens: np.ndarray
    """``[count, length]``"""
    query_positions: np.ndarray
    """Where each key is asked for: ``[count, pairs]``."""
    answers: np.ndarray
    """The value of each key that is asked for: ``[count, pairs]``."""


class _Chunk(NamedTuple):
    """Consecutive samples. All arrays are ``[_CHUNK, seq_length]``."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def make_examples(
    task: MQARConfig, count: int, length: int, pairs: int, generator: np.random.Generator
) -> RecallExamples:
    """Make ``count`` examples, each with this number of ``pairs``.

    They must fit: ``length`` is even, ``4 * pairs <= length`` and ``pairs <= task.keys``.
    """
    # All three are [count, pairs]. Keys begin at 1, values at the middle of the vocabulary.
    keys = 1 + _draw_without_replacement(np.ones(task.keys), count, pairs, generator)
    first_value = task.vocab_size - task.values
    values = first_value + _draw_without_replacement(np.ones(task.values), count, pairs, generator)
    num_places = (length - 2 * pairs) // 2
    place_weights = np.arange(1.0, num_places + 1) ** (task.power_a - 1)
    places = _draw_without_replacement(place_weights, count, pairs, generator)
    query_positions = 2 * pairs + 2 * places

    tokens = np.zeros((count, length), np.int64)
    if task.random_fillers:
        tokens = generator.integers(task.vocab_size, size=(count, length))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(tokens, query_positions, keys, axis=1)
    return RecallExamples(tokens, query_positions, answers=values)


def _draw_without_replacement(
    weights: np.ndarray, count: int, num_drawn: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw items one after another, with odds in proportion to their weights.

    Each item arrives after a time from the exponential distribution of rate ``weights``, and the
    first arrivals are drawn. (The logarithm of that is the Gumbel top-k trick, arXiv 1903.06059.)

    Returns:
        numbers of items: ``[count, num_drawn]``.
    """
    times = generator.standard_exponential((count, len(weights))) / weights
    first = np.argpartition(times, num_drawn - 1, axis=1)[:, :num_drawn]
    order = np.argsort(np.take_along_axis(times, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)


class MQARSamples:
    """Endless fresh examples, each with a number of pairs drawn evenly from those of the task.

    Args:
        task: the recipe's.
        seq_length: tokens of an example.
        seeds: of all that is drawn; the first is the number of a stream.
    """

    bytes_per_token = None

    def __init__(self, task: MQARConfig, seq_length: int, seeds: tuple[int, ...]):
        self.task = task
        self.seq_length = seq_length
        self.seeds = seeds
        self._documents = np.zeros(seq_length, np.int32)
        self._chunk = lru_cache(maxsize=2)(self._make_chunk)

    def sample(self, number: int) -> Sample:
        """Return sample ``number``: a pure function of the seeds and the number."""
        chunk_number, row = divmod(number, _CHUNK)
        chunk = self._chunk(chunk_number)
        return Sample(
            chunk.tokens[row], chunk.labels[row], chunk.weights[row], self._documents, padding=0
        )

    def _make_chunk(self, chunk_number: int) -> _Chunk:
        generator = seeded_generator(*self.seeds, chunk_number)
        pairs_of_row = generator.choice(self.task.pairs, _CHUNK)
        shape = (_CHUNK, self.seq_length)
        tokens = np.zeros(shape, np.int64)
        labels = np.zeros(shape, np.int64)
        weights = np.zeros(shape, np.float32)

        for pairs in sorted(set(self.task.pairs)):
            rows = np.flatnonzero(pairs_of_row == pairs)
            examples = make_examples(self.task, len(rows), self.seq_length, pairs, generator)
            tokens[rows] = examples.tokens
            labels[rows[:, None], examples.query_positions] = examples.answers
            weights[rows[:, None], examples.query_positions] = 1.0
        return _Chunk(tokens, labels, weights)


@dataclass(frozen=True)
class MQARData:
    """The data of a recipe with ``data.mqar``: a :class:`~.prepare.PreparedData`."""

    task: MQARConfig

    @property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of the task and of how its examples are drawn."""
        described = json.dumps(
            [_VERSION, _CHUNK, self.task.model_dump(mode="json")], sort_keys=True
        )
        return {"mqar": hashlib.sha256(described.encode()).hexdigest()}

    @property
    def reads_special_tokens(self) -> bool:
        return False

    @property
    def text(self) -> None:
        """There is none."""
        return None

    def samples(self, recipe: Recipe, vocab_size: int) -> Splits:
        length = recipe.training.seq_length
        seed = recipe.training.seed
        training = MQARSamples(self.task, length, (TRAINING_STREAM, seed))
        held_out = MQARSamples(self.task, length, (HELD_OUT_STREAM, seed))
        return Splits(
            FixedLengthSteps(training, length, recipe.training.global_batch_size),
            HeldOutSamples(held_out, self.task.held_out),
        )
