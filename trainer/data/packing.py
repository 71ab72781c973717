"""Documents packed to sequences of one length: which tokens make sample ``n`` is a pure function of the seed and ``n``."""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable
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


class Piece(NamedTuple):
    """Of a document the tokens ``start .. start + count``."""

    document: int
    start: int
    count: int


class Packing(ABC):
    """Samples of a corpus, epoch after epoch. Documents start at multiples of ``alignment``; of one that is cut, what is in
    another sample stands there as a document of its own, whose positions start at 0.

    Args:
        order: seeds of what is shuffled in each epoch; None leaves all as it is (held-out data).
    """

    samples_per_epoch: int

    def __init__(
        self, corpus: Corpus, seq_length: int, alignment: int, order: tuple[int, ...] | None
    ):
        assert seq_length % alignment == 0
        self.corpus, self.seq_length, self.alignment, self.order = (
            corpus,
            seq_length,
            alignment,
            order,
        )
        self.bytes_per_token = corpus.bytes_per_token

    def sample(self, number: int) -> Sample:
        """Sample ``number`` of an endless sequence of epochs."""
        return self._lay_out(self.pieces(*divmod(number, self.samples_per_epoch)))

    @abstractmethod
    def pieces(self, epoch: int, number: int) -> Iterable[Piece]:
        """What sample ``number`` of an epoch is made of."""

    def shuffled(self, count: int, epoch: int, *more: int) -> np.ndarray:
        """``0 .. count`` in the order of an epoch."""
        if self.order is None:
            return np.arange(count)
        return np.random.Generator(np.random.PCG64((*self.order, epoch, *more))).permutation(count)

    def _lay_out(self, pieces: Iterable[Piece]) -> Sample:
        length = self.seq_length
        tokens, labels, weights, documents = (
            np.zeros(length, d) for d in (np.int64, np.int64, np.float32, np.int32)
        )
        filled = real = number = 0
        for document, start, count in pieces:
            ids = self.corpus.read(
                document, start, min(count + 1, int(self.corpus.lengths[document]) - start)
            )
            tokens[filled : filled + count] = ids[:count]
            labels[filled : filled + len(ids) - 1] = ids[1:]
            weights[filled : filled + len(ids) - 1] = 1.0
            stop = min(filled + -(-count // self.alignment) * self.alignment, length)
            documents[filled:stop] = number
            filled, real, number = stop, real + count, number + 1
        documents[filled:] = number - 1
        return Sample(tokens, labels, weights, documents, length - real)


class PackedCorpus(Packing):
    """An epoch lays all documents end to end and cuts the line every ``seq_length`` tokens: no room is lost, and a document
    that crosses an edge is cut there.
    """

    def __init__(
        self, corpus: Corpus, seq_length: int, alignment: int, order: tuple[int, ...] | None
    ):
        super().__init__(corpus, seq_length, alignment, order)
        self._epoch = lru_cache(maxsize=2)(
            self._line
        )  # of this corpus alone: a mixture walks through several
        self._room = -(-corpus.lengths // alignment) * alignment
        self.samples_per_epoch = int(-(-self._room.sum() // seq_length))

    def pieces(self, epoch: int, number: int) -> Iterable[Piece]:
        order, ends = self._epoch(epoch)
        at = number * self.seq_length
        place = int(np.searchsorted(ends, at, side="right"))
        skip = at - int(ends[place] - self._room[order[place]])  # into the first document
        filled = 0
        while filled < self.seq_length and place < len(order):
            index = int(order[place])
            yield Piece(
                index, skip, min(int(self.corpus.lengths[index]) - skip, self.seq_length - filled)
            )
            filled, place, skip = filled + int(self._room[index]) - skip, place + 1, 0

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in this epoch's order, and where the room of each ends on the line."""
        order = self.shuffled(len(self.corpus), epoch)
        return order, np.cumsum(self._room[order])


class BestFitCorpus(Packing):
    """Documents are cut only where they are longer than a sequence; what is left of them and the shorter ones fill sequences as
    well as they can, the longest first, each where least room remains (best-fit packing, arXiv 2404.10830).
    """

    def __init__(
        self, corpus: Corpus, seq_length: int, alignment: int, order: tuple[int, ...] | None
    ):
        super().__init__(corpus, seq_length, alignment, order)
        self._epoch = lru_cache(maxsize=2)(self._pack)
        whole, rest = np.divmod(corpus.lengths, seq_length)
        counts = whole + (rest > 0)
        documents = np.repeat(np.arange(len(corpus)), counts)
        starts = places(counts) * seq_length
        self._pieces = np.stack(
            [documents, starts, np.minimum(corpus.lengths[documents] - starts, seq_length)], 1
        )
        self.samples_per_epoch = len(self._epoch(0))  # as many in any order

    def pieces(self, epoch: int, number: int) -> Iterable[Piece]:
        return [Piece(*map(int, self._pieces[index])) for index in self._epoch(epoch)[number]]

    def _pack(self, epoch: int) -> list[list[int]]:
        """Numbers of the pieces in each sample. Which of equal length come together differs from epoch to epoch."""
        bins = self._bins(self.shuffled(len(self._pieces), epoch, 0))
        return [bins[index] for index in self.shuffled(len(bins), epoch, 1)]

    def _bins(self, order: np.ndarray) -> list[list[int]]:
        room = -(-self._pieces[order, 2] // self.alignment) * self.alignment
        longest_first = np.argsort(-room, kind="stable")
        bins: list[list[int]] = []
        left: dict[int, list[int]] = {}  # bins by the room that is left in them
        sizes: list[int] = []  # of that, ascending
        for index, size in zip(
            order[longest_first].tolist(), room[longest_first].tolist(), strict=True
        ):
            place = bisect_left(sizes, size)
            if place < len(sizes):
                free = sizes[place]
                number = left[free].pop()
                if not left[free]:
                    del left[free], sizes[place]
                bins[number].append(index)
            else:
                free, number = self.seq_length, len(bins)
                bins.append([index])
            if free > size:
                if free - size not in left:
                    insort(sizes, free - size)
                left.setdefault(free - size, []).append(number)
        return bins


def places(counts: np.ndarray) -> np.ndarray:
    """``0 .. count`` for each of ``counts``, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class Mixture:
    """Samples drawn from several packed corpora in proportion to their weights.

    Of every 1,024 samples each corpus has its share, evenly spread: which corpus sample ``n`` comes from needs no others
    before it.
    """

    _CYCLE = 1024

    def __init__(self, corpora: list[Packing], weights: list[float]):
        self.corpora = corpora
        self._shares = np.array(weights) / sum(weights)
        self._drawn = lru_cache(maxsize=2)(self._draw)
        ratios = [packed.bytes_per_token for packed in corpora]
        self.bytes_per_token = None if None in ratios else float(np.dot(self._shares, ratios))

    def sample(self, number: int) -> Sample:
        if len(self.corpora) == 1:
            return self.corpora[0].sample(number)
        cycle, place = divmod(number, self._CYCLE)
        corpus, own = self._drawn(cycle)[place]
        return self.corpora[corpus].sample(int(own))

    def _draw(self, cycle: int) -> np.ndarray:
        """The corpus of each sample of a cycle, and its number there."""
        first, last = self._before(cycle), self._before(cycle + 1)
        counts = last - first
        corpora = np.repeat(np.arange(len(counts)), counts)
        own = places(counts)
        order = np.argsort((own + 0.5) / counts[corpora], kind="stable")
        return np.stack([corpora, own + first[corpora]], 1)[order]

    def _before(self, cycle: int) -> np.ndarray:
        """Samples of each corpus before a cycle, rounded so that they add up."""
        edges = np.rint(np.cumsum(self._shares) * cycle * self._CYCLE).astype(np.int64)
        edges[-1] = cycle * self._CYCLE
        return np.diff(edges, prepend=0)
