"""The engine on Megatron-core: DDP with its distributed optimizer, and tensor, pipeline and context parallelism.

Gloo on CPU, NCCL on GPUs.
"""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ..data.batches import Microbatch
from ..model import weights
from ..recipe.schema import Recipe
from .base import EngineBase, forward
from .engine import StepResult
from .megatron_state import MegatronState


class MegatronEngine(EngineBase):
    """See :class:`~longspan.trainer.engines.engine.Engine`."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__(recipe, vocab_size)
        config = self.model.config
        inner = Float16Module(config, self.model) if config.bf16 else self.model
        self._ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            inner,
        )
        for buckets in self._ddp.bucket_groups + self._ddp.expert_parallel_bucket_groups:
            if (
                buckets.intra_distributed_optimizer_instance_size == 1
            ):  # gloo would copy all through new memory, each step
                buckets.start_grad_sync = buckets.start_param_sync = _nothing_to_share
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self._ddp.no_sync
        chosen = recipe.optimizer
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=chosen.lr,
                weight_decay=chosen.weight_decay,
                adam_beta1=chosen.betas[0],
                adam_beta2=chosen.betas[1],
                adam_eps=chosen.eps,
                bf16=config.bf16,
                params_dtype=self.dtype,
                use_distributed_optimizer=True,
            ),
            [self._ddp],
        )
        config.grad_scale_func = self._optimizer.scale_loss
        self._state = MegatronState(self.model, self._ddp, self._optimizer)
        for optimizer in self._state.optimizers:
            for group in optimizer.optimizer.param_groups:
                group["fused"] = True  # which Megatron does not ask of torch's AdamW
        self._forward_backward = get_forward_backward_func()

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_sum, tokens, padding = self._run(batches)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        updated = math.isfinite(loss_sum) and math.isfinite(grad_norm)  # of all ranks: they agree
        result = StepResult(loss_sum, tokens, padding, grad_norm, updated, self.balance_loss())
        if not updated:
            return result
        for group in (
            self._optimizer.param_groups
        ):  # Megatron's scheduler, not its optimizer, applies the multipliers
            group["lr"] = lr
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group["wd_mult"]
        if most := self.recipe.training.max_grad_norm:
            for optimizer in self._state.optimizers:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), most, grad_norm)
        self._optimizer.step_with_ready_grads()
        return result

    def evaluate(self, batch: Microbatch) -> tuple[float, int]:
        self._ddp.eval()
        with torch.no_grad():
            loss_sum, tokens, _ = self._run([batch], forward_only=True)
        self._ddp.train()
        return loss_sum, tokens

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        self._ddp.zero_grad_buffer()
        # All-reduced rather than reduce-scattered, so that each rank has its gradients whole.
        self._run(batches, force_all_reduce=True)
        gradients = weights.gather(self.model, lambda parameter: parameter.main_grad)
        self._ddp.zero_grad_buffer()
        return gradients

    def weights(self) -> dict[str, Tensor] | None:
        return weights.gather(self.model)

    def close(self) -> None:
        # Megatron keeps configs, and with them would stay all weights, and the threads of all process groups.
        config = self.model.config
        config.finalize_model_grads_func = config.no_sync_func = config.grad_scale_func = None
        super().close()

    def _run(self, batches: list[Microbatch], **options) -> tuple[float, int, int]:
        """Forward (and backward) over the microbatches; (sum of token losses, labels, padding) over all ranks."""
        outputs = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].sequence.layout.length,
            micro_batch_size=len(batches[0].tokens),
            **{"forward_only": False, **options},
        )
        # Only the last pipeline stage has any.
        loss_sum, tokens, padding = (
            self.summed(*torch.stack(outputs).sum(0)) if outputs else self.summed(0, 0, 0)
        )
        if self.recipe.parallel.pp > 1:
            totals = torch.tensor(
                [loss_sum, tokens, padding], dtype=torch.float64, device=self.device
            )
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(
                totals, src=last, group=parallel_state.get_pipeline_model_parallel_group()
            )
            loss_sum, tokens, padding = totals.tolist()
        return loss_sum, int(tokens), int(padding)


def _nothing_to_share(**options) -> None:
    """In place of a collective of one rank."""


def _forward_step(batches, model):
    """Megatron's forward step: the output, and the function that makes (loss sum, labels, record) of it."""
    batch: Microbatch = next(batches)

    def loss(loss_sum: Tensor):
        tokens = batch.weights.sum()
        padding = torch.full_like(loss_sum, batch.padding)
        return loss_sum, tokens.int(), torch.stack([loss_sum.detach(), tokens, padding]).double()

    return forward(model, batch), loss
