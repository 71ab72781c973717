"""What the trainer asks of an engine: the data and the loop know no more about one than this."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checkpoint.shards import Shards
from ..data.batches import BatchShard, Microbatch
from ..recipe.schema import Recipe
from .loss_scale import ScaledStep


class StepResult(NamedTuple):
    """What a step did, over all ranks; the same on every rank."""

    loss_sum: float
    """Sum of the token losses, in nats."""
    tokens: int
    """Labels that counted."""
    padding: int
    """Tokens that only filled up sequences."""
    grad_norm: float
    """Before clipping."""
    updated: bool = True
    """False if the loss or the gradient norm was not finite.

    The model and its optimizer are then as before, bit by bit.
    """
    balance_loss: float | None = None
    """Balance loss of the experts' routers, without its weight: 1 if all experts are used alike, at
    most experts / experts per token. None if experts are not balanced by a loss.
    """
    scaled: ScaledStep | None = None
    """What became of the factor of the loss; None unless the dtype is float16."""

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.loss_sum / max(1, self.tokens)


class EvaluationResult(NamedTuple):
    """Losses of a batch, over all ranks; the same on every rank."""

    loss_sum: float
    """Sum of the token losses, in nats."""
    tokens: int
    """Labels that counted."""


class Engine(Protocol):
    """A model, its optimizer and how they are spread over the ranks.

    Every method but :meth:`close` is a collective of all ranks.
    """

    device: torch.device
    capability: int | None
    """Compute capability of the GPU, 90 for 9.0, 0 for one of AMD's; None on a CPU."""
    dtype: torch.dtype
    """The dtype of weights and activations."""
    num_parameters: int
    """Number of parameters of the whole model."""
    rank_layout: str
    """How the ranks are arranged; random states fit no other arrangement."""
    batch_shard: BatchShard
    """This rank's part of a global batch."""

    def begin_stage(self, recipe: Recipe) -> None:
        """Continue as this recipe says, which is that of a stage of the run."""
        ...

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        """Make one update, if all is finite.

        The loss is the mean over the labels of the global batch, on whatever ranks they are.
        """
        ...

    def state(self) -> dict[str, Shards]:
        """Return everything that a checkpoint keeps, by global name, to save from and to load into.

        ``model.*`` and ``optimizer.*`` fit any number of ranks, ``rng.*`` only the
        :attr:`rank_layout` that wrote them.
        """
        ...

    def load_state(self, state: dict[str, Shards]) -> None:
        """Take over what has been loaded into the shards of :meth:`state`."""
        ...

    def evaluate(self, batch: Microbatch) -> EvaluationResult:
        """Return the losses of a batch, without an update."""
        ...

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        """Return the whole gradients of the mean loss by global name on rank 0, None on the others.

        Nothing is updated.
        """
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Return the whole weights by global name on rank 0, None on the others."""
        ...

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of this rank's parameters by global name."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over whole weights by global name, all or some; every rank is given the same."""
        ...

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, time, vocab]`` for tokens ``[batch, time]``, one document a row.

        Needs a single model rank.
        """
        ...

    def token_losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each label in nats, and whether it is the likeliest token.

        All tensors are ``[batch, time]``.

        Like :meth:`logits`, but only the logits of one tile of tokens are in memory at a time.
        """
        ...

    def close(self) -> None:
        """Release what belongs to the process, so that another engine may follow."""
        ...
