"""Sequences of several lengths, each from one document: Dataset Decomposition (Pouransari et al., arXiv 2405.13226).

Documents are cut to pieces whose lengths are powers of two times the shortest, and a step takes sequences of one length, as
many as make the same number of tokens. No sequence crosses a document, and short documents cost no long attention.
"""

from functools import lru_cache

import numpy as np

from .corpus import Corpus
from .packing import Mixture, Packing, Piece, Sample, places

ODDS = {
    "uniform": lambda rank, count: 1.0,
    "grow_linear": lambda rank, count: float(count - rank),
    "grow_p2": lambda rank, count: 2.0 ** (count - 1 - rank),
    "grow_p100": lambda rank, count: 100.0 ** (count - 1 - rank),
    "shrink_p100": lambda rank, count: 100.0**rank,
}
"""How likely a step takes a length, by its rank from the shortest: the paper's curricula."""


class BucketCorpus(Packing):
    """The pieces of one length. What is left of a document below the shortest is padded to it."""

    def __init__(
        self,
        corpus: Corpus,
        seq_length: int,
        longest: int,
        shortest: int,
        alignment: int,
        order: tuple[int, ...],
    ):
        super().__init__(corpus, seq_length, alignment, order)
        lengths, documents = corpus.lengths, np.arange(len(corpus))
        if seq_length == longest:
            counts = lengths // longest
            found = [
                (
                    np.repeat(documents, counts),
                    places(counts) * longest,
                    np.full(counts.sum(), longest),
                )
            ]
        else:
            kept = documents[lengths // seq_length % 2 == 1]
            found = [
                (
                    kept,
                    lengths[kept] // (2 * seq_length) * 2 * seq_length,
                    np.full(len(kept), seq_length),
                )
            ]
        if seq_length == shortest:
            rest = documents[lengths % shortest > 0]
            found.append((rest, lengths[rest] // shortest * shortest, lengths[rest] % shortest))
        self._pieces = np.concatenate([np.stack(columns, 1) for columns in found])
        self._order = lru_cache(maxsize=2)(
            lambda epoch: self.shuffled(self.samples_per_epoch, epoch)
        )
        self.samples_per_epoch = len(self._pieces)

    @property
    def tokens(self) -> int:
        return int(self._pieces[:, 2].sum())

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        return [Piece(*map(int, self._pieces[self._order(epoch)[number]]))]


class Buckets:
    """Steps (:class:`~longspan.trainer.data.steps.StepSampler`) of several lengths.

    A cycle of steps has every length as often as its share of all tokens; in what order is drawn by the curriculum's odds from
    what the cycle still has to give.

    Args:
        corpora: with their weights in the mixture.
        sequences: of the longest, in a step.
        odds: a name of :data:`ODDS`.
        cycle: steps.
    """

    def __init__(
        self,
        corpora: list[tuple[Corpus, float]],
        longest: int,
        shortest: int,
        sequences: int,
        alignment: int,
        odds: str,
        cycle: int,
        seed: tuple[int, ...],
    ):
        self.lengths = [shortest * 2**n for n in range((longest // shortest).bit_length())]
        self._cycle, self._seed, self._tokens = cycle, seed, longest * sequences
        total = sum(weight for _, weight in corpora)
        parts, shares = [], []
        for length in self.lengths:
            made = [
                (
                    BucketCorpus(corpus, length, longest, shortest, alignment, (*seed, n)),
                    weight / total,
                )
                for n, (corpus, weight) in enumerate(corpora)
            ]
            weights = [
                weight * bucket.tokens / int(bucket.corpus.lengths.sum()) for bucket, weight in made
            ]
            filled = [
                (bucket, weight)
                for (bucket, _), weight in zip(made, weights, strict=True)
                if weight
            ]
            parts.append(
                Mixture([bucket for bucket, _ in filled], [weight for _, weight in filled])
                if filled
                else None
            )
            shares.append(sum(weights))
        self._mixtures = parts
        self._steps = _rounded(np.array(shares) * cycle / sum(shares))
        self._odds = np.array(
            [ODDS[odds](rank, len(self.lengths)) for rank in range(len(self.lengths))]
        )
        self._draw = lru_cache(maxsize=2)(self._drawn)
        ratios = [corpus.bytes_per_token for corpus, _ in corpora]
        weights = [weight / total for _, weight in corpora]
        self.bytes_per_token = None if None in ratios else float(np.dot(weights, ratios))

    def length(self, step: int) -> int:
        return self.lengths[self._at(step)[0]]

    def sample(self, step: int, number: int) -> Sample:
        bucket, before = self._at(step)
        return self._mixtures[bucket].sample(before * self._tokens // self.lengths[bucket] + number)

    def _at(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps had it before."""
        cycle, place = divmod(step, self._cycle)
        order = self._draw(cycle)
        bucket = int(order[place])
        return bucket, cycle * int(self._steps[bucket]) + int((order[:place] == bucket).sum())

    def _drawn(self, cycle: int) -> np.ndarray:
        """The bucket of each step of a cycle."""
        generator = np.random.Generator(np.random.PCG64((*self._seed, 0xB0CCE7, cycle)))
        left, order = self._steps.copy(), np.empty(self._cycle, np.int64)
        for place in range(self._cycle):
            chances = self._odds * (left > 0)
            order[place] = generator.choice(len(left), p=chances / chances.sum())
            left[order[place]] -= 1
        return order


def _rounded(shares: np.ndarray) -> np.ndarray:
    """To whole numbers with the same sum, the largest remainders up."""
    whole = np.floor(shares).astype(np.int64)
    up = np.argsort(-(shares - whole), kind="stable")[: round(shares.sum()) - int(whole.sum())]
    whole[up] += 1
    return whole
