"""The batches of a run: which samples, and which of their tokens, a rank sees at a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...parallel import Sequence
from ..predict.communication import recipe_layout
from ..recipe.schema import Recipe
from .prepare import PreparedData
from .samples import Sample


class BatchShard(NamedTuple):
    """Which part of a global batch a rank sees: some of its sequences, and some of their tokens."""

    data_rank: int
    """The rank among the data-parallel ones, which share the sequences."""
    data_ranks: int
    """Their number."""
    context_rank: int
    """The rank among the context-parallel ones, which share the tokens of each sequence."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank's forward pass works on: the rank's tokens of some sequences."""

    tokens: Tensor
    """int64 ``[batch, local time]``."""
    labels: Tensor
    """int64 ``[batch, local time]``."""
    weights: Tensor
    """float32 ``[batch, local time]``: 1 where the label counts."""
    sequence: Sequence
    """Where these tokens stand in the whole sequences, and the documents of all tokens."""
    padding: int
    """Tokens of the whole sequences that are only padding. It is 0 on all but the first
    context-parallel rank, so that the sum over ranks is right.
    """


class Batches:
    """Training and held-out batches of a recipe, as one rank sees them.

    Args:
        recipe: the run's, or that of one of its stages.
        data: of the run.
        vocab_size: ids that the model knows.
        shard: this rank's part of each batch.
        device: where the batches are put.
        first_step: the step of the run (from 0) at which this recipe's data begins: not 0 in a
            later stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: PreparedData,
        vocab_size: int,
        shard: BatchShard,
        device: torch.device,
        first_step: int = 0,
    ):
        self.recipe = recipe
        self.shard = shard
        self.device = device
        self.first_step = first_step
        self.micro_batch_size = recipe.training.micro_batch_size
        self.training, self.held_out = data.samples(recipe, vocab_size)

    def step(self, step: int) -> Iterator[Microbatch]:
        """Make this rank's microbatches of training step ``step`` (from 0)."""
        # A step of shorter sequences has more of them, with the same number of tokens.
        factor = self.recipe.training.seq_length // self.length(step)
        micro_batch_size = self.micro_batch_size * factor
        num_sequences = self.recipe.training.global_batch_size * factor

        first = self.shard.data_rank * micro_batch_size
        for start in range(first, num_sequences, micro_batch_size * self.shard.data_ranks):
            numbers = range(start, start + micro_batch_size)
            yield self._microbatch(
                [self.training.sample(step - self.first_step, number) for number in numbers]
            )

    def length(self, step: int) -> int:
        """Return the tokens of each sequence of training step ``step`` (from 0)."""
        return self.training.length(step - self.first_step)

    def evaluation(self, max_sequences: int | None) -> Iterator[Microbatch]:
        """Make this rank's microbatches of the held-out data.

        Every rank gets the same number of sequences; those beyond the end have no labels that
        count.

        Args:
            max_sequences: how many of the held-out sequences to use, from the first; None for all.
        """
        assert self.held_out is not None, "the recipe holds nothing out"
        samples, num_samples = self.held_out
        if max_sequences is not None:
            num_samples = min(max_sequences, num_samples)

        for start in range(0, num_samples, self.micro_batch_size * self.shard.data_ranks):
            first = start + self.shard.data_rank * self.micro_batch_size
            microbatch = []
            for number in range(first, first + self.micro_batch_size):
                sample = samples.sample(number)
                if number >= num_samples:
                    sample = sample._replace(weights=sample.weights * 0)
                microbatch.append(sample)
            yield self._microbatch(microbatch)

    def _microbatch(self, samples: list[Sample]) -> Microbatch:
        return microbatch(self.recipe, samples, self.shard.context_rank, self.device)


def microbatch(
    recipe: Recipe, samples: list[Sample], context_rank: int, device: torch.device
) -> Microbatch:
    """Stack samples, and keep the tokens of a context-parallel rank."""
    # All are [batch, time].
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    weights = torch.from_numpy(np.stack([sample.weights for sample in samples]))
    documents = torch.from_numpy(np.stack([sample.documents for sample in samples]))

    layout = recipe_layout(recipe, tokens.shape[1])
    return Microbatch(
        tokens=layout.shard(tokens, context_rank).to(device),  # [batch, local time]
        labels=layout.shard(labels, context_rank).to(device),
        weights=layout.shard(weights, context_rank).to(device),
        sequence=Sequence(layout, context_rank, documents.to(device)),
        padding=sum(sample.padding for sample in samples) if context_rank == 0 else 0,
    )
