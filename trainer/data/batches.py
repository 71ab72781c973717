"""The batches of a run: which samples a rank sees at a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...parallel import Sequence
from ..predict.communication import recipe_layout
from ..recipe.schema import Recipe
from .packing import Sample
from .prepare import PreparedData


class BatchShard(NamedTuple):
    """Which part of a global batch a rank sees: some of its sequences, and of those some of the tokens."""

    data_rank: int
    data_ranks: int
    context_rank: int


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass of one rank takes: whole sequences, or the tokens of its context-parallel rank."""

    tokens: Tensor
    """int64 ``[batch, local time]``."""
    labels: Tensor
    """int64 ``[batch, local time]``."""
    weights: Tensor
    """float32 ``[batch, local time]``: 1 where the label counts."""
    sequence: Sequence
    padding: int
    """Tokens of the batch that are only padding; 0 but on the first context-parallel rank, so that they add up."""


class Batches:
    """Training and held-out batches of a recipe, as one rank sees them.

    Args:
        first: the step (from 0) at which the recipe begins, as a stage of a run may.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: PreparedData,
        vocab_size: int,
        share: BatchShard,
        device: torch.device,
        first: int = 0,
    ):
        self.recipe, self.share, self.device, self.first = recipe, share, device, first
        self.micro = recipe.training.micro_batch_size
        self.training, self.held_out = data.samples(recipe, vocab_size)

    def step(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of training step ``step`` (from 0)."""
        rank, ranks, _ = self.share
        shorter = self.recipe.training.seq_length // self.length(step)
        micro, sequences = self.micro * shorter, self.recipe.training.global_batch_size * shorter
        for start in range(rank * micro, sequences, micro * ranks):
            yield self._batch(
                [
                    self.training.sample(step - self.first, number)
                    for number in range(start, start + micro)
                ]
            )

    def length(self, step: int) -> int:
        """Tokens of each sequence of training step ``step`` (from 0)."""
        return self.training.length(step - self.first)

    def evaluation(self, sequences: int | None) -> Iterator[Microbatch]:
        """The first ``sequences`` held-out sequences (all for None); every rank gets equally many, short ones empty."""
        assert self.held_out is not None
        total = self.held_out.samples_per_epoch
        total = total if sequences is None else min(sequences, total)
        rank, ranks, _ = self.share
        for first in range(0, total, self.micro * ranks):
            numbers = range(first + rank * self.micro, first + (rank + 1) * self.micro)
            samples = [self.held_out.sample(n) for n in numbers]
            yield self._batch(
                [
                    s if n < total else s._replace(weights=s.weights * 0)
                    for n, s in zip(numbers, samples, strict=True)
                ]
            )

    def _batch(self, samples: list[Sample]) -> Microbatch:
        tokens, labels, weights, documents = (
            torch.from_numpy(np.stack([getattr(s, name) for s in samples]))
            for name in ("tokens", "labels", "weights", "documents")
        )
        rank, layout = self.share.context_rank, recipe_layout(self.recipe, tokens.shape[1])
        own = (layout.shard(x, rank).to(self.device) for x in (tokens, labels, weights))
        padding = sum(s.padding for s in samples) if rank == 0 else 0
        return Microbatch(*own, Sequence(layout, rank, documents.to(self.device)), padding)
