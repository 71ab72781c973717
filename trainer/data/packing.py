"""Documents packed to sequences of one length: which tokens make sample ``n`` is a pure function of the seed and ``n``."""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from .corpus import Corpus


class Sample(NamedTuple):
    """One sequence. All arrays are ``[seq_length]``."""

    tokens: np.ndarray
    """int64 ids."""
    labels: np.ndarray
    """int64: what is to be predicted, in text the next token of the same document."""
    weights: np.ndarray
    """float32: 1 where the label counts; in text 0 on a document's last token and on padding."""
    documents: np.ndarray
    """int32, non-decreasing: attention stays within equal ids. Padding belongs to the document before it."""
    padding: int
    """Tokens that only fill up to a document's aligned start or to the sequence's end."""


class Samples(Protocol):
    """Where batches come from: text, or a task that is made as it is asked for."""

    bytes_per_token: float | None
    """None where it is not known, or there is no text."""

    def sample(self, number: int) -> Sample:
        """Sample ``number``, from 0 and without end: a pure function of the recipe."""
        ...


class HeldOutSamples(Samples, Protocol):
    samples_per_epoch: int
    """How many there are; what has a higher number is in no evaluation."""


class PackedCorpus:
    """Samples of a corpus, epoch after epoch.

    An epoch lays all documents end to end, each starting at a multiple of ``alignment``, and cuts the line every
    ``seq_length`` tokens. A document cut by an edge goes on in the next sample, where its positions start again at 0.

    Args:
        order: seeds of the documents' order in each epoch; None leaves them as they are (held-out data).
    """

    def __init__(self, corpus: Corpus, seq_length: int, alignment: int, order: tuple[int, ...] | None):
        assert seq_length % alignment == 0
        self.corpus, self.seq_length, self.order = corpus, seq_length, order
        self._epoch = lru_cache(maxsize=2)(self._lay_out)  # of this corpus alone: a mixture walks through several
        self.bytes_per_token = corpus.bytes_per_token
        self._room = -(-corpus.lengths // alignment) * alignment
        self.samples_per_epoch = int(-(-self._room.sum() // seq_length))

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of an endless sequence of epochs."""
        epoch, number = divmod(number, self.samples_per_epoch)
        order, ends = self._epoch(epoch)
        at = number * self.seq_length
        place = int(np.searchsorted(ends, at, side="right"))
        skip = at - int(ends[place] - self._room[order[place]])  # into the first document
        tokens, labels, weights, documents = (np.zeros(self.seq_length, d) for d in (np.int64, np.int64, np.float32, np.int32))
        filled = real = document = 0
        while filled < self.seq_length and place < len(order):
            index = order[place]
            length, room = int(self.corpus.lengths[index]) - skip, int(self._room[index]) - skip
            here = min(length, self.seq_length - filled)
            ids = self.corpus.read(index, skip, min(here + 1, length))
            piece = slice(filled, filled + here)
            tokens[piece] = ids[:here]
            labels[filled : filled + len(ids) - 1] = ids[1:]
            weights[filled : filled + len(ids) - 1] = 1.0
            stop = min(filled + room, self.seq_length)
            documents[filled:stop] = document
            filled, real, document, place, skip = stop, real + here, document + 1, place + 1, 0
        documents[filled:] = document - 1
        return Sample(tokens, labels, weights, documents, self.seq_length - real)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in this epoch's order, and where the room of each ends on the line."""
        order = np.arange(len(self.corpus))
        if self.order is not None:
            order = np.random.Generator(np.random.PCG64((*self.order, epoch))).permutation(order)
        return order, np.cumsum(self._room[order])


class Mixture:
    """Samples drawn from several packed corpora in proportion to their weights.

    Sample ``n`` comes from the corpus that is furthest behind its share, as in Megatron's blended datasets, so the order
    does not depend on how many samples will be asked for.
    """

    def __init__(self, corpora: list[PackedCorpus], weights: list[float]):
        self.corpora = corpora
        self._shares = np.array(weights) / sum(weights)
        ratios = [packed.bytes_per_token for packed in corpora]
        self.bytes_per_token = None if None in ratios else float(np.dot(self._shares, ratios))
        self._taken: list[tuple[int, int]] = []  # (corpus, its own sample number) of every sample so far
        self._counts = np.zeros(len(corpora), np.int64)

    def sample(self, number: int) -> Sample:
        while len(self._taken) <= number:
            corpus = int(np.argmax(self._shares * (len(self._taken) + 1) - self._counts))
            self._taken.append((corpus, int(self._counts[corpus])))
            self._counts[corpus] += 1
        corpus, own = self._taken[number]
        return self.corpora[corpus].sample(own)
