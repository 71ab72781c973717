"""The held-out loss by the place in the context, and what text far back is worth to the model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..data.corpus import Corpus
from ..engines.engine import Engine
from ..errors import UserError
from .at_once import sequences_at_once

_FIRST = 16  # tokens of the first range; each ends at twice the place of the one before


class Range(NamedTuple):
    """Places ``start .. stop`` of documents."""

    start: int
    stop: int
    loss: float
    """Mean, in nats a token."""
    gain: float | None
    """How much more the same tokens cost where the text begins at place ``start / 2``: the worth of what lies before that, to
    tokens that have at least as many others before them. None for the first range.
    """
    error: float | None
    """Standard error of the gain, over documents; None where there is one, or no gain."""


def lengths_of(corpus: Corpus, asked: list[int] | None, trained: int) -> list[int]:
    """Those that were asked for; else the trained one, twice and four times as many tokens, where two documents have them.

    Raises:
        UserError: where no document is that long.
    """
    labels = np.sort(corpus.lengths - 1)  # the last token has none
    longest, second = int(labels[-1]), int(labels[-2:][0])
    for length in asked or [_FIRST]:
        if length < _FIRST:
            raise UserError(f"--lengths: must be at least {_FIRST}, got {length}")
        if length > longest:
            raise UserError(
                f"--lengths: {length:,}, but the longest document of {corpus.prefix} has {longest:,} labels"
            )
    if asked:
        return asked
    return [times * trained for times in (1, 2, 4) if times * trained <= second] or [
        max(_FIRST, 1 << int(math.log2(second or 1)))
    ]


def documents_of(corpus: Corpus, length: int, most: int) -> np.ndarray:
    """At most so many of those that have ``length`` labels, evenly from the corpus."""
    able = np.flatnonzero(corpus.lengths > length)
    return able[np.linspace(0, len(able) - 1, min(most, len(able))).astype(int)]


def position_loss(
    engine: Engine,
    corpus: Corpus,
    length: int,
    documents: np.ndarray,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Range]:
    """Of the first ``length`` tokens of these documents, in ranges of places that double.

    What stands late in a text may be easier or harder than its beginning, so losses of two ranges say little of the context
    that they have. The gain compares the same tokens with and without a part of theirs.
    """
    size, edges = sequences_at_once(length), _edges(length)
    found: list[
        np.ndarray
    ] = []  # [2, documents, ranges]: with all that lies before, and without a part
    for first in range(0, len(documents), size):
        ids = np.stack(
            [
                corpus.read(int(document), 0, length + 1)
                for document in documents[first : first + size]
            ]
        )
        ids = torch.from_numpy(ids).to(engine.device)

        def losses(begin: int, stop: int, ids=ids) -> torch.Tensor:
            """Of the labels of places ``begin .. stop`` where the text begins there."""
            return engine.token_losses(ids[:, begin:stop], ids[:, begin + 1 : stop + 1])[0].double()

        whole = losses(0, length)
        with_all = [whole[:, start:stop].mean(1) for start, stop in edges]
        without = [
            losses(start // 2, stop)[:, start - start // 2 :].mean(1) for start, stop in edges[1:]
        ]
        found.append(
            torch.stack([torch.stack(with_all, 1), torch.stack([with_all[0], *without], 1)])
            .cpu()
            .numpy()
        )
        advance(len(ids))
    with_all, without = np.concatenate(found, axis=1)
    ranges = []
    for i, (start, stop) in enumerate(edges):
        gains, error = without[:, i] - with_all[:, i], None
        if i and len(gains) > 1:
            error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
        ranges.append(
            Range(
                start, stop, float(with_all[:, i].mean()), float(gains.mean()) if i else None, error
            )
        )
    return ranges


def _edges(length: int) -> list[tuple[int, int]]:
    edges = [(0, min(_FIRST, length))]
    while edges[-1][1] < length:
        start = edges[-1][1]
        edges.append((start, min(2 * start, length)))
    return edges
