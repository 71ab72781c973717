"""What the loop asks of an engine. Megatron-core is one; the model, data and loop know no more than this."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checkpoint.shards import Shards
from ..data.batches import BatchShard, Microbatch
from ..recipe.schema import Recipe


class StepResult(NamedTuple):
    """Over all ranks; the same on every rank."""

    loss_sum: float
    """Sum of the token losses, in nats."""
    tokens: int
    """Labels that counted."""
    padding: int
    """Tokens that only filled up sequences."""
    grad_norm: float
    """Before clipping."""
    updated: bool = True
    """False where the loss or the gradient norm was not finite: the model and its optimizer are as before, bit by bit."""
    balance_loss: float | None = None
    """Of the routers of experts, without its weight: 1 where all experts are used alike, up to experts / experts per token."""

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.tokens)


class Engine(Protocol):
    """A model, its optimizer and how they are spread over the ranks."""

    device: torch.device
    dtype: torch.dtype
    """Of weights and activations."""
    num_parameters: int
    """Of the whole model."""
    ranks: str
    """How they are arranged; random states fit no other arrangement."""
    share: BatchShard
    """Of a global batch, on this rank."""

    def begin_stage(self, recipe: Recipe) -> None:
        """Go on as this recipe says, which is that of a stage of the run."""
        ...

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        """One update, if all is finite; the loss is the mean over the global batch's labels, wherever they are."""
        ...

    def state(self) -> dict[str, Shards]:
        """All that a checkpoint keeps, by global name, to save from and to load into.

        ``model.*`` and ``optimizer.*`` are for any number of ranks, ``rng.*`` only for as many as there are.
        """
        ...

    def restored(self, state: dict[str, Shards]) -> None:
        """Take over what has been loaded into :meth:`state`'s shards."""
        ...

    def evaluate(self, batch: Microbatch) -> tuple[float, int]:
        """(sum of token losses, labels) over all ranks, without an update."""
        ...

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        """Whole gradients of the mean loss by global name, on rank 0; nothing is updated."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Whole weights by global name, on rank 0."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None: ...

    def logits(self, tokens: Tensor) -> Tensor:
        """``[batch, time, vocab]`` for ``tokens`` ``[batch, time]``, one document a row; on a single model rank."""
        ...

    def token_losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of each of the ``labels`` ``[batch, time]`` the loss in nats, and whether it is the likeliest token; as ``logits``,
        but with those of a tile of tokens alone in memory.
        """
        ...

    def close(self) -> None:
        """Give back what is the process's, so that another engine may follow."""
        ...
