"""Sequences of several lengths, each from one document.

This is Dataset Decomposition (Pouransari et al., arXiv 2405.13226). Documents are cut into slices
whose lengths are the shortest one times powers of two. A step takes sequences of one length, as
many as make up the same number of tokens. No sequence crosses a document, and short documents cost
no long attention.
"""

from functools import lru_cache

import numpy as np

from .corpus import Corpus
from .mixture import Mixture, mean_bytes_per_token
from .packing import DocumentSlice, Packing, concatenated_ranges
from .samples import Sample, seeded_generator

ODDS = {
    "uniform": lambda rank, count: 1.0,
    "grow_linear": lambda rank, count: float(count - rank),
    "grow_p2": lambda rank, count: 2.0 ** (count - 1 - rank),
    "grow_p100": lambda rank, count: 100.0 ** (count - 1 - rank),
    "shrink_p100": lambda rank, count: 100.0**rank,
}
"""How likely a step takes a length, by its rank among ``count`` lengths, the shortest first: the
paper's curricula.
"""
_ORDER_SEED = 0xB0CCE7  # tells the order of the steps from the order of the samples


class BucketCorpus(Packing):
    """The slices of one length, one in each sample.

    The bucket of the longest length has as many slices of a document as fit. Of the rest, each
    shorter bucket has one slice if the rest's binary digit for its length is 1. The bucket of the
    shortest length also has what is left then, padded.

    Args:
        corpus: the documents.
        seq_length: the bucket's length.
        longest: tokens of the longest bucket's sequences.
        shortest: tokens of the shortest bucket's sequences.
        alignment: as for :class:`~.packing.Packing`.
        shuffle_seeds: as for :class:`~.packing.Packing`.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        longest: int,
        shortest: int,
        alignment: int,
        shuffle_seeds: tuple[int, ...],
    ):
        super().__init__(corpus, seq_length, alignment, shuffle_seeds)
        if seq_length == longest:
            groups = [_every_full_slice(corpus.lengths, seq_length)]
        else:
            groups = [_slice_of_binary_digit(corpus.lengths, seq_length)]
        if seq_length == shortest:
            groups.append(_last_slice(corpus.lengths, seq_length))
        self._slices = np.concatenate(groups)  # [slices, 3]: document, start, number of tokens

        self._order = lru_cache(maxsize=2)(
            lambda epoch: self.shuffled(self.samples_per_epoch, epoch)
        )
        self.samples_per_epoch = len(self._slices)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, without padding."""
        return int(self._slices[:, 2].sum())

    def slices(self, epoch: int, number: int) -> list[DocumentSlice]:
        return [DocumentSlice(*map(int, self._slices[self._order(epoch)[number]]))]


def _every_full_slice(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    counts = lengths // seq_length
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = concatenated_ranges(counts) * seq_length
    return np.stack([documents, starts, np.full(counts.sum(), seq_length)], 1)


def _slice_of_binary_digit(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return one slice, behind all longer ones, of documents whose length has this binary digit."""
    documents = np.flatnonzero(lengths // seq_length % 2 == 1)
    starts = lengths[documents] // (2 * seq_length) * 2 * seq_length
    return np.stack([documents, starts, np.full(len(documents), seq_length)], 1)


def _last_slice(lengths: np.ndarray, shortest: int) -> np.ndarray:
    """Return what is left of each document below the shortest length."""
    documents = np.flatnonzero(lengths % shortest > 0)
    starts = lengths[documents] // shortest * shortest
    return np.stack([documents, starts, lengths[documents] % shortest], 1)


class BucketSteps:
    """Steps (see :class:`~.samples.StepSampler`) of several lengths.

    In a cycle of steps, each length has as many steps as its share of all tokens asks for. Their
    order is drawn: each step takes one of the lengths that the cycle still has to give, with the
    odds of the curriculum.

    Args:
        corpora: with their weights in the mixture.
        longest: tokens of the longest sequences.
        shortest: tokens of the shortest ones: ``longest`` divided by a power of two.
        longest_per_step: sequences of a step, if they are the longest.
        alignment: as for :class:`~.packing.Packing`.
        odds: a name of :data:`ODDS`.
        cycle_steps: steps of a cycle.
        seeds: of all that is drawn.
    """

    def __init__(
        self,
        corpora: list[tuple[Corpus, float]],
        longest: int,
        shortest: int,
        longest_per_step: int,
        alignment: int,
        odds: str,
        cycle_steps: int,
        seeds: tuple[int, ...],
    ):
        self.lengths = [shortest * 2**n for n in range((longest // shortest).bit_length())]
        self._tokens_per_step = longest * longest_per_step
        self._cycle_steps = cycle_steps
        self._seeds = seeds

        total = sum(weight for _, weight in corpora)
        shares = [weight / total for _, weight in corpora]
        ratios = [corpus.bytes_per_token for corpus, _ in corpora]
        self.bytes_per_token = mean_bytes_per_token(np.array(shares), ratios)

        # By bucket. One without tokens has no mixture, and no step.
        self._mixtures: dict[int, Mixture] = {}
        bucket_shares = []
        for bucket, length in enumerate(self.lengths):
            packed = [
                BucketCorpus(corpus, length, longest, shortest, alignment, (*seeds, number))
                for number, (corpus, _) in enumerate(corpora)
            ]
            weights = [
                share * source.num_tokens / int(source.corpus.lengths.sum())
                for share, source in zip(shares, packed, strict=True)
            ]
            filled = [number for number, weight in enumerate(weights) if weight]
            if filled:
                self._mixtures[bucket] = Mixture(
                    [packed[number] for number in filled], [weights[number] for number in filled]
                )
            bucket_shares.append(sum(weights))

        self._steps_per_cycle = _round_keeping_sum(
            np.array(bucket_shares) * cycle_steps / sum(bucket_shares)
        )
        count = len(self.lengths)
        self._odds = np.array([ODDS[odds](rank, count) for rank in range(count)])
        self._cycle = lru_cache(maxsize=2)(self._draw_cycle)

    def length(self, step: int) -> int:
        bucket, _ = self._locate(step)
        return self.lengths[bucket]

    def sample(self, step: int, number: int) -> Sample:
        bucket, steps_before = self._locate(step)
        sequences_before = steps_before * self._tokens_per_step // self.lengths[bucket]
        return self._mixtures[bucket].sample(sequences_before + number)

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many earlier steps had the same bucket."""
        cycle, place = divmod(step, self._cycle_steps)
        buckets = self._cycle(cycle)
        bucket = int(buckets[place])
        before_cycle = cycle * int(self._steps_per_cycle[bucket])
        return bucket, before_cycle + int((buckets[:place] == bucket).sum())

    def _draw_cycle(self, cycle: int) -> np.ndarray:
        """Draw the bucket of each step of a cycle: int64 ``[cycle_steps]``."""
        generator = seeded_generator(*self._seeds, _ORDER_SEED, cycle)
        remaining = self._steps_per_cycle.copy()  # [buckets]
        buckets = np.empty(self._cycle_steps, np.int64)
        for place in range(self._cycle_steps):
            odds = self._odds * (remaining > 0)
            buckets[place] = generator.choice(len(remaining), p=odds / odds.sum())
            remaining[buckets[place]] -= 1
        return buckets


def _round_keeping_sum(numbers: np.ndarray) -> np.ndarray:
    """Round to whole numbers with the same sum, those with the largest remainders up."""
    rounded = np.floor(numbers).astype(np.int64)
    missing = round(numbers.sum()) - int(rounded.sum())
    largest_remainders = np.argsort(-(numbers - rounded), kind="stable")[:missing]
    rounded[largest_remainders] += 1
    return rounded
