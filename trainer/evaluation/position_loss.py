"""The held-out loss by position in the context, and what text far back is worth to the model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..engines.engine import Engine
from ..errors import UserError
from .scoring import batch_slices, ignore_progress

_FIRST_RANGE = 16  # tokens; every other range ends at twice the position where it starts


class LossRange(NamedTuple):
    """The loss at positions ``start .. stop`` of documents. The fields are keys of reports."""

    start: int
    stop: int
    loss: float
    """Mean, in nats per token."""
    gain: float | None
    """How much more the same tokens cost if the text begins at position ``start / 2``: the worth of
    what lies before, to tokens that have at least as many others before them. None for the first
    range.
    """
    error: float | None
    """Standard error of the gain over documents; None for a single document, or without a gain."""


def choose_lengths(corpus: Corpus, requested: list[int] | None, trained: int) -> list[int]:
    """Return the lengths to measure at.

    Args:
        corpus: held-out text.
        requested: by the user. None stands for the trained length, twice and four times as many
            tokens, as far as two documents have them.
        trained: tokens that the model was trained on.

    Raises:
        UserError: if no document is as long as requested.
    """
    num_labels = np.sort(corpus.lengths - 1)  # the last token has none
    longest = int(num_labels[-1])
    second_longest = int(num_labels[-2:][0])
    for length in requested or [_FIRST_RANGE]:
        if length < _FIRST_RANGE:
            raise UserError(f"--lengths: must be at least {_FIRST_RANGE}, got {length}")
        if length > longest:
            raise UserError(
                f"--lengths: {length:,}, but the longest document of {corpus.prefix} "
                f"has {longest:,} labels"
            )
    if requested:
        return requested

    lengths = [factor * trained for factor in (1, 2, 4) if factor * trained <= second_longest]
    largest_power_of_two = 1 << int(math.log2(second_longest or 1))
    return lengths or [max(_FIRST_RANGE, largest_power_of_two)]


def choose_documents(corpus: Corpus, length: int, at_most: int) -> np.ndarray:
    """Return some of the documents that have ``length`` labels, evenly from the corpus."""
    long_enough = np.flatnonzero(corpus.lengths > length)
    count = min(at_most, len(long_enough))
    return long_enough[np.linspace(0, len(long_enough) - 1, count).astype(int)]


def position_loss(
    engine: Engine,
    corpus: Corpus,
    length: int,
    documents: np.ndarray,
    advance: Callable[[int], None] = ignore_progress,
) -> list[LossRange]:
    """Measure the loss of the first ``length`` tokens of documents, in ranges that double.

    The text at a late position may be easier or harder than at an early one, so the losses of two
    ranges say little about their contexts. The gain compares the same tokens with and without a
    part of theirs.

    Args:
        engine: with the model.
        corpus: that has the documents.
        length: in tokens.
        documents: numbers of documents that have ``length`` labels.
        advance: called with the number of documents that are done.
    """
    ranges = _doubling_ranges(length)
    with_all = []  # per batch [batch, ranges]: the loss with all text before it
    with_less = []  # the same without a part of it
    for batch in batch_slices(len(documents), length):
        texts = [corpus.read(int(document), 0, length + 1) for document in documents[batch]]
        ids = torch.from_numpy(np.stack(texts)).to(engine.device)  # [batch, length + 1]
        batch_with_all, batch_with_less = _range_losses(engine, ids, ranges)
        with_all.append(batch_with_all)
        with_less.append(batch_with_less)
        advance(len(ids))

    losses = np.concatenate(with_all)  # [documents, ranges]
    gains = np.concatenate(with_less) - losses
    return [
        _loss_range(start, stop, losses[:, i], gains[:, i])
        for i, (start, stop) in enumerate(ranges)
    ]


def _range_losses(
    engine: Engine, ids: Tensor, ranges: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean losses of each range, with all the text before it and with a part of it.

    Both are ``[batch, ranges]``, and equal for the first range.
    """

    def losses(begin: int, stop: int) -> Tensor:
        """Return the losses at positions ``begin .. stop`` if the text begins at ``begin``."""
        tokens = ids[:, begin:stop]
        labels = ids[:, begin + 1 : stop + 1]
        return engine.token_losses(tokens, labels)[0].double()

    whole = losses(0, ids.shape[1] - 1)  # [batch, length]
    with_all = [whole[:, start:stop].mean(1) for start, stop in ranges]
    with_less = [with_all[0]]
    for start, stop in ranges[1:]:
        begin = start // 2
        with_less.append(losses(begin, stop)[:, start - begin :].mean(1))
    return torch.stack(with_all, 1).cpu().numpy(), torch.stack(with_less, 1).cpu().numpy()


def _loss_range(start: int, stop: int, losses: np.ndarray, gains: np.ndarray) -> LossRange:
    """Take the means over documents; ``losses`` and ``gains`` are ``[documents]``."""
    loss = float(losses.mean())
    if start == 0:
        return LossRange(start, stop, loss, gain=None, error=None)
    error = None
    if len(gains) > 1:
        error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
    return LossRange(start, stop, loss, float(gains.mean()), error)


def _doubling_ranges(length: int) -> list[tuple[int, int]]:
    """Split ``0 .. length`` into ranges ``(start, stop)``, each as long as all before it."""
    ranges = [(0, min(_FIRST_RANGE, length))]
    while ranges[-1][1] < length:
        start = ranges[-1][1]
        ranges.append((start, min(2 * start, length)))
    return ranges
