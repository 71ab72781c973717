"""The held-out loss by the place in the context, and what the text before it is worth to the model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..data.corpus import Corpus
from ..engine import Engine
from ..errors import UserError

_FIRST = 16  # tokens of the first range; each ends at twice the place of the one before
_TOKENS = 2**14  # in one forward pass, if a document is not longer


class Range(NamedTuple):
    """Places ``start .. stop`` of documents."""

    start: int
    stop: int
    loss: float
    """Mean, in nats a token."""
    gain: float
    """How much more the same tokens cost where the range is all that the model sees; 0 for the first."""
    error: float
    """Standard error of the gain, over documents; NaN for one."""


def default_lengths(corpus: Corpus, trained: int) -> list[int]:
    """The trained one, twice and four times as many, where there are documents of so many tokens."""
    longest = int(corpus.lengths.max()) - 1
    lengths = [times * trained for times in (1, 2, 4) if times * trained <= longest]
    return lengths or [1 << int(math.log2(longest))]


def require_documents(corpus: Corpus, lengths: list[int]) -> None:
    """Refuse a length that no document has, or that no range fits."""
    longest = int(corpus.lengths.max()) - 1  # the last token has no label
    for length in lengths:
        if length < _FIRST:
            raise UserError(f"--lengths: must be at least {_FIRST}, got {length}")
        if length > longest:
            raise UserError(f"--lengths: {length:,}, but the longest document of {corpus.prefix} has {longest:,} labels")


def position_loss(
    engine: Engine, corpus: Corpus, length: int, documents: int, advance: Callable[[int], None] = lambda done: None
) -> tuple[int, list[Range]]:
    """How many documents were read, and the loss in ranges of places that double, over their first ``length`` tokens.

    Only documents of at least ``length`` labels are read, at most ``documents`` of them, evenly from the corpus. What stands
    late in a text may be easier or harder than its beginning, so the same tokens are also read without what lies before.
    """
    able = np.flatnonzero(corpus.lengths > length)
    chosen = able[np.linspace(0, len(able) - 1, min(documents, len(able))).astype(int)]
    size, edges = max(1, _TOKENS // length), _edges(length)
    found: list[np.ndarray] = []  # [2, documents, ranges]: with all that lies before, and without
    for first in range(0, len(chosen), size):
        ids = np.stack([corpus.read(int(document), 0, length + 1) for document in chosen[first : first + size]])
        ids = torch.from_numpy(ids).to(engine.device)
        whole = engine.token_losses(ids[:, :-1], ids[:, 1:])[0].double()
        with_all = [whole[:, start:stop].mean(1) for start, stop in edges]
        alone = [
            engine.token_losses(ids[:, start:stop], ids[:, start + 1 : stop + 1])[0].double().mean(1)
            for start, stop in edges[1:]
        ]
        found.append(torch.stack([torch.stack(with_all, 1), torch.stack([with_all[0], *alone], 1)]).cpu().numpy())
        advance(len(ids))
    losses, alone = np.concatenate(found, axis=1)
    gains, count = alone - losses, len(chosen)
    errors = gains.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(edges), math.nan)
    means = zip(edges, losses.mean(0).tolist(), gains.mean(0).tolist(), errors.tolist(), strict=True)
    return count, [Range(*edge, *numbers) for edge, *numbers in means]


def _edges(length: int) -> list[tuple[int, int]]:
    edges = [(0, min(_FIRST, length))]
    while edges[-1][1] < length:
        start = edges[-1][1]
        edges.append((start, min(2 * start, length)))
    return edges
