"""Documents packed into sequences of one length.

Which tokens make up sample ``n`` is a pure function of the seeds and ``n``.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from .corpus import Corpus
from .samples import Sample, seeded_generator

_Number = TypeVar("_Number", int, np.ndarray)


class DocumentSlice(NamedTuple):
    """The tokens ``start .. start + num_tokens`` of a document."""

    document: int
    start: int
    num_tokens: int


class Packing(ABC):
    """Samples of one corpus, epoch after epoch.

    Documents start at multiples of ``alignment``. If a document is cut, its part in another sample
    is a document of its own there, whose positions start at 0.

    Args:
        corpus: the documents.
        seq_length: tokens of a sample; a multiple of ``alignment``.
        alignment: of the documents' first positions.
        shuffle_seeds: seeds of what is shuffled in each epoch; None leaves all in its order
            (held-out data).
    """

    samples_per_epoch: int

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        alignment: int,
        shuffle_seeds: tuple[int, ...] | None,
    ):
        assert seq_length % alignment == 0
        self.corpus = corpus
        self.seq_length = seq_length
        self.alignment = alignment
        self.shuffle_seeds = shuffle_seeds
        self.bytes_per_token = corpus.bytes_per_token

    def sample(self, number: int) -> Sample:
        """Return sample ``number`` of an endless sequence of epochs."""
        epoch, number_in_epoch = divmod(number, self.samples_per_epoch)
        return self._lay_out(self.slices(epoch, number_in_epoch))

    @abstractmethod
    def slices(self, epoch: int, number: int) -> Iterable[DocumentSlice]:
        """Return what sample ``number`` of an epoch is made of, in order."""

    def shuffled(self, count: int, epoch: int, *more_seeds: int) -> np.ndarray:
        """Return the numbers ``0 .. count`` in the order of an epoch."""
        if self.shuffle_seeds is None:
            return np.arange(count)
        return seeded_generator(*self.shuffle_seeds, epoch, *more_seeds).permutation(count)

    def _lay_out(self, slices: Iterable[DocumentSlice]) -> Sample:
        tokens = np.zeros(self.seq_length, np.int64)
        labels = np.zeros(self.seq_length, np.int64)
        weights = np.zeros(self.seq_length, np.float32)
        documents = np.zeros(self.seq_length, np.int32)

        start = 0  # of the next slice in the sample
        num_documents = 0
        num_tokens = 0
        for document, slice_start, length in slices:
            # With the token after the slice, if the document has one: the label of its last token.
            left_in_document = int(self.corpus.lengths[document]) - slice_start
            ids = self.corpus.read(document, slice_start, min(length + 1, left_in_document))
            num_labels = len(ids) - 1
            tokens[start : start + length] = ids[:length]
            labels[start : start + num_labels] = ids[1:]
            weights[start : start + num_labels] = 1.0

            stop = min(start + _round_up(length, self.alignment), self.seq_length)
            documents[start:stop] = num_documents
            start = stop
            num_documents += 1
            num_tokens += length

        documents[start:] = num_documents - 1  # padding belongs to the last document
        return Sample(tokens, labels, weights, documents, padding=self.seq_length - num_tokens)


class PackedCorpus(Packing):
    """Documents laid end to end and cut every ``seq_length`` tokens.

    Padding only aligns documents and fills the last sample of an epoch, but a document that crosses
    the edge of a sample is cut there.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        alignment: int,
        shuffle_seeds: tuple[int, ...] | None,
    ):
        super().__init__(corpus, seq_length, alignment, shuffle_seeds)
        # Cached per corpus, not per class: a mixture goes through several corpora at once.
        self._epoch = lru_cache(maxsize=2)(self._lay_end_to_end)
        self._aligned_lengths = _round_up(corpus.lengths, alignment)
        self.samples_per_epoch = int(-(-self._aligned_lengths.sum() // seq_length))

    def slices(self, epoch: int, number: int) -> Iterable[DocumentSlice]:
        order, ends = self._epoch(epoch)
        sample_start = number * self.seq_length
        # The document in which the sample starts, and how many of its tokens lie before.
        place = int(np.searchsorted(ends, sample_start, side="right"))
        skipped = sample_start - int(ends[place] - self._aligned_lengths[order[place]])

        filled = 0
        while filled < self.seq_length and place < len(order):
            document = int(order[place])
            left_in_document = int(self.corpus.lengths[document]) - skipped
            yield DocumentSlice(document, skipped, min(left_in_document, self.seq_length - filled))
            filled += int(self._aligned_lengths[document]) - skipped
            place += 1
            skipped = 0

    def _lay_end_to_end(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in an epoch's order, and the end of each on the line.

        An end includes the gap that aligns the next document.
        """
        order = self.shuffled(len(self.corpus), epoch)
        return order, np.cumsum(self._aligned_lengths[order])


class BestFitCorpus(Packing):
    """Best-fit packing (arXiv 2404.10830): documents are cut only if they are longer than a sample.

    Whole samples are cut from the front of a long document. What is left of it, and the shorter
    documents, fill samples as well as they can: the longest first, each in the sample with the
    least space that suffices.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        alignment: int,
        shuffle_seeds: tuple[int, ...] | None,
    ):
        super().__init__(corpus, seq_length, alignment, shuffle_seeds)
        self._epoch = lru_cache(maxsize=2)(self._pack)

        full_slices, rests = np.divmod(corpus.lengths, seq_length)
        counts = full_slices + (rests > 0)
        documents = np.repeat(np.arange(len(corpus)), counts)
        starts = concatenated_ranges(counts) * seq_length
        num_tokens = np.minimum(corpus.lengths[documents] - starts, seq_length)
        self._slices = np.stack([documents, starts, num_tokens], 1)  # [slices, 3]
        self.samples_per_epoch = len(self._epoch(0))  # the same in any order

    def slices(self, epoch: int, number: int) -> Iterable[DocumentSlice]:
        return [DocumentSlice(*map(int, self._slices[i])) for i in self._epoch(epoch)[number]]

    def _pack(self, epoch: int) -> list[list[int]]:
        """Return the numbers of the slices in each sample of an epoch.

        Which slices of equal length come together differs from epoch to epoch.
        """
        bins = self._fill_bins(self.shuffled(len(self._slices), epoch, 0))
        return [bins[i] for i in self.shuffled(len(bins), epoch, 1)]

    def _fill_bins(self, order: np.ndarray) -> list[list[int]]:
        """Put every slice into a bin, the longest first; ``order`` is that of equal lengths."""
        sizes = _round_up(self._slices[order, 2], self.alignment)
        longest_first = np.argsort(-sizes, kind="stable")

        bins: list[list[int]] = []
        bins_by_space: dict[int, list[int]] = {}  # numbers of the bins with so much space left
        spaces: list[int] = []  # the keys of bins_by_space, ascending
        for slice_number, size in zip(
            order[longest_first].tolist(), sizes[longest_first].tolist(), strict=True
        ):
            place = bisect_left(spaces, size)
            if place < len(spaces):
                space = spaces[place]
                bin_number = bins_by_space[space].pop()
                if not bins_by_space[space]:
                    del bins_by_space[space], spaces[place]
                bins[bin_number].append(slice_number)
            else:
                space = self.seq_length
                bin_number = len(bins)
                bins.append([slice_number])

            space_left = space - size
            if space_left > 0:
                if space_left not in bins_by_space:
                    insort(spaces, space_left)
                bins_by_space.setdefault(space_left, []).append(bin_number)
        return bins


def concatenated_ranges(counts: np.ndarray) -> np.ndarray:
    """Return ``0 .. count`` for each of ``counts``, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _round_up(number: _Number, multiple: int) -> _Number:
    return -(-number // multiple) * multiple
