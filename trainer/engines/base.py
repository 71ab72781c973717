"""This rank's part of a Megatron-core model, among Megatron's process groups: what all engines begin with."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from ...parallel import Sequence
from ..checkpoint.shards import Shards
from ..data.batches import BatchShard, Microbatch
from ..model import weights
from ..model.cpu import megatron_on_cpu
from ..model.model import build_model, expert_tensor_parallel
from ..model.moe import BalancedRouter
from ..predict.flops import parameter_count
from ..recipe.schema import Recipe
from .engine_state import EngineState


class EngineBase:
    """Base of the engines (:class:`~longspan.trainer.engines.engine.Engine`). One per process: Megatron's groups are global."""

    _state: EngineState
    """Of the engine's optimizer."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        self.recipe = recipe
        self.resources = contextlib.ExitStack()
        self.resources.enter_context(megatron_on_cpu())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.parallel.tp,
            pipeline_model_parallel_size=recipe.parallel.pp,
            context_parallel_size=recipe.parallel.cp,
            expert_model_parallel_size=recipe.parallel.ep,
            expert_tensor_parallel_size=expert_tensor_parallel(recipe),
        )
        self.resources.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(recipe.training.seed)
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        degrees = recipe.parallel
        self.ranks = f"{self.device.type} dp {recipe.data_parallel} cp {degrees.cp} pp {degrees.pp} tp {degrees.tp}"
        self.num_parameters = parameter_count(recipe.model, vocab_size)
        self.share = BatchShard(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        self.dtype = _dtype(recipe)
        self.model = build_model(recipe, vocab_size, self.dtype)
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        """The ranks that have the same weights and other tokens."""
        weights.initialise(
            self.model,
            recipe.training.seed,
            recipe.model.initializer_range,
            self.model.config.num_layers,
        )

    def begin_stage(self, recipe: Recipe) -> None:
        self.recipe = recipe
        for module in self.model.modules():
            if hasattr(module, "rope_theta"):
                module.rope_theta = recipe.model.rope_theta

    def state(self) -> dict[str, Shards]:
        return self._state.shards()

    def restored(self, state: dict[str, Shards]) -> None:
        self._state.restored(state)

    def load_weights(self, whole: dict[str, Tensor]) -> None:
        self._state.load_weights(whole)

    def summed(
        self, *numbers: Tensor | float, group: dist.ProcessGroup | None = None
    ) -> list[float]:
        """Over the ranks of :attr:`data_group` or another."""
        totals = torch.stack(
            [torch.as_tensor(number, device=self.device).double() for number in numbers]
        )
        dist.all_reduce(totals, group=group or self.data_group)
        return totals.tolist()

    def balance_loss(self) -> float | None:
        """Over all ranks, layers and microbatches since the last call; None where experts are not balanced by a loss."""
        moe, degrees = self.recipe.model.moe, self.recipe.parallel
        if moe is None or not moe.router_aux_loss_coef:
            return None
        losses = [
            module.balance_loss()
            for module in self.model.modules()
            if isinstance(module, BalancedRouter)
        ]
        loss, routers = self.summed(sum(losses), len(losses), group=dist.group.WORLD)
        return loss / routers * degrees.cp * degrees.tp  # whose ranks have a part each

    def logits(self, tokens: Tensor) -> Tensor:
        return self._output(tokens)[:, : tokens.shape[1], : self.model.real_vocab_size].float()

    def token_losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, likeliest = self._output(tokens, labels)
        return losses[:, : tokens.shape[1]], likeliest[:, : tokens.shape[1]]

    @torch.no_grad()
    def _output(
        self, tokens: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Of the model, with sequences filled up to whole blocks. What lies behind a token does not change what it sees, except
        in ``moba``, where all queries of a block choose together.
        """
        more = -tokens.shape[1] % self.recipe.model.document_alignment
        tokens, labels = (
            each if each is None else F.pad(each, (0, more)) for each in (tokens, labels)
        )
        return self.model(
            tokens,
            None,
            None,
            labels=labels,
            packed_seq_params=Sequence.single(*tokens.shape, tokens.device),
        )

    def close(self) -> None:
        self.resources.close()


def forward(model: torch.nn.Module, batch: Microbatch) -> Tensor:
    """Of this rank's labels; on a pipeline stage that is not the last, what the next one takes."""
    return model(
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        loss_mask=batch.weights,
        packed_seq_params=batch.sequence,
    )


def _dtype(recipe: Recipe) -> torch.dtype:
    name = recipe.training.dtype
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)
