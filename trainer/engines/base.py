"""What both engines begin with: this rank's part of a Megatron-core model and its groups."""

import contextlib
import gc
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...attention.gpu import compute_capability
from ...parallel import Sequence
from ..checkpoint.files import LOSS_SCALE
from ..checkpoint.shards import Shards
from ..data.batches import BatchShard, Microbatch
from ..layers.mixer import Mixer
from ..megatron_core import (
    MoEAuxLossAutoScaler,
    model_parallel_cuda_manual_seed,
    parallel_state,
)
from ..model import weights
from ..model.cpu import megatron_on_cpu
from ..model.model import build_model, expert_tensor_parallel
from ..model.moe import BalancedRouter
from ..predict.flops import parameter_count
from ..recipe.schema import Recipe
from .engine import Engine
from .engine_state import EngineState
from .loss_scale import LossScale


class EngineBase(Engine):
    """Base of the engines. One per process, because Megatron's groups are global.

    An engine adds its optimizer, ``_state``, and the methods ``step``, ``evaluate``, ``gradients``
    and ``weights``.
    """

    _state: EngineState
    """The fp32 weights and Adam's moments that the engine's optimizer keeps on this rank."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        parallel = recipe.parallel
        self.recipe = recipe
        self.resources = contextlib.ExitStack()
        """What :meth:`close` gives back, the last first."""
        self.resources.enter_context(megatron_on_cpu())
        self.resources.enter_context(_model_parallel_groups(recipe))
        model_parallel_cuda_manual_seed(recipe.training.seed)

        self.device = _device()
        self.capability = compute_capability(self.device) if self.device.type == "cuda" else None
        self.dtype = getattr(torch, recipe.training.dtype_on(self.capability))
        self.loss_scale = LossScale() if self.dtype == torch.float16 else None
        self.num_parameters = parameter_count(recipe.model, vocab_size)
        self.rank_layout = (
            f"{self.device.type} dp {recipe.data_parallel} cp {parallel.cp} "
            f"pp {parallel.pp} tp {parallel.tp}"
        )
        self.batch_shard = BatchShard(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        self.data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        """The ranks with the same weights and other tokens, of other sequences or of the same."""

        # Megatron makes the weights of routers on the CPU.
        self.model = build_model(recipe, vocab_size, self.dtype).to(self.device)
        weights.initialize(
            self.model,
            recipe.training.seed,
            recipe.model.initializer_range,
            self.model.config.num_layers,
        )

    def begin_stage(self, recipe: Recipe) -> None:
        self.recipe = recipe
        for module in self.model.modules():
            if isinstance(module, Mixer):
                module.rope_theta = recipe.model.rope_theta

    def state(self) -> dict[str, Shards]:
        state = self._state.shards()
        if self.loss_scale:
            state[LOSS_SCALE] = Shards.whole(self.loss_scale.state, owner=dist.get_rank() == 0)
        return state

    def load_state(self, state: dict[str, Shards]) -> None:
        if self.loss_scale and LOSS_SCALE in state:
            self.loss_scale.load(state[LOSS_SCALE].boxes[0].data)
        self._state.load(state)

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        parameters = weights.global_parameters(self.model)
        return {name: parameter.dtype for name, parameter in parameters}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self._state.load_weights(weights)

    def sum_over_ranks(
        self, *numbers: Tensor | float, group: dist.ProcessGroup | None = None
    ) -> list[float]:
        """Sum each number in fp64 over the ranks of :attr:`data_group` or of another group."""
        totals = torch.stack([self._on_device(number) for number in numbers])
        dist.all_reduce(totals, group=group or self.data_group)
        return totals.tolist()

    def _on_device(self, number: Tensor | float) -> Tensor:
        """Return a number in fp64 on the device; none is copied there, which would wait for it."""
        if isinstance(number, Tensor):
            return number.double()
        return torch.full((), number, dtype=torch.float64, device=self.device)

    def balance_loss(self) -> float | None:
        """Return the mean balance loss of all ranks, layers and microbatches since the last call.

        None if experts are not balanced by a loss.
        """
        moe = self.recipe.model.moe
        if moe is None or not moe.router_aux_loss_coef:
            return None
        losses = [
            module.balance_loss()
            for module in self.model.modules()
            if isinstance(module, BalancedRouter)
        ]
        loss, num_routers = self.sum_over_ranks(sum(losses), len(losses), group=dist.group.WORLD)
        # Context- and tensor-parallel ranks have a part of each loss.
        return loss / num_routers * self.recipe.parallel.cp * self.recipe.parallel.tp

    def logits(self, tokens: Tensor) -> Tensor:
        logits = self._output(tokens)
        return logits[:, : tokens.shape[1], : self.model.real_vocab_size].float()

    def token_losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, is_likeliest = self._output(tokens, labels)
        return losses[:, : tokens.shape[1]], is_likeliest[:, : tokens.shape[1]]

    @torch.no_grad()
    def _output(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        """Return the model's output for sequences filled up to whole blocks.

        Without labels that is the logits, with labels what :class:`HybridModel` computes of them.
        What comes after a token does not change what the token sees.
        """
        batch, length = tokens.shape
        fill = -length % self.recipe.model.document_alignment
        tokens = F.pad(tokens, (0, fill))
        if labels is not None:
            labels = F.pad(labels, (0, fill))
        return self.model(
            tokens,
            None,
            None,
            labels=labels,
            packed_seq_params=Sequence.single(batch, length + fill, tokens.device),
        )

    def close(self) -> None:
        self.resources.close()
        # Megatron's schedules leave their factor of the balance loss in this class.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        # Modules hold process groups, whose threads and sockets live as long as any reference.
        vars(self).clear()
        for _ in range(2):  # what autograd's hooks held is seen to be garbage in the second round
            gc.collect()


@contextlib.contextmanager
def _model_parallel_groups(recipe: Recipe) -> Iterator[None]:
    """Make Megatron's process groups, and destroy them when the context is left."""
    parallel = recipe.parallel
    others = set(_named_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=expert_tensor_parallel(recipe),
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(recipe.launch.collective_timeout_s / 60),
    )
    own = set(_named_groups()) - others
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()  # which forgets most groups, and destroys few
        for name, value in vars(parallel_state).items():
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
        for name, group in _named_groups().items():
            if name in own:
                dist.destroy_process_group(group)


def _named_groups() -> dict[str, dist.ProcessGroup]:
    """Return this process's groups by their names, which no two groups share."""
    return {name: group for group, name in dist.distributed_c10d._world.pg_names.items()}


def forward(model: torch.nn.Module, batch: Microbatch) -> Tensor:
    """Run the model on this rank's tokens and return the sum of its token losses.

    On a pipeline stage that is not the last, return what the next stage takes.
    """
    return model(
        batch.tokens,
        None,
        None,
        labels=batch.labels,
        loss_mask=batch.weights,
        packed_seq_params=batch.sequence,
    )


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
