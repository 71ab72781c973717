"""The batches of a run: which samples a rank sees at a step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...parallel import Layout, Sequence
from ..recipe import Recipe
from .corpus import Corpus
from .packing import Mixture, PackedCorpus, Sample
from .prepare import DataPaths


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass of one rank takes."""

    tokens: Tensor
    """int64 ``[batch, time]``."""
    labels: Tensor
    """int64 ``[batch, time]``."""
    weights: Tensor
    """float32 ``[batch, time]``: 1 where the label counts."""
    sequence: Sequence
    padding: int
    """Tokens of the batch that are only padding."""


class Batches:
    """Training and held-out batches of a recipe, for one data-parallel rank of ``replicas``."""

    def __init__(self, recipe: Recipe, paths: DataPaths, vocab_size: int, rank: int, replicas: int, device: torch.device):
        self.recipe, self.rank, self.replicas, self.device = recipe, rank, replicas, device
        self.micro = recipe.training.micro_batch_size
        length, alignment, seed = recipe.training.seq_length, recipe.model.document_alignment, recipe.training.seed
        corpora = [Corpus(prefix, vocab_size) for prefix in paths.sources]
        packed = [PackedCorpus(corpus, length, alignment, (seed, i)) for i, corpus in enumerate(corpora)]
        self.training = Mixture(packed, list(paths.sources.values()))
        self.held_out = None
        if paths.validation:
            self.held_out = PackedCorpus(Corpus(paths.validation, vocab_size), length, alignment, None)

    def step(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of training step ``step`` (from 0)."""
        first, size = step * self.recipe.training.global_batch_size, self.micro * self.replicas
        last = first + self.recipe.training.global_batch_size
        starts = range(first + self.rank * self.micro, last, size)
        for start in starts:
            yield self._batch([self.training.sample(n) for n in range(start, start + self.micro)])

    def evaluation(self, sequences: int | None) -> Iterator[Microbatch]:
        """The first ``sequences`` held-out sequences (all for None); every rank gets equally many, short ones empty."""
        assert self.held_out is not None
        total = self.held_out.samples_per_epoch
        total = total if sequences is None else min(sequences, total)
        size = self.micro * self.replicas
        for first in range(0, total, size):
            numbers = range(first + self.rank * self.micro, first + (self.rank + 1) * self.micro)
            samples = [self.held_out.sample(n) for n in numbers]
            yield self._batch(
                [s if n < total else s._replace(weights=s.weights * 0) for n, s in zip(numbers, samples, strict=True)]
            )

    def _batch(self, samples: list[Sample]) -> Microbatch:
        tokens, labels, weights, documents = (
            torch.from_numpy(np.stack([getattr(s, name) for s in samples])).to(self.device)
            for name in ("tokens", "labels", "weights", "documents")
        )
        sequence = Sequence(Layout.contiguous(tokens.shape[1]), 0, documents)
        return Microbatch(tokens, labels, weights, sequence, sum(s.padding for s in samples))
